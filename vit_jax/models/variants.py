"""Model names: what `S/16`, `R50+B/16` or `R101x1` stand for, and `create_model`."""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import did_you_mean
from vit_jax.models.attention import IMPLEMENTATIONS
from vit_jax.models.positions import POSITION_EMBEDDINGS, POSITION_PLACES
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import ACTIVATIONS, CLASSIFIERS, REMAT_POLICIES, VisionTransformer


def _sizes(hidden_size, mlp_dim, num_heads, num_layers):
    return dict(hidden_size=hidden_size, mlp_dim=mlp_dim, num_heads=num_heads,
                num_layers=num_layers)


# Ti and S: AugReg (arXiv 2106.10270); B, L, H: the paper's Table 1; g, G: arXiv 2106.04560.
SIZES = {
    "Ti": _sizes(192, 768, 3, 12),
    "S": _sizes(384, 1536, 6, 12),
    "B": _sizes(768, 3072, 12, 12),
    "L": _sizes(1024, 4096, 16, 24),
    "H": _sizes(1280, 5120, 16, 32),
    "g": _sizes(1408, 6144, 16, 40),
    "G": _sizes(1664, 8192, 16, 48),
}

_PLAIN = ("Ti/16", "S/16", "S/32", "B/8", "B/16", "B/32", "L/16", "L/32", "H/14", "g/14", "G/14")
# (patch size on the feature map, bottlenecks per stage). The root alone has stride 4, so the 8x8
# patches of R+Ti/16 see 32x32 pixels; its name is Google's.
_HYBRIDS = {
    "R+Ti/16": (8, ()),
    "R26+S/32": (1, (2, 2, 2, 2)),
    "R26+B/32": (1, (2, 2, 2, 2)),
    "R50+B/16": (1, (3, 4, 9)),
    "R50+B/32": (1, (3, 4, 6, 3)),
    "R50+L/16": (1, (3, 4, 9)),
    "R50+L/32": (1, (3, 4, 6, 3)),
}
_RESNETS = {
    "R50x1": ((3, 4, 6, 3), 1),
    "R50x2": ((3, 4, 6, 3), 2),
    "R101x1": ((3, 4, 23, 3), 1),
    "R152x1": ((3, 8, 36, 3), 1),
    "R152x2": ((3, 8, 36, 3), 2),
    "R200x3": ((3, 24, 36, 3), 3),
}


def _build_table():
    table = {}
    for name in _PLAIN:
        size, patch = name.split("/")
        table[name] = (VisionTransformer, dict(SIZES[size], patch_size=int(patch)))
    for name, (patch, stages) in _HYBRIDS.items():
        size = name.split("+")[1].split("/")[0]
        table[name] = (
            VisionTransformer, dict(SIZES[size], patch_size=patch, resnet_stages=stages))
    for name, (stages, width) in _RESNETS.items():
        table[name] = (ResNet, dict(stages=stages, width_factor=width))
    return table


VARIANTS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = _build_table()

CHOICES = {
    "classifier": CLASSIFIERS,
    "position_embedding": POSITION_EMBEDDINGS,
    "position_embedding_at": POSITION_PLACES,
    "remat": ("none", *REMAT_POLICIES),
    "attention_implementation": IMPLEMENTATIONS,
    "activation": tuple(ACTIVATIONS),
}
_TIMM_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H",
               "giant": "g", "gigantic": "G"}


def canonical_name(name: str) -> str:
    """Our name of a variant, given ours, Google's (`R50+ViT-B_16`) or timm's
    (`vit_base_r50_s16_384`).

    Raises:
      ValueError: no such variant; the message names the nearest.
    """
    if name in VARIANTS:
        return name
    candidate = name.split(".")[0]  # timm's tag: vit_base_patch16_224.augreg_in21k
    if match := re.fullmatch(
        r"vit_([a-z]+)_(?:(r|r26|r50)_s(\d+)(?:_p8)?|patch(\d+))(?:_\d+)?", candidate
    ):
        size, stem, stride, patch = match.groups()
        stem = f"{stem.upper()}+" if stem else ""
        candidate = f"{stem}{_TIMM_SIZES.get(size, size)}/{stride or patch}"
    else:
        candidate = candidate.replace("ViT-", "").replace("_", "/")
    if candidate in VARIANTS:
        return candidate
    same_letters = [v for v in VARIANTS if v.lower() == candidate.lower()]  # 'b/16' is not S/16
    raise ValueError(
        f"Unknown model variant {name!r}{did_you_mean(candidate, same_letters or VARIANTS)} "
        f"The variants are: {', '.join(VARIANTS)}."
    )


def model_options(name: str) -> set[str]:
    """What `create_model` takes for this model, besides its classes. ValueError if unknown."""
    module, _ = VARIANTS[canonical_name(name)]
    return {f.name for f in dataclasses.fields(module)} - {"num_classes", "parent", "name"}


def create_model(name: str, *, num_classes: int, **overrides) -> nn.Module:
    """Builds a model by name.

    Args:
      name: a key of VARIANTS, or Google's or timm's name of one.
      num_classes: classes of the head; 0 for a model that returns features.
      **overrides: any other field of `VisionTransformer` (or `ResNet`); `dtype` may be a string.

    Returns:
      A Linen module. `model.init(key, images, train=False)` takes float images [B, H, W, 3].

    Raises:
      ValueError: unknown variant, option, or value of an option.
    """
    module, fields = VARIANTS[canonical_name(name)]
    known = model_options(name)
    for key, value in overrides.items():
        if key not in known:
            raise ValueError(
                f"{name} has no option {key!r}{did_you_mean(key, known)} "
                f"The options are: {', '.join(sorted(known))}."
            )
        if key == "remat" and isinstance(value, bool):
            overrides[key] = value = "full" if value else "none"
        if key in CHOICES and value not in CHOICES[key]:
            raise ValueError(
                f"{key}={value!r} is not one of {', '.join(map(repr, CHOICES[key]))}"
                f"{did_you_mean(str(value), CHOICES[key])}"
            )
    if "dtype" in overrides:
        overrides["dtype"] = _float_type(overrides["dtype"])
    return module(num_classes=num_classes, **(fields | overrides))



def _float_type(value):
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        types = ("float32", "bfloat16", "float16")
        raise ValueError(
            f"dtype={value!r} is not one of {', '.join(map(repr, types))}"
            f"{did_you_mean(str(value), types)}"
        )
    return dtype

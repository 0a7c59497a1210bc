"""What each library can express of a model, and the files that tell it how to build it again."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.checkpoints import layouts
from vit_jax.errors import UserError
from vit_jax.models.normalization import EPSILON as LAYER_NORM_EPSILON
from vit_jax.models.resnet import ResNet
from vit_jax.models.variants import VARIANTS

TARGETS = ("npz", "timm", "hf", "torchvision")
LIBRARIES = {"npz": "Google's npz", "timm": "timm", "hf": "Hugging Face's ViT",
             "torchvision": "torchvision's ViT"}

# timm's names, without the resolution, of our variants. A model without a name in timm is built
# from the first entry with the same ResNet, since every size can be overridden.
_TIMM = {
    "vit_base_patch16": "B/16", "vit_tiny_patch16": "Ti/16", "vit_small_patch16": "S/16",
    "vit_small_patch32": "S/32", "vit_base_patch8": "B/8", "vit_base_patch32": "B/32",
    "vit_large_patch16": "L/16", "vit_large_patch32": "L/32", "vit_huge_patch14": "H/14",
    "vit_giant_patch14": "g/14", "vit_gigantic_patch14": "G/14",
    "vit_tiny_r_s16_p8": "R+Ti/16", "vit_small_r26_s32": "R26+S/32", "vit_base_r50_s16": "R50+B/16",
    "vit_large_r50_s32": "R50+L/32",
}  # fmt: skip
_TIMM_AT_384 = {
    "vit_tiny_patch16", "vit_small_patch16", "vit_small_patch32", "vit_base_patch16",
    "vit_base_patch32", "vit_large_patch16", "vit_large_patch32", "vit_tiny_r_s16_p8",
    "vit_small_r26_s32", "vit_base_r50_s16", "vit_large_r50_s32",
}  # fmt: skip


def timm_name(variant: str) -> str | None:
    """timm's name of a variant at 224 pixels; None where it has none."""
    return next((f"{name}_224" for name, ours in _TIMM.items() if ours == variant), None)


def check(
    target: str, model: nn.Module, size: tuple[int, int], channels: int, *,
    match_eps: bool = False, dtype: str = "float32", allow_gelu_change: bool = False,
) -> None:
    """Raises UserError, with the reason, if `target` cannot express this model.

    Args:
      target: one of TARGETS.
      model: what is to be exported.
      size: (height, width) of its images.
      channels: of its images.
      match_eps, dtype, allow_gelu_change: see `export.export_model`.
    """
    if target not in TARGETS:
        raise UserError(f"--to={target} is not one of {', '.join(TARGETS)}.")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise UserError(f"--dtype={dtype} is not one of float32, float16, bfloat16.")
    reason = _impossible(target, model, size, channels)
    if reason:
        raise UserError(f"{LIBRARIES[target]} cannot represent this model: {reason}.")
    if target == "npz" and dtype != "float32":
        raise UserError(f"--dtype={dtype} cannot be used with --to=npz, whose readers expect "
                        "float32.")
    if match_eps and target == "npz":
        raise UserError("--match_eps is for timm; Google's npz has our epsilon already.")
    if match_eps and dtype != "float32":
        raise UserError(f"--match_eps cannot be used with --dtype={dtype}, whose rounding error is "
                        "larger than the difference that --match_eps removes.")
    if target == "torchvision" and model.activation != "gelu" and not allow_gelu_change:
        raise UserError(
            "torchvision's ViT supports only the exact GELU, but this model uses the tanh "
            "approximation; export to timm or hf, or accept slightly different logits with "
            "--allow_gelu_change, which reports by how much they differ."
        )


def _impossible(target, model, size, channels):
    if isinstance(model, ResNet):
        return None if target == "npz" else (
            "it is a convolutional baseline, which only Google's npz (--to=npz) holds")
    if model.classifier in ("unpooled", "token_unpooled"):
        return "it returns logits of every patch (an unpooled classifier)"
    if model.position_embedding == "relative":
        return "its position embeddings are relative"
    if model.position_embedding_at != "stem":
        return "it adds position embeddings in every layer"
    if target == "timm":
        if model.representation_size is not None:
            return ("timm has no representation layer; torchvision has it, and so has hf for a "
                    "model without a head")
        if all(model.resnet_stages != VARIANTS[v][1].get("resnet_stages") for v in _TIMM.values()):
            return f"timm has no hybrid whose ResNet has {model.resnet_stages} bottlenecks a stage"
    if target not in ("hf", "torchvision"):
        return None
    if model.resnet_stages is not None:
        return "it is a hybrid with a ResNet; export it to timm or npz"
    if model.classifier == "gap":
        return "it averages the patches and has no class token; export it to timm or npz"
    if model.register_tokens:
        return "it has register tokens; export it to timm"
    if model.layer_scale is not None:
        return "it has LayerScale; export it to timm"
    if target == "hf" and model.representation_size is not None and model.num_classes:
        return ("ViTForImageClassification has no representation layer before its head; "
                "torchvision's has")
    if target == "torchvision" and (size[0] != size[1] or channels != 3):
        return (f"torchvision takes square images of 3 channels, but this model "
                f"{size[0]}x{size[1]} of {channels}")
    return None


def library_tensors(library: str, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters, by path, under the names and in the layout of timm, hf or torchvision.

    Raises:
      UserError: a parameter has no place there, or a place no parameter.
    """
    entries = list(layouts.LAYOUTS[library].entries(layouts.our_structure(params)))
    placed = {path for entry in entries for path in entry.ours}
    if placed != set(params):
        raise UserError(f"{LIBRARIES[library]} and this model differ in "
                        f"{', '.join(sorted(placed ^ set(params))[:5])}.")
    return {entry.theirs: np.ascontiguousarray(entry.transform.export(
        *(params[path] for path in entry.ours))) for entry in entries}


def timm_architecture(
    model: nn.Module, size: tuple[int, int], channels: int = 3
) -> tuple[str, dict[str, Any]]:
    """(name, arguments) with which `timm.create_model` builds this model."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    bases = {name: VARIANTS[variant][1] for name, variant in _TIMM.items()
             if VARIANTS[variant][1].get("resnet_stages") == model.resnet_stages}
    name = next((n for n, base in bases.items() if all(fields[k] == v for k, v in base.items())),
                next(iter(bases)))
    base = bases[name]
    # No tensor shows the heads and the activation, so they are told even where timm knows them.
    args: dict[str, Any] = {
        "img_size": list(size), "num_heads": model.num_heads, "act_layer": model.activation}
    for ours, theirs in (("patch_size", "patch_size"), ("hidden_size", "embed_dim"),
                         ("num_layers", "depth")):
        if fields[ours] != base[ours]:
            args[theirs] = fields[ours]
    if model.mlp_dim * base["hidden_size"] != base["mlp_dim"] * model.hidden_size:
        args["mlp_ratio"] = _mlp_ratio(model.hidden_size, model.mlp_dim)
    if channels != 3:
        args["in_chans"] = channels
    if model.layer_scale is not None:
        args["init_values"] = model.layer_scale or 1e-5  # 0 would be none at all
    if model.register_tokens:
        args |= {"reg_tokens": model.register_tokens, "no_embed_class": True}
    if model.position_embedding == "none":
        args["pos_embed"] = "none"
    if model.classifier == "gap":  # our LayerNorm comes before the mean
        args |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    resolution = 384 if tuple(size) == (384, 384) and name in _TIMM_AT_384 else 224
    return f"{name}_{resolution}", args


def _mlp_ratio(width, hidden):
    ratio = hidden / width
    while int(width * ratio) < hidden:  # timm rounds down
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def config_files(
    target: str, model: nn.Module, size: tuple[int, int], channels: int,
    preprocessing: Mapping[str, Any], class_names: tuple[str, ...] | None, loss: str | None,
) -> dict[str, dict[str, Any]]:
    """File name -> contents, as JSON, of what lies beside the weights."""
    if target == "timm":
        return {"config.json": _timm_config(model, size, channels, preprocessing, class_names)}
    if target == "torchvision":
        return {"config.json": _torchvision_config(model, size, preprocessing, class_names)}
    return {"config.json": _hf_config(model, size, channels, class_names, loss),
            "preprocessor_config.json": _hf_preprocessor(size, channels, preprocessing)}


def _timm_config(model, size, channels, preprocessing, class_names):
    architecture, args = timm_architecture(model, size, channels)
    first_conv = "patch_embed.proj"
    if model.resnet_stages is not None:
        first_conv = f"patch_embed.backbone.{'stem.' if model.resnet_stages else ''}conv"
    pool = "avg" if model.classifier == "gap" else "token"
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.hidden_size,
        "global_pool": pool,
        **({"label_names": list(class_names)} if class_names else {}),
        "model_args": args,
        "pretrained_cfg": timm_preprocessing(size, channels, preprocessing) | {
            "fixed_input_size": True,
            "pool_size": None,
            "first_conv": first_conv,
            "classifier": "head",
            "num_classes": model.num_classes,
        },
    }


def timm_preprocessing(size, channels, preprocessing) -> dict[str, Any]:
    """Our `preprocessing` in the words of timm's `pretrained_cfg`."""
    squash = preprocessing["crop"] == "squash"
    return {
        "input_size": [channels, *size],
        "interpolation": preprocessing["interpolation"],
        "crop_mode": "squash" if squash else "center",
        "crop_pct": 1.0 if squash else _crop_pct(min(size), resize_to(size, preprocessing)),
        "mean": _per_channel(preprocessing["mean"], channels),
        "std": _per_channel(preprocessing["std"], channels),
    }


def resize_to(size: tuple[int, int], preprocessing: Mapping[str, Any]) -> int:
    """The short side before a central crop; by default 8/7 of the image size, as in training."""
    return preprocessing["resize"] or round(min(size) * 8 / 7)


def _crop_pct(crop, resize):
    fraction = crop / resize
    while math.floor(crop / fraction) < resize:  # which is how timm computes it back
        fraction = math.nextafter(fraction, 0)
    return fraction


def _per_channel(value, channels):
    values = list(value) if isinstance(value, (list, tuple)) else [value] * channels
    if len(values) != channels:
        raise UserError(f"The images have {channels} channels, and their mean or std {len(values)} "
                        f"({values}); give load_model mean= and std= that fit.")
    return [float(x) for x in values]


def _hf_config(model, size, channels, class_names, loss):
    side = size[0] if size[0] == size[1] else list(size)
    config = {
        "architectures": ["ViTForImageClassification" if model.num_classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(model.activation, model.activation),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPSILON,
        "image_size": side,
        "patch_size": model.patch_size,
        "num_channels": channels,
        "qkv_bias": True,
    }
    if model.num_classes:
        # LABEL_i is what Hugging Face itself writes where nobody named the classes.
        names = class_names or [f"LABEL_{i}" for i in range(model.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
        if loss == "sigmoid":
            config["problem_type"] = "multi_label_classification"
    elif model.representation_size is not None:
        config |= {"pooler_output_size": model.representation_size, "pooler_act": "tanh"}
    return config


def _hf_preprocessor(size, channels, preprocessing):
    height, width = size
    result = {
        "do_resize": True,
        "resample": {"bilinear": 2, "bicubic": 3}[preprocessing["interpolation"]],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _per_channel(preprocessing["mean"], channels),
        "image_std": _per_channel(preprocessing["std"], channels),
    }
    if preprocessing["crop"] == "squash":
        return result | {"image_processor_type": "ViTImageProcessor",
                         "size": {"height": height, "width": width}}
    return result | {  # of the processors with a central crop, the plainest
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "size": {"shortest_edge": resize_to(size, preprocessing)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }


def _torchvision_config(model, size, preprocessing, class_names):
    return {
        "architecture": "torchvision.models.VisionTransformer",
        "model_args": {
            "image_size": size[0],
            "patch_size": model.patch_size,
            "num_layers": model.num_layers,
            "num_heads": model.num_heads,
            "hidden_dim": model.hidden_size,
            "mlp_dim": model.mlp_dim,
            "num_classes": model.num_classes,
            "representation_size": model.representation_size,
        },
        **({"label_names": list(class_names)} if class_names else {}),
        "pretrained_cfg": timm_preprocessing(size, 3, preprocessing),
    }

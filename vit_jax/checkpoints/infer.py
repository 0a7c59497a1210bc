"""From the shapes of a checkpoint, and a config beside it, to the fields of a model."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints import libraries
from vit_jax.checkpoints.layouts import BLOCK, POSITIONS, Structure
from vit_jax.checkpoints.report import LoadReport
from vit_jax.errors import UserError
from vit_jax.models.resnet import total_stride
from vit_jax.models.variants import VARIANTS, canonical_name

# Attention heads by width, where a fused or flat query matrix does not show them: DeiT and AugReg's
# Ti and S, the paper's B, L and H, and g and G (arXiv 2106.04560).
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_PILLOWS_FILTERS = dict(enumerate(
    ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")))
_MODEL_TYPES = ("vit", "vit_mae", "vit_msn", "ijepa", "dpt", "flava_image_model")
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
                "gelu_new": "gelu_tanh"}


def num_heads(width: int, config: Mapping[str, Any] | None, report: LoadReport) -> int:
    """The number of attention heads of a file whose tensors do not show it: from its config, or
    from the architecture that the config names, else the usual number for the width.

    Raises:
      UserError: an unknown width, and no config that tells.
    """
    config = config or {}
    told = (config.get("num_attention_heads") or (config.get("model_args") or {}).get("num_heads")
            or _architecture(config).get("num_heads"))
    if told:
        return int(told)
    if width in HEADS:
        report.assumptions.append(f"{HEADS[width]} attention heads, usual for width {width}")
        return HEADS[width]
    raise UserError(
        f"{report.source}: the number of attention heads cannot be told from the shapes, and no "
        f"convention exists for width {width}; pass num_heads=."
    )


def _architecture(config):
    """What the architecture fixes that a timm config names, or {} where it is not known."""
    name = config.get("architecture")
    if not isinstance(name, str):
        return {}
    if name == "torchvision.models.VisionTransformer":
        return {"activation": "gelu"}
    try:
        fields = VARIANTS[canonical_name(name)][1]
    except ValueError:
        return libraries.timm_fields(name)
    return {"num_heads": fields.get("num_heads"), "activation": "gelu"}


def check_architecture(
    config: Mapping[str, Any] | None, structure: Structure, report: LoadReport
) -> None:
    """Refuses architectures that have the same tensors as a Vision Transformer but compute
    something else, for example those with rotary position embeddings.

    Raises:
      UserError: a config that names such an architecture.
    """
    config = config or {}
    kind = config.get("model_type")  # Hugging Face's
    if kind is not None and kind not in _MODEL_TYPES:
        raise UserError(
            f"{report.source}: its config says model_type={kind!r:.80}, which may compute "
            "something else from the same tensors than a VisionTransformer; supported are "
            f"{', '.join(_MODEL_TYPES)}.")
    if kind == "ijepa" and structure.pre_logits:
        raise UserError(f"{report.source}: I-JEPA's pooler reads the first patch, which a "
                        "VisionTransformer here cannot; save the model without its pooler.")
    arguments = config.get("model_args") or {}
    if structure.registers and not structure.class_token and arguments.get("pool_include_prefix"):
        raise UserError(f"{report.source}: its config says pool_include_prefix, a mean that "
                        "includes the registers; a VisionTransformer here averages patches alone.")
    if other := _architecture(config).get("other"):
        raise UserError(
            f"{report.source}: its config names {config['architecture']!r:.80}, timm's {other}, "
            "which computes something else from the tensors than a VisionTransformer (rotary "
            "position embeddings, for example); use it with timm."
        )


def model_fields(params: Mapping[str, np.ndarray], structure: Structure) -> dict[str, Any]:
    """Everything about a `VisionTransformer` that the shapes of our parameters tell."""
    kernel = params["embedding/kernel"]
    block = BLOCK.format(0)
    query = params[f"{block}MultiHeadDotProductAttention_0/query/kernel"]
    fields = dict(
        num_classes=params["head/kernel"].shape[-1] if structure.head else 0,
        patch_size=kernel.shape[0],
        hidden_size=kernel.shape[-1],
        mlp_dim=params[f"{block}MlpBlock_0/Dense_0/kernel"].shape[-1],
        num_heads=query.shape[1],
        num_layers=structure.num_layers,
        resnet_stages=structure.resnet_stages,
        classifier="token" if structure.class_token else "gap",
    )
    if structure.pre_logits:
        fields["representation_size"] = params["pre_logits/kernel"].shape[-1]
    if structure.registers:
        fields["register_tokens"] = params["register_tokens"].shape[1]
    if structure.layer_scale:
        fields["layer_scale"] = 1e-5  # its initial value; the file holds the trained one
    return fields


def position_embedding(
    structure: Structure, config: Mapping[str, Any] | None, report: LoadReport
) -> str:
    """Learned where there is a table. Without one nothing shows; of Google's, only big_vision's
    plain ViTs (arXiv 2205.01580) have none, and they have sincos_2d."""
    if structure.positions:
        if _is_nameless(config, report):
            report.assumptions.append("no rotary position embedding beside the table")
        return "learned_1d"
    if ((config or {}).get("model_args") or {}).get("pos_embed") == "none":
        return "none"
    if (report.dialect == "google" and not structure.class_token
            and structure.resnet_stages is None):
        report.assumptions.append(
            "position_embedding='sincos_2d', which has no parameters, as in big_vision's plain "
            "ViTs; pass position_embedding= to override it")
        return "sincos_2d"
    rotary = ", nor does timm's rotary one, which is not supported here" if (
        report.dialect == "timm") else ""
    report.assumptions.append(
        "position_embedding='none', as the file has no table; pass position_embedding= to override "
        f"it (sincos_2d has no table either{rotary})")
    return "none"


def activation(dialect: str, config: Mapping[str, Any] | None, report: LoadReport) -> str:
    """The MLP's activation: from the config, or from the architecture that it names, else the
    convention of the dialect.

    Raises:
      UserError: an activation that this model does not have.
    """
    config = config or {}
    told = (config.get("hidden_act") or (config.get("model_args") or {}).get("act_layer")
            or _architecture(config).get("activation"))
    if told:
        if told not in _ACTIVATIONS:
            raise UserError(f"{report.source}: its config has the activation {told!r}; supported "
                            f"are {', '.join(_ACTIVATIONS)}.")
        return _ACTIVATIONS[told]
    chosen = "gelu_tanh" if dialect == "google" else "gelu"
    report.assumptions.append(
        f"activation {chosen}, as {'Google' if dialect == 'google' else 'PyTorch'} has it")
    return chosen


def classifier(
    structure: Structure, config: Mapping[str, Any] | None, report: LoadReport
) -> str:
    """What the head sees: the class token where there is one, else the mean of the patches.

    Raises:
      UserError: a config that says something else.
    """
    pool = global_pool(config)
    mine = "token" if structure.class_token else "gap"
    if pool not in (None, "token" if structure.class_token else "avg"):
        has = "has" if structure.class_token else "has no"
        raise UserError(
            f"{report.source}: its config says global_pool={pool!r} and it {has} class token; this "
            "model pools the class token where there is one (token), else the patches (avg)."
        )
    if structure.class_token and pool is None and _is_nameless(config, report):
        report.assumptions.append("the head reads the class token, not a mean of the patches")
    return mine


def global_pool(config: Mapping[str, Any] | None) -> str | None:
    """What timm's config says; its arguments come before what the weights were made with."""
    config = config or {}
    return (config.get("model_args") or {}).get("global_pool", config.get("global_pool"))


def _is_nameless(config, report):
    """Whether this is one of timm's many models, and nothing known says which."""
    return report.dialect == "timm" and not _architecture(config or {})


def with_class_slot(
    params: dict[str, np.ndarray], structure: Structure, told: tuple[int, int] | None,
    asked: tuple[int, int] | None, report: LoadReport,
) -> None:
    """Gives the class token a slot in the position embedding where a file has none (big_vision,
    DeiT III, models with registers): zeros, which is what it got there.

    Args:
      params: by path; changed in place.
      structure: what there is.
      told: rows and columns of patches that the embedding was made for, if known.
      asked: those of the images that the model is wanted for, which may be the same.
      report: knows the name in the file, and is told.
    """
    if not (structure.class_token and structure.positions):
        return
    positions = params[POSITIONS]
    tokens = positions.shape[1]
    patches = [math.prod(grid) for grid in (told, asked) if grid]
    if told and tokens - patches[0] in (0, 1):
        lacks = tokens == patches[0]
    elif _is_square(tokens - 1) or tokens - 1 in patches:
        lacks = False
    else:  # h x (h + 2) patches with a slot are as many as (h + 1) x (h + 1) without
        lacks = tokens in patches or (_is_square(tokens) and _may_lack_slot(report))
    if lacks:
        params[POSITIONS] = np.pad(positions, ((0, 0), (1, 0), (0, 0)))
        report.resized.append((POSITIONS, positions.shape, params[POSITIONS].shape,
                               "a slot of zeros for the class token"))


def without_register_slots(
    params: dict[str, np.ndarray], structure: Structure, told: tuple[int, int] | None,
    asked: tuple[int, int] | None, report: LoadReport,
) -> None:
    """Adds the positions of registers, which timm's models have unless no_embed_class is set, to
    the registers, where they come to the same; arguments as of `with_class_slot`."""
    if not (structure.registers and structure.positions):
        return
    positions, registers = params[POSITIONS], params["register_tokens"]
    first, count = int(structure.class_token), registers.shape[1]
    patches = positions.shape[1] - first - count
    others = [math.prod(grid) for grid in (told, asked) if grid]
    without = {positions.shape[1], positions.shape[1] - first}  # what the patches are otherwise
    if others:
        has_slots = patches in others and not without & set(others)
    else:
        has_slots = _is_square(patches) and not any(map(_is_square, without))
    if has_slots:
        params["register_tokens"] = registers + positions[:, first : first + count]
        params[POSITIONS] = np.delete(positions, np.s_[first : first + count], axis=1)
        report.resized.append((POSITIONS, positions.shape, params[POSITIONS].shape,
                               "the registers' positions added to the registers"))


def _is_square(count):
    return math.isqrt(count) ** 2 == count


def _may_lack_slot(report):
    """Google's own files, Hugging Face's and torchvision's always have it."""
    name = next(theirs for theirs, ours, _ in report.renamed if ours == POSITIONS)
    return report.dialect == "timm" or (
        report.dialect == "google" and not name.endswith("posembed_input/pos_embedding"))


def position_grid(
    params: Mapping[str, np.ndarray], structure: Structure, told: tuple[int, int] | None,
    asked: tuple[int, int] | None, report: LoadReport,
) -> tuple[int, int] | None:
    """(rows, columns) of the patches that the position embedding was made for: as `told`, else a
    square, else those that the model is `asked` for.

    Raises:
      UserError: no square number of patches, and no image size that explains it.
    """
    if not structure.positions:
        return told or asked
    count = params[POSITIONS].shape[1] - structure.class_token
    if told and math.prod(told) == count:
        return told
    side = math.isqrt(count)
    if side * side != count:
        if told is None and asked and math.prod(asked) == count:
            report.assumptions.append(
                f"a grid of {asked[0]}x{asked[1]} patches, as of the image size asked for")
            return asked
        other = told or asked
        raise UserError(
            f"{report.source}: its {count} position embeddings do not form a square grid"
            f"{f', nor one of {other[0]}x{other[1]}' if other else ''}; pass the (height, width) "
            "that it was trained at to load_model as image_size, or as trained_size if image_size "
            "differs."
        )
    report.assumptions.append(f"a square grid of {side}x{side} patches")
    return side, side


def stride(params: Mapping[str, np.ndarray], structure: Structure) -> int:
    """Pixels per side of the image region that one token stands for."""
    stem = 1 if structure.resnet_stages is None else total_stride(structure.resnet_stages)
    return stem * params["embedding/kernel"].shape[0]


def told_image_size(config: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """(height, width) that a timm or Hugging Face config names."""
    config = config or {}
    size = ((config.get("model_args") or {}).get("img_size")
            or (config.get("pretrained_cfg") or {}).get("input_size") or config.get("image_size"))
    if size is None:
        return None
    if isinstance(size, (list, tuple)):
        return tuple(size[-2:])
    return size, size


def preprocessing(
    dialect: str, structure: Structure, size: tuple[int, int],
    config: Mapping[str, Any] | None, preprocessor: Mapping[str, Any] | None, report: LoadReport,
) -> dict[str, Any]:
    """How the model wants its images, in the form of our own checkpoints' `preprocessing`."""
    result = dict(image_size=list(size), crop="squash", resize=None, interpolation="bilinear",
                  antialias=dialect != "google", mean=0.5, std=0.5)
    timm = (config or {}).get("pretrained_cfg")
    if timm:
        result |= dict(mean=list(timm.get("mean", IMAGENET_MEAN)),
                       std=list(timm.get("std", IMAGENET_STD)),
                       interpolation=_interpolation(timm.get("interpolation", "bicubic"), report))
        if timm.get("crop_mode", "center") != "squash":
            result |= dict(crop="center_crop",
                           resize=math.floor(min(size) / timm.get("crop_pct", 0.875)))
    elif preprocessor:
        mean, std = _mean_and_std(preprocessor)
        number = preprocessor.get("resample", 2)
        result |= dict(mean=mean, std=std, interpolation=_interpolation(
            _PILLOWS_FILTERS.get(number, f"filter {number}"), report))
        if preprocessor.get("do_center_crop"):
            result |= dict(crop="center_crop", resize=max(
                _short_side(preprocessor, report) or min(size), min(size)))
    elif dialect == "torchvision":
        # Its own weights above 224, and from scratch at 224. (Of L/16 from scratch it resizes to
        # 242, and SWAG's with a linear head, at 224, take bicubic 224: no file tells.)
        small = min(size) <= 224
        result |= dict(mean=IMAGENET_MEAN, std=IMAGENET_STD, crop="center_crop",
                       resize=round(min(size) * 8 / 7) if small else min(size),
                       interpolation="bilinear" if small else "bicubic")
        report.assumptions.append(
            f"ImageNet's mean and std, {result['interpolation']} resizing to {result['resize']}, a "
            "central crop, as most of torchvision's own weights of this size have them")
    elif dialect == "timm" and not structure.head:
        result |= dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)
        report.assumptions.append(
            "ImageNet's mean and std, as DINO, DINOv2 and MAE have them (there is no head)")
    else:
        report.assumptions.append("mean 0.5 and std 0.5")
    return result


def _short_side(preprocessor, report):
    """What Hugging Face resizes the short side of an image to before its central crop; None if it
    does not say. Its old configs have a number, for the short side or, as DeiT's, for both."""
    size = preprocessor.get("size")
    if not isinstance(size, Mapping):
        return size
    if "height" in size and "width" in size:
        side = min(size["height"], size["width"])
        report.assumptions.append(
            f"the short side resized to {side} before the central crop, in place of both sides to "
            f"{size['height']}x{size['width']}")
        return side
    return size.get("shortest_edge")


def _mean_and_std(preprocessor):
    """Hugging Face's, of pixels times `rescale_factor`, for pixels in [0, 1]."""
    mean, std = (preprocessor.get(key) or [0.5] * 3 for key in ("image_mean", "image_std"))
    if not preprocessor.get("do_normalize", True):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    factor = preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get(
        "do_rescale", True) else 1
    if math.isclose(255 * factor, 1, rel_tol=1e-6):
        return list(mean), list(std)
    return [x / (255 * factor) for x in mean], [x / (255 * factor) for x in std]


def _interpolation(name, report):
    if name in ("bilinear", "bicubic"):
        return name
    report.assumptions.append(f"bicubic resizing in place of the config's {name}")
    return "bicubic"


def loss(config: Mapping[str, Any] | None) -> str | None:
    """'sigmoid' where Hugging Face's config says that classes do not exclude each other."""
    multi = (config or {}).get("problem_type") == "multi_label_classification"
    return "sigmoid" if multi else None


def class_names(config: Mapping[str, Any] | None, count: int) -> tuple[str, ...] | None:
    """Names from a timm or Hugging Face config, if it names every class."""
    config = config or {}
    names = (config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names")
             or config.get("labels"))  # in timm's older files
    if isinstance(names, dict):
        numbers = all(str(key).isdecimal() for key in names)
        names = [names[key] for key in sorted(names, key=int)] if numbers else None
    if config.get("id2label"):
        names = [config["id2label"][key] for key in sorted(config["id2label"], key=int)]
        if all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names):
            return None  # Hugging Face's placeholder
    return tuple(map(str, names)) if names and len(names) == count else None

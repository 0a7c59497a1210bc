"""`load_model`: reads ViT checkpoints in all common formats, and accounts for every tensor."""

import contextlib
import dataclasses
import difflib
import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vit_jax.buckets import refuse_bucket
from vit_jax.checkpoints import epsilon, files, google, infer, layouts, names
from vit_jax.checkpoints.adapt import adapt, flatten, input_channels, nest
from vit_jax.checkpoints.download import download
from vit_jax.checkpoints.report import LoadReport
from vit_jax.checkpoints.resize import POSITION_MODES
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.masked import masked_patch_model
from vit_jax.models.resnet import ResNet
from vit_jax.models.scan import stack_blocks
from vit_jax.models.variants import CHOICES
from vit_jax.models.vit import VisionTransformer
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.state import model_from_json

_ONE_BY_ONE = {"scan_layers": False, "scan_unroll": False}  # blocks as they are on disk


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and its parameters.

    Attributes:
      model: a Linen module.
      params: its parameters, nested dictionaries of float32 arrays; use
        `model.apply({'params': params}, images, train=False)`.
      metadata: `preprocessing` (image_size, crop, resize, interpolation, antialias, mean, std),
        `class_names` (or None), `position_resize` (the mode, if the position embedding was resized
        now, or the one that the run's config.init was read with; else None), `dialect`, and
        `loss`, 'softmax' or 'sigmoid' where a workdir or Hugging Face's problem_type tells (else
        None).
      report: what happened to every tensor.
    """

    model: nn.Module
    params: dict[str, Any]
    metadata: dict[str, Any]
    report: LoadReport


@dataclasses.dataclass
class Contents:
    """A checkpoint in our names, before it is fitted to a model."""

    params: dict[str, np.ndarray]  # by path, as in the file
    fields: dict[str, Any]  # of the model it was made for
    module: type[nn.Module]
    grid: tuple[int, int] | None  # patches that its position embedding was made for
    preprocessing: dict[str, Any]
    class_names: tuple[str, ...] | None
    report: LoadReport
    loss: str | None = None  # that it was trained with
    position_resize: str | None = None  # how its position embedding came to its size, if resized


def load_model(
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    trained_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    position_resize: str = "corner_aligned",
    reset_head: bool = False,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    checkpoint: str = "last",
    ema: bool = False,
    **fields,
) -> Loaded:
    """Loads a model from a file, a directory, a run's workdir, or by name.

    Reads Google's npz in every dialect; timm, DeiT, DINO, DINOv2 and MAE encoders in timm's names;
    Hugging Face ViT directories; torchvision's state dicts; workdirs of `vit_jax.main`. Which one
    it is, is determined from the contents, not from the name.

    Args:
      path: where it is, or a name such as 'augreg:B/16'.
      image_size: (height, width) or one number; the position embedding is resized to it. Default:
        the checkpoint's.
      trained_size: (height, width) that it was trained at, which a file does not show if its grid
        is not square; by default a square is assumed or, if that is impossible, `image_size`.
      channels: of the images, if different from the file's; the first layer is adapted, mean and
        std are averaged.
      position_resize: how the position embedding is resized, see `resize.POSITION_MODES`.
      reset_head: True for a zero head even if the number of classes agrees.
      mean, std: of the pixels in [0, 1], if the file does not contain them.
      checkpoint: 'last' or 'best' of a workdir.
      ema: True for the EMA weights of a run with config.ema_decay.
      **fields: of the model: `num_classes=10`, `dtype='bfloat16'`, `representation_size=None`,
        `num_heads=`, `activation=`, ...

    Raises:
      UserError: unreadable, not a ViT, or tensors that are missing or unexpected.
    """
    image_size, trained_size = _pair("image_size", image_size), _pair("trained_size", trained_size)
    _check_values(fields | {"position_resize": position_resize}, channels)
    contents = read(path, num_heads=fields.get("num_heads"), trained_size=trained_size,
                    image_size=image_size, checkpoint=checkpoint, ema=ema)
    report = contents.report
    known = {f.name for f in dataclasses.fields(contents.module)} - {"parent", "name"}
    for key in fields:
        if key not in known:
            raise UserError(f"load_model has no option {key!r}"
                            f"{did_you_mean(key, known | load_model.__kwdefaults__.keys())}")
    if "dtype" in fields:
        fields["dtype"] = jnp.dtype(fields["dtype"])
    model = contents.module(**(contents.fields | fields))

    old_size = tuple(contents.preprocessing["image_size"])
    if trained_size not in (None, old_size):
        raise UserError(f"trained_size={trained_size}, but {report.source} is of "
                        f"{old_size[0]}x{old_size[1]}; leave it out.")
    size = image_size or old_size
    channels = channels or input_channels(contents.params)
    params = adapt(
        contents.params, model, size, old_grid=contents.grid, report=report, channels=channels,
        position_resize=position_resize, reset_head=reset_head)
    head_is_new = any(path == "head/kernel" for path, *_ in report.reset)
    told = {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
    for key in ("mean", "std"):
        value = contents.preprocessing[key]
        if key not in told and isinstance(value, (list, tuple)) and len(value) != channels:
            told[key] = [sum(value) / len(value)] * channels
            report.assumptions.append(f"{key} {told[key][0]:.4g}, the average over {value}")
    if short_side := contents.preprocessing["resize"]:  # the same share of the image is cropped
        told["resize"] = round(short_side * min(size) / min(old_size))
    metadata = {
        "preprocessing": contents.preprocessing | {"image_size": list(size)} | told,
        "class_names": None if head_is_new else contents.class_names,
        "position_resize": report.position_resize or contents.position_resize,
        "dialect": report.dialect,
        "loss": contents.loss,
    }
    return Loaded(model, _layout(nest(params), model), metadata, report)


def _pair(key, size):
    if size is None:
        return None
    try:
        pair = (size, size) if np.ndim(size) == 0 else tuple(size)
        height, width = map(operator.index, pair)
    except (TypeError, ValueError):
        raise UserError(
            f"{key}={size!r:.80} must be one whole number, or two: (height, width).") from None
    return height, width


def _check_values(given, channels):
    for key, choices in (CHOICES | {"position_resize": POSITION_MODES}).items():
        if key in given and given[key] not in choices:
            raise UserError(f"{key}={given[key]!r} is not one of {', '.join(choices)}"
                            f"{did_you_mean(str(given[key]), choices)}")
    counts = {"channels": channels} | {key: given.get(key) for key in ("num_heads", "patch_size")}
    for key, value in counts.items():
        if value is not None and not _is_count(value):
            raise UserError(f"{key}={value!r} must be a whole number of at least 1.")
    try:
        valid = jnp.issubdtype(jnp.dtype(given.get("dtype", "float32")), jnp.floating)
    except TypeError:
        valid = False
    if not valid:
        raise UserError(f"dtype={given['dtype']!r} is none of float32, bfloat16 and float16.")


def _is_count(value):
    try:
        return operator.index(value) >= 1
    except TypeError:
        return False


def _layout(params, model):
    return stack_blocks(params) if getattr(model, "scan_layers", False) else params


def fit(
    contents: Contents, model: nn.Module, size: tuple[int, int], config,
    class_names: tuple[str, ...] | None = None, reset_head: bool = False,
) -> dict[str, Any]:
    """The parameters of a run's model for images of (height, width), from a checkpoint; with blocks
    stacked if the model scans them. The head is kept if it is of the same classes, by their names
    where the checkpoint has some and `class_names` are given, unless `reset_head`.

    Raises:
      UserError: the checkpoint does not fit the model.
    """
    known = class_names and contents.class_names
    params = adapt(
        contents.params, model, size, old_grid=contents.grid, report=contents.report,
        position_resize=config.init_position_resize, reset_head=reset_head,
        class_names=known and (known, tuple(class_names)))
    return _layout(nest(params), model)


def read(
    path: str | Path, *, num_heads: int | None = None, trained_size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None, checkpoint: str = "last", ema: bool = False,
) -> Contents:
    """Reads a checkpoint into our names; see `load_model`."""
    if checkpoint not in ("last", "best"):
        raise UserError(f"checkpoint={checkpoint!r} is neither 'last' nor 'best'.")
    if names.is_name(str(path)):
        remote = names.resolve(str(path))
        contents = read(download(remote.url), num_heads=num_heads, trained_size=trained_size,
                        image_size=image_size, checkpoint=checkpoint, ema=ema)
        if remote.reason:
            contents.report.assumptions.append(
                f"{path} is {remote.file_name} ({remote.reason})")
        return contents
    refuse_bucket("checkpoint", str(path))
    path = Path(os.path.expanduser(path))
    if _is_workdir(path):
        return _read_workdir(path, checkpoint, ema)
    file = files.read_tensors(path)
    if checkpoint != "last" or ema:
        raise UserError(f"{path} is one checkpoint; only a run's workdir has a best one, and "
                        "EMA weights.")
    report, sizes = LoadReport(str(file.path), ""), (trained_size, image_size)
    try:
        if google.is_google(file.tensors):
            return _read_google(file, report, sizes)
        library = layouts.recognise(file.tensors)
        if library is None:
            examples = ", ".join(f"{name:.80}" for name in list(file.tensors)[:3])
            raise UserError(f"{file.path} does not contain a supported Vision Transformer; its "
                            f"tensors are called {examples}, ...")
        return _read_pytorch(file, library, report, num_heads, sizes)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Shapes that nobody expects, or a config.json of something else.
        settings = ", or the config.json beside it belongs to another file" if file.config else ""
        raise UserError(f"{file.path} is not a supported Vision Transformer{settings} "
                        f"({error}).") from error


def _is_workdir(path):
    try:
        return (path / "checkpoints").is_dir() and (path / "config.json").is_file()
    except OSError as error:
        raise UserError(f"{str(path):.200} cannot be read: {error.strerror}.") from error


def load_masked_model(path: str | Path, *, checkpoint: str = "last", ema: bool = False) -> Loaded:
    """The model with its mask token and predictions, from the workdir of a run with
    config.task='masked_patches'; `load_model` gives what it is for, the features.

    Raises:
      UserError: no such workdir.
    """
    path = Path(os.path.expanduser(path))
    if not _is_workdir(path):
        raise UserError(f"{path} is not the workdir of a run; masked predictions need one with "
                        "config.task='masked_patches'.")
    meta, params, step = _restore_workdir(path, checkpoint, ema)
    if "mask_token" not in params:
        raise UserError(f"{path} was not trained with config.task='masked_patches'.")
    model = masked_patch_model(
        model_from_json(meta["model"]).clone(**_ONE_BY_ONE), meta["config"]["masked"]["target"])
    report = LoadReport(f"{path} step {step}", "vit_jax",
                        renamed=[(name, name, x.shape) for name, x in params.items()])
    metadata = {"preprocessing": meta["preprocessing"], "class_names": None, "loss": None,
                "position_resize": None, "dialect": "vit_jax"}
    return Loaded(model, nest(params), metadata, report)


def _restore_workdir(path, which, ema):
    with contextlib.closing(Checkpoints(path / "checkpoints", writable=False)) as checkpoints:
        step = checkpoints.best_step if which == "best" else checkpoints.last_step
        if step is None:
            none = "complete checkpoint" if checkpoints.last_step is None else (
                "checkpoint that was evaluated; take the last")
            raise UserError(f"{path / 'checkpoints'} holds no {none}.")
        meta = checkpoints.meta(step)
        weights = checkpoints.restore_arrays(step).get("ema_params" if ema else "params")
    if not weights:
        raise UserError(f"{path} has no EMA weights: config.ema_decay was not set for it.")
    params = {name: np.asarray(tensor) for name, tensor in flatten(weights).items()}
    return meta, params, step


def _read_workdir(path, which, ema):
    meta, params, step = _restore_workdir(path, which, ema)
    size = tuple(meta["preprocessing"]["image_size"])
    model = model_from_json(meta["model"])
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)
              if f.name not in ("parent", "name")}
    fields |= _ONE_BY_ONE if "scan_layers" in fields else {}
    if fields.get("attention_implementation") == "cudnn":  # there may be no such GPU here
        fields["attention_implementation"] = "auto"
    dropped = [(name, params.pop(name).shape, "of masked pretraining") for name in list(params)
               if name == "mask_token" or name.startswith("patch_head/")]
    averaged = ", EMA weights" if ema else ""
    report = LoadReport(f"{path} step {step}{averaged}", "vit_jax", dropped=dropped,
                        renamed=[(name, name, x.shape) for name, x in params.items()])
    grid = None
    if isinstance(model, VisionTransformer):
        grid = model.patch_grid(size)
    config = meta["config"]
    return Contents(params, fields, type(model), grid, meta["preprocessing"],
                    tuple(meta["class_names"]), report, loss=config["loss"]["name"],
                    position_resize=config["init_position_resize"] if config["init"] else None)


def _read_google(file, report, sizes):
    report.dialect = "google"
    params, origin, dropped = google.to_ours(file.tensors)
    params = {name: _float32(tensor) for name, tensor in params.items()}
    report.renamed = [(origin[name], name, tensor.shape) for name, tensor in params.items()]
    report.dropped = [(name, file.tensors[name].shape, "not part of the image model")
                      for name in dropped]
    _warn_of_zero_head(params, report)
    if "embedding/kernel" not in params and "conv_root/kernel" in params:
        return _resnet_contents(params, file, report)
    return _contents(params, file, report, sizes)


def _read_pytorch(file, library, report, num_heads, sizes):
    report.dialect = library
    report.dropped += file.dropped
    report.assumptions += file.choices
    tensors = layouts.usual_names(library, file.tensors)
    if len(tensors) < len(file.tensors):
        raise UserError(f"{file.path} holds some tensors twice, under different names.")
    structure = layouts.structure_of(library, tensors)
    infer.check_architecture(file.config, structure, report)
    if not structure.num_layers:
        raise UserError(f"{file.path} has no Transformer blocks of {library}'s names; its tensors "
                        f"are called {', '.join(f'{name:.80}' for name in list(tensors)[:3])}, "
                        "...")
    if "fc_norm.weight" in tensors and infer.global_pool(file.config) == "token":
        # LayerNorm after the class token was picked is LayerNorm before.
        tensors = {re.sub(r"^fc_norm\.", "norm.", name): x for name, x in tensors.items()}
    if "fc_norm.weight" in tensors:
        raise UserError(
            f"{file.path} normalises after pooling (timm's fc_norm); this model, as Google's, "
            "pools after its last LayerNorm, so it cannot give the same numbers.")
    for name in list(tensors):
        if name in ("mask_token", "vit.embeddings.mask_token") or name.startswith(
                ("decoder_", "decoder.")):
            report.dropped.append((name, tensors.pop(name).shape, "of masked pretraining"))
        elif name.startswith("vit.pooler.") and structure.head:
            report.dropped.append((name, tensors.pop(name).shape, "the head does not use it"))
    if structure.head and library == "hf":
        structure = dataclasses.replace(structure, pre_logits=False)
    entries = {e.theirs: e for e in layouts.LAYOUTS[library].entries(structure)}
    _check_names(tensors, entries, file.path)

    config = file.config
    if library == "hf" and structure.pre_logits and (
            (config or {}).get("pooler_act") or "tanh") != "tanh":
        raise UserError(f"{file.path}: its pooler has the activation {config['pooler_act']!r:.40}; "
                        "a representation layer here has tanh.")
    matched = structure.resnet_stages is not None and (config or {}).get(epsilon.MATCHED)
    if structure.resnet_stages is not None:
        report.assumptions.append(
            "kernels rescaled for timm's epsilon by --match_eps, rescaled for Google's again"
            if matched else
            "convolutions standardised by std + 1e-5, as Google does; with timm's sqrt(var + 1e-8) "
            "logits differ by a few 1e-4")
    width = tensors[layouts.LAYOUTS[library].patch_kernel].shape[0]
    heads = num_heads or infer.num_heads(width, config, report)
    if width % heads:
        raise UserError(f"{file.path}: width {width} is not divisible by {heads} heads.")
    params = {}
    for entry in entries.values():
        tensor = _float32(tensors[entry.theirs])
        try:
            parts = entry.transform.load(tensor, heads)
        except ValueError as error:
            raise UserError(f"{file.path}: {entry.theirs} has shape {list(tensor.shape)}, which "
                            f"does not fit a Vision Transformer ({error}).") from None
        for ours, part in zip(entry.ours, parts, strict=True):
            params[ours] = np.ascontiguousarray(part)
            report.renamed.append((entry.theirs, ours, part.shape))
    if matched:
        params = epsilon.as_timm(params)
    _warn_of_zero_head(params, report)
    return _contents(params, file, report, sizes)


def _contents(params, file, report, sizes):
    structure = layouts.our_structure(params)
    block = layouts.BLOCK.format(0)
    for name, axes in (("embedding/kernel", 4), (f"{block}MlpBlock_0/Dense_0/kernel", 2),
                       (f"{block}{layouts.ATTENTION}query/kernel", 3)):
        if name not in params or params[name].ndim != axes:
            problem = f"is {list(params[name].shape)}" if name in params else "does not exist"
            raise UserError(f"{file.path} is not a supported Vision Transformer: {name} "
                            f"{problem}{'' if name in params else _near(name, params)}.")
    height, width = params["embedding/kernel"].shape[:2]
    if height != width:
        raise UserError(f"{file.path} has patches of {height}x{width} pixels; a VisionTransformer "
                        "here has square ones.")
    stride = infer.stride(params, structure)
    trained_size, image_size = sizes
    told_grid, asked_grid = (
        None if size is None else (size[0] // stride, size[1] // stride)
        for size in (trained_size or infer.told_image_size(file.config), image_size))
    infer.without_register_slots(params, structure, told_grid, asked_grid, report)
    infer.with_class_slot(params, structure, told_grid, asked_grid, report)
    grid = infer.position_grid(params, structure, told_grid, asked_grid, report)
    if grid is None:
        report.assumptions.append("images of 224x224; pass image_size= to override it")
    size = (grid[0] * stride, grid[1] * stride) if grid else (224, 224)
    fields = infer.model_fields(params, structure)
    fields["position_embedding"] = infer.position_embedding(structure, file.config, report)
    fields["activation"] = infer.activation(report.dialect, file.config, report)
    fields["classifier"] = infer.classifier(structure, file.config, report)
    told_epsilon = (file.config or {}).get("layer_norm_eps", 1e-6)
    if told_epsilon != 1e-6:
        report.assumptions.append(
            f"LayerNorm epsilon 1e-06 in place of the config's {told_epsilon}")
    return Contents(
        params, fields, VisionTransformer, grid,
        infer.preprocessing(
            report.dialect, structure, size, file.config, file.preprocessor, report),
        infer.class_names(file.config, fields["num_classes"]), report,
        loss=infer.loss(file.config))


def _resnet_contents(params, file, report):
    structure = layouts.our_structure(params)
    head = params.get("head/kernel")
    fields = dict(num_classes=0 if head is None else head.shape[-1],
                  stages=structure.resnet_stages,
                  width_factor=params["conv_root/kernel"].shape[-1] // 64)
    return Contents(
        params, fields, ResNet, None,
        infer.preprocessing("google", structure, (224, 224), None, None, report), None, report)


def _check_names(tensors, entries, path):
    missing = [name for name in entries if name not in tensors]
    surplus = [name for name in tensors if name not in entries]
    lines = [f"missing {name}" + _near(name, surplus) for name in missing]
    lines += [f"unexpected {name} {list(tensors[name].shape)}" + _near(name, entries)
              for name in surplus]
    if lines:
        shown = lines[:8] + ([f"... and {len(lines) - 8} more"] if len(lines) > 8 else [])
        raise UserError(f"{path} differs from the Vision Transformers that are supported:\n  "
                        + "\n  ".join(shown))


def _near(name, others):
    close = difflib.get_close_matches(name, list(others), n=1)
    return f", nearest: {close[0]}" if close else ""


def _float32(tensor):
    return np.asarray(tensor).astype(np.float32)


def _warn_of_zero_head(params, report):
    head = params.get("head/kernel")
    if head is not None and not head.any():
        report.warnings.append(
            "the head is all zeros, as in Google's ImageNet-21k files: every class scores the same "
            "until it is trained")

"""`load_model`: any ViT checkpoint that people have, with an account of every tensor."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoints import files, google, infer, layouts, names
from vit_jax.checkpoints.adapt import adapt, flatten, nest
from vit_jax.checkpoints.download import download
from vit_jax.checkpoints.report import LoadReport
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.resnet import ResNet
from vit_jax.models.scan import stack_blocks
from vit_jax.models.vit import VisionTransformer
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.state import model_from_json

# What `load_model` takes beside the fields of the model.
_OPTIONS = {"image_size", "channels", "position_resize", "reset_head", "mean", "std", "checkpoint"}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and its parameters.

    Attributes:
      model: a Linen module.
      params: its parameters, nested dictionaries of float32 arrays; use
        `model.apply({'params': params}, images, train=False)`.
      metadata: `preprocessing` (image_size, crop, resize, interpolation, antialias, mean, std),
        `class_names` (or None), `position_resize` (or None), `dialect`.
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


def load_model(path: str | Path, **overrides) -> Loaded:
    """Loads a model from a file, a directory, a run's workdir, or by name.

    Reads Google's npz in every dialect; timm, DeiT, DINO, DINOv2 and MAE encoders in timm's names;
    Hugging Face ViT directories; torchvision's state dicts; workdirs of `vit_jax.main`. Which one
    it is shows in the contents, not in the name.

    Args:
      path: where it is, or a name such as 'augreg:B/16'.
      **overrides: fields of the model (`num_classes=10`, `dtype='bfloat16'`,
        `representation_size=None`, `num_heads=`, `activation=`, ...); and
        image_size: (height, width) or one number; the position embedding is resized,
        position_resize: how, see `resize.POSITION_MODES`; the default is 'corner_aligned',
        channels: of the images; the first layer is adapted,
        reset_head: True for a zero head even where the number of classes agrees,
        mean, std: of the pixels in [0, 1], where the file does not tell,
        checkpoint: 'last' (default) or 'best' of a workdir.

    Raises:
      UserError: unreadable, not a ViT, or tensors that are missing or left over.
    """
    options = {key: overrides.pop(key) for key in list(overrides) if key in _OPTIONS}
    contents = read(path, num_heads=overrides.get("num_heads"),
                    image_size=options.get("image_size"),
                    checkpoint=options.get("checkpoint", "last"))
    report = contents.report
    known = {f.name for f in dataclasses.fields(contents.module)} - {"parent", "name"}
    for key in overrides:
        if key not in known:
            raise UserError(f"load_model has no option {key!r}"
                            f"{did_you_mean(key, known | _OPTIONS)}")
    if "dtype" in overrides:
        overrides["dtype"] = jnp.dtype(overrides["dtype"])
    model = contents.module(**(contents.fields | overrides))

    size = options.get("image_size", contents.preprocessing["image_size"])
    size = (size, size) if isinstance(size, int) else tuple(size)
    before = len(report.resized)
    params = adapt(
        contents.params, model, size, old_grid=contents.grid, report=report,
        channels=options.get("channels", 3),
        position_resize=options.get("position_resize", "corner_aligned"),
        reset_head=options.get("reset_head", False))
    resized = any(path == layouts.POSITIONS for path, *_ in report.resized[before:])
    head_is_new = any(path == "head/kernel" for path, *_ in report.reset)
    told = {key: options[key] for key in ("mean", "std") if key in options}
    metadata = {
        "preprocessing": contents.preprocessing | {"image_size": list(size)} | told,
        "class_names": None if head_is_new else contents.class_names,
        "position_resize": options.get("position_resize", "corner_aligned") if resized else None,
        "dialect": report.dialect,
    }
    return Loaded(model, _layout(nest(params), model), metadata, report)


def _layout(params, model):
    return stack_blocks(params) if getattr(model, "scan_layers", False) else params


def fit(contents: Contents, model: nn.Module, size: tuple[int, int], config) -> dict[str, Any]:
    """The parameters of a run's model for images of (height, width), from the checkpoint that
    `config.init` names; with blocks stacked if the model scans them.

    Raises:
      UserError: the checkpoint does not fit the model.
    """
    params = adapt(
        contents.params, model, size, old_grid=contents.grid, report=contents.report,
        position_resize=config.init_position_resize, reset_head=config.init_head == "reset")
    return _layout(nest(params), model)


def read(
    path: str | Path, *, num_heads: int | None = None, image_size=None, checkpoint: str = "last"
) -> Contents:
    """Reads a checkpoint into our names; see `load_model`."""
    if names.is_name(str(path)):
        path = download(names.resolve(str(path)).url)
    path = Path(path).expanduser()
    if (path / "checkpoints").is_dir() and (path / "config.json").is_file():
        return _read_workdir(path, checkpoint)
    file = files.read_tensors(path)
    report = LoadReport(str(file.path), "")
    if google.is_google(file.tensors):
        return _read_google(file, report, image_size)
    library = layouts.recognise(file.tensors)
    if library is None:
        examples = ", ".join(list(file.tensors)[:3])
        raise UserError(f"{file.path} holds no Vision Transformer that is known here; its tensors "
                        f"are called {examples}, ...")
    return _read_pytorch(file, library, report, num_heads, image_size)


def _read_workdir(path, which):
    checkpoints = Checkpoints(path / "checkpoints", writable=False)
    step = checkpoints.best_step if which == "best" else checkpoints.last_step
    if step is None:
        raise UserError(f"{path / 'checkpoints'} holds no complete checkpoint.")
    meta = checkpoints.meta(step)
    params = {name: np.asarray(tensor)
              for name, tensor in flatten(checkpoints.restore_arrays(step)["params"]).items()}
    checkpoints.close()
    size = tuple(meta["preprocessing"]["image_size"])
    model = model_from_json(meta["model"])
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)
              if f.name not in ("parent", "name")}
    fields |= {"scan_layers": False} if "scan_layers" in fields else {}
    report = LoadReport(f"{path} step {step}", "vit_jax",
                        renamed=[(name, name, x.shape) for name, x in params.items()])
    grid = None
    if isinstance(model, VisionTransformer):
        stride = model.patch_size * model.stem_stride
        grid = (size[0] // stride, size[1] // stride)
    return Contents(params, fields, type(model), grid, meta["preprocessing"],
                    tuple(meta["class_names"]), report)


def _read_google(file, report, image_size):
    report.dialect = "google"
    params, origin, dropped = google.to_ours(file.tensors)
    params = {name: _float32(tensor) for name, tensor in params.items()}
    report.renamed = [(origin[name], name, tensor.shape) for name, tensor in params.items()]
    report.dropped = [(name, file.tensors[name].shape, "not part of the image model")
                      for name in dropped]
    _warn_of_zero_head(params, report)
    if "embedding/kernel" not in params:
        return _resnet_contents(params, file, report)
    return _contents(params, file, report, image_size)


def _read_pytorch(file, library, report, num_heads, image_size):
    report.dialect = library
    tensors = layouts.usual_names(library, file.tensors)
    structure = layouts.structure_of(library, tensors)
    if not structure.num_layers:
        raise UserError(f"{file.path} has no Transformer blocks.")
    if "mask_token" in tensors:  # DINOv2 and BEiT keep it for pretraining
        report.dropped.append(
            ("mask_token", tensors.pop("mask_token").shape, "of masked pretraining"))
    pooler = [name for name in tensors if name.startswith("vit.pooler.")]
    if structure.head and pooler:
        structure = dataclasses.replace(structure, pre_logits=False)
    entries = {e.theirs: e for e in layouts.LAYOUTS[library].entries(structure)}
    _check_names(tensors, entries, file.path)

    config = file.config
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
            raise UserError(f"{file.path}: {entry.theirs} has shape {list(tensor.shape)}, which is "
                            f"none of a Vision Transformer ({error}).") from None
        for ours, part in zip(entry.ours, parts, strict=True):
            params[ours] = np.ascontiguousarray(part)
            report.renamed.append((entry.theirs, ours, part.shape))
    _warn_of_zero_head(params, report)
    return _contents(params, file, report, image_size)


def _contents(params, file, report, image_size):
    structure = layouts.our_structure(params)
    stride = infer.stride(params, structure)
    told = infer.told_image_size(file.config)
    if told is None and image_size is not None:
        told = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    told_grid = None if told is None else (told[0] // stride, told[1] // stride)
    infer.with_class_slot(params, structure, told_grid)
    grid = infer.position_grid(params, structure, told_grid, report)
    size = (grid[0] * stride, grid[1] * stride) if grid else (224, 224)
    fields = infer.model_fields(params, structure)
    fields["activation"] = infer.activation(report.dialect, file.config, report)
    if (file.config or {}).get("global_pool") == "avg":
        fields["classifier"] = "gap"
    return Contents(
        params, fields, VisionTransformer, grid,
        infer.preprocessing(
            report.dialect, structure, size, file.config, file.preprocessor, report),
        infer.class_names(file.config, fields["num_classes"]), report)


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
    lines += [f"left over {name} {list(tensors[name].shape)}" + _near(name, entries)
              for name in surplus]
    if lines:
        shown = lines[:8] + ([f"... and {len(lines) - 8} more"] if len(lines) > 8 else [])
        raise UserError(f"{path} is not quite a Vision Transformer as it is known here:\n  "
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

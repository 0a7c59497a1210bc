"""From a loaded model to a directory of timm, Hugging Face or torchvision, or to Google's npz.

What is written is checked with the library itself before it gets its name; see `verify`.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import ml_dtypes
import numpy as np
import safetensors.numpy

import vit_jax
from vit_jax.checkpoints import card, epsilon, google, output, targets
from vit_jax.checkpoints.adapt import flatten, input_channels
from vit_jax.checkpoints.layouts import POSITIONS
from vit_jax.checkpoints.load import Loaded
from vit_jax.checkpoints.output import REPORT
from vit_jax.checkpoints.verify import (
    Verification,
    difference,
    function,
    random_images,
    read_images,
    verify,
)
from vit_jax.errors import UserError
from vit_jax.models.positions import sincos_2d
from vit_jax.models.resnet import ResNet
from vit_jax.models.scan import unstack_blocks
from vit_jax.models.vit import VisionTransformer
from vit_jax.training.state import model_to_json

Params = dict[str, np.ndarray]  # by path
_EPSILON = "timm's epsilon in standardised convolutions (not with --match_eps)"
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass
class ExportReport:
    """What was exported, and how; `str(report)` is human-readable.

    Attributes:
      source: what was loaded.
      target: one of `targets.TARGETS`.
      path: what was written: a directory, or the npz file.
      parameters: arrays of the model.
      tensors: in the file.
      numbers: in these tensors.
      dtype: of the tensors.
      changes: how the target's form differs from ours; the outputs stay the same.
      effects: name -> {max_difference, mean_difference, top1} of the logits, for what was accepted
        although it changes the outputs.
      warnings: what to know before using it.
      model, preprocessing, class_names, loss: what was exported.
      load: the load report, line by line.
      verification: whether the library computes the same.
    """

    source: str
    target: str
    path: str
    parameters: int
    tensors: int
    numbers: int
    dtype: str
    changes: list[str]
    effects: dict[str, dict[str, Any]]
    warnings: list[str]
    model: dict[str, Any]
    preprocessing: dict[str, Any]
    class_names: tuple[str, ...] | None
    loss: str | None
    load: list[str]
    verification: Verification

    def to_json(self) -> dict[str, Any]:
        """The contents of `conversion_report.json`."""
        versions = {"vit_jax": vit_jax.__version__}
        for name in ("jax", "flax", "numpy", "safetensors", "torch", "timm", "transformers",
                     "torchvision"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        result = dataclasses.asdict(self) | {"versions": versions}
        del result["path"]  # it is read beside the export, wherever that was moved
        return result

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.parameters} parameters in {self.tensors} tensors for "
                 f"{targets.LIBRARIES[self.target]}, {self.numbers:,} numbers in {self.dtype}"]
        lines += [f"  changed  {text}" for text in self.changes]
        lines += [f"  effect   {effect_line(name, effect)}"
                  for name, effect in self.effects.items()]
        lines += [f"  warning: {text}" for text in self.warnings]
        return "\n".join([*lines, str(self.verification)])


def effect_line(name: str, effect: dict[str, Any]) -> str:
    """An entry of `ExportReport.effects` in words."""
    return (f"{name}: logits move by {effect['max_difference']:.1e} at most, "
            f"{effect['mean_difference']:.1e} on average; top-1 stays for {effect['top1']} of "
            f"{effect['images']} images")


class VerificationFailed(UserError):
    """The export does not compute what the model does; `report` has the numbers."""

    def __init__(self, message: str, report: ExportReport):
        super().__init__(message)
        self.report = report


def export_model(
    loaded: Loaded,
    target: str,
    out: str | Path,
    *,
    match_eps: bool = False,
    dtype: str = "float32",
    allow_gelu_change: bool = False,
    check: bool = True,
    images: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> ExportReport:
    """Writes a model in another library's form, and checks it there before it gets its name.

    Args:
      loaded: what `load_model` returned.
      target: 'timm', 'hf' or 'torchvision' for a directory, 'npz' for a file.
      out: its path. It must not exist, or be an empty directory.
      match_eps: rescales a hybrid's standardised kernels so that timm's epsilon gives our numbers
        (the default leaves the weights as they are, which further training wants).
      dtype: of the tensors: 'float32', 'float16' or 'bfloat16'.
      allow_gelu_change: exports tanh GELU to torchvision, which has exact GELU.
      check: compares the outputs, if the library is installed.
      images: files or folders to compare on, beside the random images.
      overwrite: replaces an earlier export (and nothing else).

    Raises:
      UserError: the target cannot express the model, `out` exists, an image is unreadable.
      VerificationFailed: the library computes something else; the export is kept as OUT.failed.
    """
    preprocessing = dict(loaded.metadata["preprocessing"])
    size = tuple(preprocessing["image_size"])
    model = loaded.model.clone(scan_layers=False) if hasattr(loaded.model, "scan_layers") \
        else loaded.model
    params = {path: np.asarray(x, np.float32)
              for path, x in flatten(unstack_blocks(loaded.params)).items()}
    channels = input_channels(params)
    targets.check(target, model, size, channels, match_eps=match_eps, dtype=dtype,
                  allow_gelu_change=allow_gelu_change)
    out = Path(os.path.realpath(os.path.expanduser(out)))
    output.check_out(out, target, overwrite)
    if images and channels != 3:
        raise UserError(f"--images have 3 channels, but this model takes {channels}.")
    class_names = loaded.metadata.get("class_names")
    if class_names and len(class_names) != model.num_classes:
        class_names = None  # features of a model whose head was taken off
    batch = random_images(size, channels)
    given = read_images(images, preprocessing) if images else batch[:0]
    batch = np.concatenate([batch, given])

    changes: list[str] = []
    form, placed = _as_target_has_it(model, params, target, size, changes)
    placed = {path: _rounded(path, x, dtype) for path, x in placed.items()}
    matched = match_eps and bool(epsilon.standardised(placed))
    tensors = _tensors(target, form, placed, match_eps, changes)
    expected, expected_params, effects = model, params, {}
    if dtype != "float32":
        # The file is compared with a model that was rounded in the same way.
        expected = form
        expected_params = {path: x.astype(np.float32) for path, x in placed.items()}
        effects[f"rounding to {dtype}"] = _effect(
            (model, params), (expected, expected_params), batch)
    if getattr(model, "resnet_stages", None) is not None and not match_eps:
        # Of this one epsilon, what is written is compared with a model that has timm's.
        timms = epsilon.as_timm(expected_params)
        effect = _effect((expected, expected_params), (expected, timms), batch)
        if target == "timm":
            effects[_EPSILON] = effect
        expected_params = timms
    if target == "torchvision" and model.activation != "gelu":
        exact = expected.clone(activation="gelu")
        effects["exact GELU instead of tanh"] = _effect(
            (expected, expected_params), (exact, expected_params), batch)
        expected = exact

    report = ExportReport(
        source=loaded.report.source, target=target, path=str(out),
        parameters=len(params), tensors=len(tensors),
        numbers=sum(x.size for x in tensors.values()), dtype=dtype, changes=changes,
        effects=effects,
        warnings=_warnings(target, model, params, loaded.metadata, class_names),
        model=model_to_json(model), preprocessing=preprocessing,
        class_names=class_names, loss=loaded.metadata.get("loss"),
        load=str(loaded.report).splitlines(), verification=Verification(reason="not asked for"))
    with output.temporary(out) as temporary:
        if target == "npz":
            with temporary.open("wb") as file:  # np.savez would append .npz to a name
                np.savez(file, **tensors)
        else:
            _write_directory(temporary, report, model, tensors, size, channels, matched)
        if check:
            report.verification = verify(
                target, temporary, placed if target == "npz" else tensors, expected,
                expected_params, batch, given=len(given))
        failed = report.verification.status == "FAIL"
        final = output.name_of_failure(out) if failed else out
        report.path = str(final)
        _write_account(temporary, final, report)
        output.move(temporary, final)
    if failed:
        raise VerificationFailed(
            f"The exported model does not reproduce the original: {report.verification.reason}. "
            f"It was saved as {final} instead of {out}.", report)
    return report


def _as_target_has_it(
    model: nn.Module, params: Params, target: str, size: tuple[int, int], changes: list[str]
) -> tuple[nn.Module, Params]:
    """The same function with the parameters that the target has places for."""
    params = dict(params)
    if not isinstance(model, VisionTransformer):
        return model, params
    prefix = int(model.classifier == "token")
    kind = model.position_embedding
    grid = model.patch_grid(size)
    if kind == "learned_2d":
        rows, columns = (params.pop(f"Transformer/posembed_input/{name}_embedding")
                         for name in ("row", "column"))
        table = np.concatenate([np.repeat(rows, grid[1], axis=1),
                                np.tile(columns, (1, grid[0], 1))], axis=-1)
    elif kind == "sincos_2d":
        table = np.asarray(sincos_2d(*grid, model.hidden_size))[None]
    elif kind == "none" and target != "timm":
        table = np.zeros((1, grid[0] * grid[1], model.hidden_size), np.float32)
    else:
        table = None
    if table is not None:
        params[POSITIONS] = np.pad(table, ((0, 0), (prefix, 0), (0, 0)))
        model = model.clone(position_embedding="learned_1d")
        changes.append(f"the position embedding ({kind}) became the learned 1-D table of its values"
                       + (", zeros" if kind == "none" else ""))
    if target == "timm" and model.register_tokens and prefix and POSITIONS in params:
        # timm's models with registers have positions for the patches alone.
        positions = params[POSITIONS]
        params["cls"] = params["cls"] + positions[:, :1]
        params[POSITIONS] = np.concatenate(
            [np.zeros_like(positions[:, :1]), positions[:, 1:]], axis=1)
        changes.append("the class token's position was added to the class token, as timm has it in "
                       "models with registers")
    return model, params


def _tensors(target, model, params, match_eps, changes) -> Params:
    """The parameters under the target's names and in its layout."""
    if target == "npz":
        return google.classic(params)
    if match_eps:
        names = epsilon.standardised(params)
        params = epsilon.for_timm(params)
        changes.append(f"{len(names)} standardised kernels were rescaled to timm's epsilon"
                       if names else "--match_eps changed nothing: no kernel is standardised")
    tensors = targets.library_tensors(target, params)
    if target == "timm" and model.register_tokens and "cls" in params and POSITIONS in params:
        tensors["pos_embed"] = np.ascontiguousarray(tensors["pos_embed"][:, 1:])
    if target == "hf" and not model.num_classes:  # ViTModel, without the name of a head's backbone
        tensors = {name.removeprefix("vit."): x for name, x in tensors.items()}
    return tensors


def _rounded(path, tensor, dtype):
    with np.errstate(over="ignore"):
        result = tensor.astype(_DTYPES[dtype])
    if np.isfinite(tensor).all() and not np.isfinite(result).all():
        raise UserError(f"{path} has values up to {np.abs(tensor).max():.3g}, too large for "
                        f"--dtype={dtype}; use bfloat16.")
    return result


def _effect(before, after, images):
    effect = difference(function(*before)(images), function(*after)(images))
    return effect | {"images": len(images)}


def _warnings(target, model, params, metadata, class_names):
    warnings, preprocessing = [], metadata["preprocessing"]
    if metadata.get("loss") == "sigmoid" and target != "hf":  # whose config tells
        warnings.append("it was trained with a sigmoid loss: the probability of a class is the "
                        "sigmoid of its logit, not a softmax")
    if "head/kernel" in params and not params["head/kernel"].any():
        warnings.append("the head is all zeros: every class scores the same until it is trained")
    if target != "npz":
        if not preprocessing["antialias"]:
            warnings.append("the model's images were resized without a low-pass filter (antialias);"
                            " PyTorch's transforms resize with one")
        height, width = preprocessing["image_size"]
        if target == "hf" and preprocessing["crop"] != "squash" and height != width:
            warnings.append("the image processor resizes the short side of an image, here the side "
                            f"that is short relative to {height}x{width} is resized")
        return warnings
    return warnings + _lost_in_npz(model, preprocessing, class_names)


def _lost_in_npz(model, preprocessing, class_names):
    """What the tensors do not show, where a reader of the file would assume something else."""
    warnings = []
    if getattr(model, "activation", "gelu_tanh") != "gelu_tanh":
        warnings.append("an npz does not store the activation; load it with activation="
                        f"'{model.activation}', which is not Google's")
    height, width = preprocessing["image_size"]
    if height != width:
        option = "image_size" if isinstance(model, ResNet) else "trained_size"
        warnings.append("an npz does not store the image size, and a square would be assumed; load "
                        f"it with {option}=({height}, {width})")
    mean, std = preprocessing["mean"], preprocessing["std"]
    if np.any(np.not_equal(mean, 0.5)) or np.any(np.not_equal(std, 0.5)):
        warnings.append("an npz does not store mean and std, and 0.5 would be assumed for both; "
                        f"load it with mean={mean}, std={std}")
    taken = dict(crop="squash", interpolation="bilinear", antialias=False)
    if lost := [f"{key}={preprocessing[key]}, where {value} would be assumed"
                for key, value in taken.items() if preprocessing[key] != value]:
        warnings.append("an npz does not store how images were resized, and load_model has no "
                        f"option for it ({'; '.join(lost)}); NAME.{REPORT} beside NAME has it")
    if class_names:
        warnings.append(f"an npz cannot hold the names of the {len(class_names)} classes, and no "
                        f"option of load_model takes them; NAME.{REPORT} beside NAME has them")
    for part, none in (("register_tokens", 0), ("layer_scale", None)):
        if getattr(model, part, none) != none:
            warnings.append(f"only vit_jax reads {part.replace('_', ' ')} from an npz")
    return warnings


def _write_directory(path, report, model, tensors, size, channels, matched):
    path.mkdir()
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    files = targets.config_files(
        report.target, model, size, channels, report.preprocessing, report.class_names,
        report.loss)
    if matched:
        files["config.json"][epsilon.MATCHED] = True
    for name, contents in files.items():
        _write_json(path / name, contents)
    # safetensors writes a private file, which others could not read beside its config.
    shutil.copymode(path / "config.json", path / "model.safetensors")
    if report.class_names:
        _write_json(path / "class_names.json", list(report.class_names))


def _write_account(temporary, final, report):
    """The report and the card, of an npz the report beside it."""
    if report.target == "npz":
        beside = output.beside(final)
        with output.temporary(beside) as part:
            _write_json(part, report.to_json())
            part.replace(beside)
        return
    _write_json(temporary / REPORT, report.to_json())
    config = json.loads((temporary / "config.json").read_text())
    (temporary / "README.md").write_text(
        card.model_card(report, config), encoding="utf-8", errors="replace")


def _write_json(path, value):
    # As ASCII, so that file and class names survive even if they are not valid Unicode.
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

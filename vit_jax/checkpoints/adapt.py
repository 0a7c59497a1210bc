"""Fits loaded parameters to a model: another resolution, patch, number of channels or classes."""

import difflib
import functools

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints import resize
from vit_jax.checkpoints.layouts import POSITIONS
from vit_jax.checkpoints.report import LoadReport
from vit_jax.data.imagenet import same_classes
from vit_jax.errors import UserError
from vit_jax.models.shapes import params_shapes

Params = dict[str, np.ndarray]  # by path

# {'head': {'kernel': x}} to {'head/kernel': x}, and back.
flatten = functools.partial(flatten_dict, sep="/")
nest = functools.partial(unflatten_dict, sep="/")


def input_channels(params: Params) -> int:
    """Channels of the images that a model with these parameters, by path, takes."""
    return params["conv_root/kernel" if "conv_root/kernel" in params else "embedding/kernel"
                  ].shape[2]


def expected_shapes(model: nn.Module, size: tuple[int, int], channels: int) -> dict[str, tuple]:
    """Path -> shape of the model's parameters for images of (height, width), blocks unstacked.

    Raises:
      UserError: the model cannot take such images, or its sizes contradict each other.
    """
    if getattr(model, "scan_layers", False):
        model = model.clone(scan_layers=False, scan_unroll=False)
    try:
        tree = params_shapes(model, size, channels)
    except (TypeError, ValueError) as error:
        raise UserError(f"{str(error)[:1].upper()}{str(error)[1:]}") from None
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def adapt(
    params: Params,
    model: nn.Module,
    size: tuple[int, int],
    *,
    old_grid: tuple[int, int] | None,
    report: LoadReport,
    channels: int = 3,
    position_resize: str = "corner_aligned",
    reset_head: bool = False,
    class_names: tuple[tuple[str, ...], tuple[str, ...]] | None = None,
) -> Params:
    """Returns exactly the parameters that the model needs.

    Args:
      params: what a checkpoint held.
      model: what they are wanted for.
      size: (height, width) of its images.
      old_grid: rows and columns of the patches the position embedding was made for.
      report: is told of everything that changes.
      channels: of its images.
      position_resize: one of `resize.POSITION_MODES`.
      reset_head: replaces the head even where the number of classes agrees.
      class_names: those of the checkpoint and those that are wanted, where both are known. The
        head is brought into the order of the latter, or replaced if they are others.

    Raises:
      UserError: tensors are missing or unexpected; the message names them and the nearest match.
    """
    params = dict(params)
    wanted = expected_shapes(model, size, channels)

    drops_representation = "pre_logits/kernel" in params and "pre_logits/kernel" not in wanted
    if drops_representation:
        _drop(params, ("pre_logits/kernel", "pre_logits/bias"), "no representation layer asked for",
              report)
    why = "asked for" if reset_head else (
        "it belonged to the representation layer" if drops_representation else None)
    _fit_head(params, wanted, model, why, class_names, report)
    if "cls" in params and "cls" not in wanted:
        _drop(params, ("cls",), "the model has no class token", report)
        if POSITIONS in params:
            old = params[POSITIONS].shape
            params[POSITIONS] = params[POSITIONS][:, 1:]
            report.resized.append(
                (POSITIONS, old, params[POSITIONS].shape, "without the class token's slot"))
    if POSITIONS in params and POSITIONS not in wanted:
        _drop(params, (POSITIONS,), "the model has no learned 1-D position embedding", report)

    for path, tensor in params.items():
        shape = wanted.get(path)
        if path.endswith("/relative_embedding") and old_grid != model.patch_grid(size):
            raise UserError(
                f"{report.source} has relative position embeddings of {old_grid[0]}x{old_grid[1]} "
                f"patches, which cannot be resized; keep its image size.")
        if path.endswith(("/row_embedding", "/column_embedding")) and shape not in (
                None, tensor.shape):
            raise UserError(f"{report.source} has learned_2d position embeddings, which cannot be "
                            "resized; keep its image size.")
        is_positions = path.endswith("/posembed_input/pos_embedding")  # at the stem or in a block
        if is_positions:
            prefix = int("cls" in params)
            new_grid = model.patch_grid(size)
        # 4 x 4 and 2 x 8 patches are as many, and yet another grid.
        other_grid = is_positions and old_grid not in (None, new_grid)
        if shape is None or (tensor.shape == shape and not other_grid):
            continue
        how = None
        if is_positions:
            tensor = resize.resize_position_embedding(
                tensor, old_grid=old_grid, new_grid=new_grid, prefix=prefix, mode=position_resize)
            how = f"position embedding, {position_resize}"
            report.position_resize = position_resize
        elif path in ("embedding/kernel", "conv_root/kernel"):
            how = []
            if tensor.shape[2] != shape[2] and path == _first_layer(wanted):
                tensor = resize.adapt_input_channels(tensor, shape[2])
                how.append("input channels")
                if path == "conv_root/kernel":
                    report.warnings.append(
                        "the first convolution is standardised, so with other input channels the "
                        "model computes something else, also of grey images; train it further")
            if tensor.shape[:2] != shape[:2] and path == "embedding/kernel":
                tensor = resize.resize_patch_kernel(tensor, shape[:2])
                how.append("patch kernel, pseudo-inverse")
            how = " and ".join(how)
        if how and tensor.shape == shape:
            report.resized.append((path, params[path].shape, shape, how))
            params[path] = tensor

    _check_complete(params, wanted, report)
    return params


def _first_layer(wanted):
    return "conv_root/kernel" if "conv_root/kernel" in wanted else "embedding/kernel"


def _fit_head(params, wanted, model, why, class_names, report):
    names = ("head/kernel", "head/bias")
    if names[0] not in wanted:
        _drop(params, names, "features are asked for, not classes", report)
        return
    have = params.get(names[0])
    if have is None:
        why = "the file has no head"
    elif have.shape[-1] != wanted[names[0]][-1]:
        why = f"{have.shape[-1]} classes in the file, {wanted[names[0]][-1]} in the model"
    elif why is None and class_names and not same_classes(*class_names):
        theirs, ours = class_names
        if sorted(theirs) == sorted(ours) and len(set(ours)) == len(ours):
            order = [theirs.index(name) for name in ours]
            for name in names:
                params[name] = params[name][..., order]
                report.resized.append((name, wanted[name], wanted[name],
                                       "classes brought into the order of the data"))
            return
        why = f"the file has other classes: {first_difference(theirs, ours)}"
    if why is None:
        return
    _drop(params, names, "replaced by a new head", report)
    params[names[0]] = np.zeros(wanted[names[0]], np.float32)
    params[names[1]] = np.full(wanted[names[1]], model.head_bias_init, np.float32)
    report.reset += [(name, wanted[name], why) for name in names]


def first_difference(theirs: tuple[str, ...], ours: tuple[str, ...]) -> str:
    """Of as many class names, the first that differ, in words for the user."""
    index = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if len(set(pair)) > 1)
    return f"class {index} is {theirs[index]!r:.80} in the file, {ours[index]!r:.80} in the data"


def _drop(params, names, why, report):
    for name in names:
        if name not in params:
            continue
        shape = params.pop(name).shape
        origin = next((theirs for theirs, ours, _ in report.renamed if ours == name), name)
        report.renamed = [entry for entry in report.renamed if entry[1] != name]
        report.dropped.append((origin, shape, why))


def _check_complete(params, wanted, report):
    report.missing = [(path, shape) for path, shape in wanted.items() if path not in params]
    surplus = [path for path in params if path not in wanted]
    other = [path for path in wanted if path in params and params[path].shape != wanted[path]]
    lines = []
    for path, shape in report.missing:
        near = difflib.get_close_matches(path, surplus, n=1)
        lines.append(f"missing {path} {list(shape)}" + (f", nearest: {near[0]}" if near else ""))
    for path in surplus:
        near = difflib.get_close_matches(path, list(wanted), n=1)
        lines.append(f"unexpected {path} {list(params[path].shape)}"
                     + (f", nearest: {near[0]}" if near else ""))
    lines += [f"{path} has shape {list(params[path].shape)}, expected {list(wanted[path])}"
              for path in other]
    if lines:
        shown = lines[:8] + ([f"... and {len(lines) - 8} more"] if len(lines) > 8 else [])
        raise UserError(
            f"{report.source} does not fit the model:\n  " + "\n  ".join(shown))

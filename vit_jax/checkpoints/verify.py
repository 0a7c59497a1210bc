"""Proof that an exported file computes what the model does: the library's own loader and forward
pass against ours, in float32 on the CPU."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vit_jax.checkpoints import files, google, targets
from vit_jax.checkpoints.adapt import nest
from vit_jax.checkpoints.libraries import LOADERS, Function, Unavailable, first_line, in_batches
from vit_jax.data.decode import BadImageError, decode_image
from vit_jax.data.pipeline import eval_crop
from vit_jax.errors import UserError
from vit_jax.images import Unreadable, eval_config, find_images
from vit_jax.training.step import Pixels, normalize

# Largest allowed difference of a logit, times the spread of the logits where that exceeds 1.
# PLAIN: float32 rounding of two orders of summation; 3e-6 to 6e-6 measured on Ti/16 and B/16.
# HYBRID: the rounding of dozens of normalised convolutions, which is also what PyTorch in float32
#   differs from itself in float64; 2e-5 to 1e-4 measured on R26 and R50. timm's other epsilon, up
#   to 1.5e-3 on the same models, is no part of it: the other side of a raw export is our model with
#   timm's epsilon (`epsilon.as_timm`), and what that changes is reported as an effect.
PLAIN, HYBRID = 2e-5, 2e-4
SMALL = 0.1  # a spread of logits below which the comparison takes a random head
RANDOM_IMAGES = 4
_MAX_PIXELS = 1 << 28


@dataclasses.dataclass
class Verification:
    """The outcome of a check; `str(verification)` is a short table.

    Attributes:
      status: 'PASS', 'FAIL' or 'SKIPPED' (the numbers below are then missing).
      reason: why it failed or was skipped.
      library: what computed the other side, with its version.
      tensors: (tensors that came back bit for bit, tensors that were written).
      images: (random images, given images).
      max_difference, mean_difference: of the logits, absolute.
      spread: standard deviation of our logits.
      tolerance: of max_difference.
      top1: images whose most likely class agrees; None for features.
      notes: what to know about the comparison.
    """

    status: str = "SKIPPED"
    reason: str = ""
    library: str = ""
    tensors: tuple[int, int] = (0, 0)
    images: tuple[int, int] = (0, 0)
    max_difference: float | None = None
    mean_difference: float | None = None
    spread: float | None = None
    tolerance: float | None = None
    top1: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        rows = []
        if self.tensors[1]:
            rows.append(
                ("tensors", f"{self.tensors[0]} of {self.tensors[1]} read back bit for bit"))
        if self.max_difference is not None:
            random, given = self.images
            rows += [
                ("against", f"{self.library}, float32, {random} random images"
                 + (f" and {given} given ones" if given else "")),
                ("logits", f"max |difference| {self.max_difference:.1e}, mean "
                 f"{self.mean_difference:.1e}, tolerance {self.tolerance:.1e} "
                 f"(their std is {self.spread:.2f})"),
            ]
        if self.top1 is not None:
            rows.append(("top-1", f"{self.top1} of {sum(self.images)} agree"))
        rows += [("note", note) for note in self.notes]
        rows.append((self.status, self.reason))
        return "verification\n" + "\n".join(f"  {a:8} {b}".rstrip() for a, b in rows)


def verify(
    target: str,
    path: Path,
    written: Mapping[str, np.ndarray],
    model: nn.Module,
    params: Mapping[str, np.ndarray],
    images: np.ndarray,
    *,
    given: int = 0,
) -> Verification:
    """Reads an export back and compares it with the model.

    Args:
      target: one of `targets.TARGETS`.
      path: the directory, or the npz file.
      written: the tensors that should be in it, under the target's names (npz: under ours).
      model: what it must compute.
      params: its parameters, by path.
      images: float32 [N, H, W, C], normalised.
      given: how many of the images, the last ones, are not random.
    """
    result = Verification(images=(len(images) - given, given))
    try:
        stored = files.read_tensors(path).tensors
    except UserError as error:
        return dataclasses.replace(result, status="FAIL", reason=str(error).rstrip("."))
    if target == "npz":
        stored = google.to_ours(stored)[0]
    same = sum(name in stored and _same(stored[name], tensor) for name, tensor in written.items())
    result.tensors = (same, max(len(written), len(stored)))
    if same < result.tensors[1]:
        result.status, result.reason = "FAIL", "the file does not contain what was written"
        return result
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        try:
            theirs = LOADERS[target](path, model, images.shape[1:])
        except Unavailable as error:
            result.reason = f"the outputs were not compared: {error}"
            return result
        except Exception as error:  # what a library says about a file that it cannot load
            result.status = "FAIL"
            result.reason = f"{targets.LIBRARIES[target]} cannot load it ({first_line(error)})"
            return result
        expected = targets.library_tensors("timm", written) if target == "npz" else written
        _compare(result, theirs, expected, model, params, images)
    if result.max_difference is None:
        result.status = "FAIL"
        return result
    hybrid = getattr(model, "resnet_stages", None) is not None
    result.tolerance = max(1.0, result.spread) * (HYBRID if hybrid else PLAIN)
    if not result.reason and not result.max_difference <= result.tolerance:  # also not a number
        result.reason = "the outputs differ by more than the tolerance"
    result.status = "FAIL" if result.reason else "PASS"
    return result


def _compare(result, theirs, expected, model, params, images):
    result.library = theirs.library
    if theirs.state is not None:
        same = sum(name in theirs.state and np.array_equal(theirs.state[name], _float32(tensor))
                   for name, tensor in expected.items())
        if same < max(len(expected), len(theirs.state)):
            result.tensors = (same, max(len(expected), len(theirs.state)))
            result.reason = f"{theirs.library} holds other tensors than were written"
    ours = function(model, params)(images)
    if "head/kernel" in params:
        # With a head that is zero or freshly initialised, the logits are (nearly) its bias whatever
        # the rest computes: errors shrink with them, but the tolerance does not.
        spread = float((ours - params["head/bias"]).std())
        if spread < SMALL:
            zero = not params["head/kernel"].any()
            result.notes.append(
                ("the head is all zeros" if zero else
                 f"the head gives small logits (their std without its bias is {spread:.1e})")
                + "; both sides were compared with a random one")
            params = _with_random_head(params)
            theirs.set_head(params["head/kernel"], params["head/bias"])
            ours = function(model, params)(images)
    try:
        other = theirs.function(images)
    except Exception as error:
        result.reason = f"{theirs.library} cannot run it ({first_line(error)})"
        return
    if ours.shape != other.shape:
        result.reason = f"it returns {list(other.shape)} and not {list(ours.shape)}"
        return
    result.spread = float(ours.std())
    for key, value in difference(ours, other).items():
        setattr(result, key, value)
    if not model.num_classes:
        result.top1 = None


def _with_random_head(params):
    shape = params["head/kernel"].shape
    kernel = np.random.default_rng(0).standard_normal(shape, np.float32)
    return {**params, "head/kernel": kernel * np.float32(shape[0] ** -0.5)}


def difference(ours: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """max_difference, mean_difference and top1 (rows that agree) of logits [N, K]."""
    distance = np.abs(ours.astype(np.float64) - other)
    return {"max_difference": float(distance.max()), "mean_difference": float(distance.mean()),
            "top1": int((ours.argmax(-1) == other.argmax(-1)).sum())}


def function(model: nn.Module, params: Mapping[str, np.ndarray]) -> Function:
    """Our model's logits in float32, on the CPU where there is one."""
    plain = {"dtype": np.float32, "scan_layers": False, "attention_implementation": "xla"}
    model = model.clone(**{k: v for k, v in plain.items() if hasattr(model, k)})
    tree = nest(dict(params))

    def run(images):
        with _on_cpu(), jax.default_matmul_precision("highest"):
            return in_batches(lambda batch: np.asarray(_apply(tree, batch, model)), images)

    return run


@functools.partial(jax.jit, static_argnames="model")
def _apply(params, images, model):
    return model.apply({"params": params}, images, train=False)


def _on_cpu():
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names others alone
        return contextlib.nullcontext()


def random_images(size: tuple[int, int], channels: int) -> np.ndarray:
    """The fixed images of every check, float32 [4, H, W, C] in [-1, 1]."""
    return np.random.default_rng(0).uniform(
        -1, 1, (RANDOM_IMAGES, *size, channels)).astype(np.float32)


class _AllReadable(Unreadable):
    """Raises UserError for the first image that is not."""

    def report(self, origin: str, reason: str | Exception) -> None:
        raise UserError(f"{origin} cannot be read: {getattr(reason, 'strerror', None) or reason}.")


def read_images(paths: Iterable[str | Path], preprocessing: Mapping[str, Any]) -> np.ndarray:
    """Image files, and those in folders (see `find_images`), as the model wants them: float32
    [N, H, W, 3].

    Raises:
      UserError: no such file, no image in a folder, or an image that cannot be decoded.
    """
    found = find_images(list(map(str, paths)), _AllReadable())
    return np.stack([_preprocess(Path(path), preprocessing) for path in found])


def _preprocess(path, preprocessing):
    try:
        image = decode_image(path.read_bytes(), max_pixels=_MAX_PIXELS)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except BadImageError as error:
        raise UserError(f"{path} cannot be decoded: {error}.") from error
    image = eval_crop(image, tuple(preprocessing["image_size"]), eval_config(preprocessing).data)
    return np.asarray(normalize(image, Pixels(preprocessing["mean"], preprocessing["std"])))


def _float32(tensor):
    return np.asarray(tensor).astype(np.float32)


def _same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

"""Masked patch prediction to look at: what the model sees of an image, and what it makes of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vit_jax.models.masked import MASK, MaskedPatchModel
from vit_jax.training.masked_patches import (
    class_colors,
    color_classes,
    cut_patches,
    predicted_colors,
    sample_corruption,
)
from vit_jax.training.step import Pixels, normalize

_TITLES = ("image", "what the model sees", "mean colours, 3 bits", "predicted")
_STRIPES = (110, 150)  # greys of a masked patch
_DIMMED = 0.35  # of patches that are not predicted
_SIDE = 1.7  # inches of an image


class Reconstruction(NamedTuple):
    """n images and what became of them; pixels are uint8 [n, H, W, 3].

    Attributes:
      images: whole.
      seen: masked patches striped, swapped ones with the pixels of the other patch.
      truth: the corrupted patches in their 3-bit mean colour, the others dimmed.
      predicted: the same with the colours that were predicted.
      right: bool [n, N], predicted with the right 3-bit colour.
      corrupted: bool [n, N].
    """

    images: np.ndarray
    seen: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    right: np.ndarray
    corrupted: np.ndarray


def reconstruct(
    model: MaskedPatchModel,
    params: Any,
    images: np.ndarray,
    *,
    rate: float = 0.5,
    seed: int = 0,
    pixels: Pixels = Pixels(),  # noqa: B008
) -> Reconstruction:
    """Corrupts images [n, H, W, 3] (uint8) and predicts their patches.

    Args:
      model: of any target.
      params: of it, mask token and predictions included.
      images: of the size the model is for.
      rate: share of corrupted patches.
      seed: of the corruption.
      pixels: what images are normalised with.
    """
    side, count = model.patch_pixels, len(images)
    patches = np.asarray(cut_patches(images, side))
    keys = jax.random.split(jax.random.key(seed), count)
    corrupted, sources = sample_corruption(keys, patches.shape[1], rate)

    @jax.jit
    def predict(params, images, sources):
        outputs = model.apply({"params": params}, normalize(images, pixels), sources, train=False)
        return predicted_colors(outputs, model.target, pixels)

    colors = np.asarray(predict(params, images, sources))
    painted = _uint8(255 * colors)
    classes = color_classes(jnp.asarray(patches))
    guessed = np.minimum(np.floor(8 * colors), 7) @ [64, 8, 1]
    corrupted, sources = np.asarray(corrupted), np.asarray(sources)

    y, x = np.indices((side, side))
    striped = np.where((x + y) % max(2, side // 2) < max(1, side // 4), *_STRIPES)
    taken = np.take_along_axis(
        patches, np.maximum(sources, 0).reshape(*sources.shape, 1, 1, 1), axis=1)
    seen = np.where(_per_patch(sources == MASK), striped[..., None], taken)

    def over_dimmed(colors):
        dimmed = _DIMMED * patches + (1 - _DIMMED) * 255
        return np.where(_per_patch(corrupted), colors[:, :, None, None], dimmed)

    size = images.shape[1:3]
    return Reconstruction(
        images=images,
        seen=_join(seen, size),
        truth=_join(over_dimmed(_uint8(255 * class_colors(classes))), size),
        predicted=_join(over_dimmed(painted), size),
        right=guessed == np.asarray(classes),
        corrupted=corrupted,
    )


def _per_patch(values):
    return values[..., None, None, None]


def _uint8(values):
    return np.rint(np.asarray(values)).astype(np.uint8)


def _join(patches, size):
    """[n, N, side, side, 3] to uint8 [n, H, W, 3]: the inverse of `cut_patches`."""
    count, _, side, _, channels = patches.shape
    rows, columns = size[0] // side, size[1] // side
    grid = patches.reshape(count, rows, columns, side, side, channels).swapaxes(2, 3)
    return _uint8(grid.reshape(count, *size, channels))


def picture(result: Reconstruction) -> Figure:
    """One row an image: whole, corrupted, the colours to predict, the colours predicted."""
    count = len(result.images)
    aspect = result.images.shape[1] / result.images.shape[2]
    figure = Figure(figsize=(4 * _SIDE, count * (_SIDE * aspect + 0.05) + 0.6),
                    layout="constrained")
    share = result.right[result.corrupted].mean()
    masked = int(result.corrupted[0].sum())
    figure.suptitle(
        f"{masked} of {result.corrupted.shape[1]} patches corrupted, "
        f"{share:.0%} of their colours right", fontsize=10)
    columns = (result.images, result.seen, result.truth, result.predicted)
    for row, panels in enumerate(figure.subplots(count, 4, squeeze=False)):
        for axes, title, images in zip(panels, _TITLES, columns, strict=True):
            axes.imshow(images[row], interpolation="nearest")
            axes.axis("off")
            if row == 0:
                axes.set_title(title, fontsize=9)
    return figure

"""From an image of any size to the model's: crops and resizes, uint8 [H, W, 3] to [h, w, 3].

Pure functions: what is random comes from the generator that is passed. Sizes are (height, width).
"""

import math

import cv2
import numpy as np
from PIL import Image

from vit_jax.data.decode import Jpeg, Whole
from vit_jax.errors import UserError

# The callers' threads are the parallelism; OpenCV's own would only compete with them.
cv2.setNumThreads(0)

_ATTEMPTS = 100
_LONGEST = 16  # times as long as the crop, for the same short side


_CV2 = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resize(
    image: np.ndarray, size: tuple[int, int], *, antialias: bool, interpolation: str = "bilinear"
) -> np.ndarray:
    """Bilinear or bicubic, with half-pixel centres.

    Args:
      image: uint8 [H, W, 3].
      size: (height, width) of the result.
      antialias: False weighs the four nearest pixels, as `tf.image.resize` and PyTorch's
        `interpolate(mode='bilinear')` do (to one grey level: OpenCV rounds the weights); True
        widens the filter by the scale when shrinking, as Pillow does.
      interpolation: 'bilinear' or 'bicubic'.

    Returns:
      uint8 [height, width, 3]; the image itself where it already has the size.
    """
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    if antialias:
        return np.asarray(Image.fromarray(image).resize((width, height), _PILLOW[interpolation]))
    return cv2.resize(image, (width, height), interpolation=_CV2[interpolation])


def inception_crop(
    image: Jpeg | Whole,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.05, 1.0),
    aspect: tuple[float, float] = (0.75, 4 / 3),
    scaled_decode: bool = False,
    antialias: bool,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """A crop of random area, shape and place, resized (Szegedy et al., arXiv 1409.4842, §6).

    Args:
      image: of `decode.open_image`.
      size: (height, width) of the result.
      rng: where the randomness comes from.
      area: range of the crop's share of the image.
      aspect: range of the crop's width / height, before it is resized.
      scaled_decode: whether a large JPEG may be decoded smaller, see `decode.Jpeg.crop`: down to
        `size`, and to twice that where `antialias` is left something to do.
      antialias, interpolation: see `resize`.
    """
    box = inception_box(image.height, image.width, rng, area=area, aspect=aspect)
    at_least = tuple(2 * side for side in size) if antialias else size
    crop = image.crop(box, at_least=at_least if scaled_decode else None)
    return resize(crop, size, antialias=antialias, interpolation=interpolation)


def inception_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of an inception crop, drawn as by TensorFlow's
    `sample_distorted_bounding_box`, with which Google's recipes were made.

    The aspect is drawn uniformly from its range, then the height from those that area and image
    allow for that aspect, then the position. Crops are therefore smaller than with torchvision's
    uniform area: for a 500x375 photo the mean area is 0.34 instead of 0.42. If a hundred draws do
    not fit, as in a very long image, the result is the whole image.
    """
    smallest, largest = (share * height * width for share in area)
    for _ in range(_ATTEMPTS):
        ratio = rng.uniform(*aspect)
        highest = min(round(math.sqrt(largest / ratio)), height,
                      math.ceil((width + 0.5) / ratio) - 1)  # of which the width still fits
        lowest = min(highest, round(math.sqrt(smallest / ratio)))
        h = lowest + int(rng.integers(highest - lowest + 1))
        # Sides are rounded, so that the area may be outside of its range by a pixel.
        if h * round(h * ratio) < smallest:
            h += 1
        if h * round(h * ratio) > largest:
            h -= 1
        w = round(h * ratio)
        if smallest <= h * w <= largest and 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return 0, 0, height, width


def pad_crop(
    image: np.ndarray,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    padding: int,
    antialias: bool = True,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """A shift by up to `padding` pixels, with zeros coming in (He et al., arXiv 1512.03385, §4.2).

    An image of another size is resized first.
    """
    image = resize(image, size, antialias=antialias, interpolation=interpolation)
    height, width = size
    top, left = (int(start) for start in rng.integers(2 * padding + 1, size=2))
    # np.pad takes 20 us for a small image, this 1.
    padded = np.zeros((height + 2 * padding, width + 2 * padding, 3), np.uint8)
    padded[padding:padding + height, padding:padding + width] = image
    return np.ascontiguousarray(padded[top:top + height, left:left + width])


def squash(
    image: np.ndarray, size: tuple[int, int], *, antialias: bool, interpolation: str = "bilinear"
) -> np.ndarray:
    """The whole image, resized without keeping its aspect ratio, as Google's code evaluates."""
    return resize(image, size, antialias=antialias, interpolation=interpolation)


def center_crop(
    image: np.ndarray,
    size: tuple[int, int],
    *,
    resize_to: int,
    antialias: bool,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """The middle of an image, keeping its aspect ratio: torchvision's `Resize` and `CenterCrop`.

    The short side becomes `resize_to` and the long side is rounded down; an odd margin leaves
    Python's `round(margin / 2)`, half to even, above and to the left. For a size that is not
    square, "short" is meant relative to it, and `resize_to` compares with its smaller number.

    Args:
      image: uint8 [H, W, 3].
      size: (height, width) of the result.
      resize_to: pixels, at least min(size).
      antialias, interpolation: see `resize`.

    Raises:
      UserError: `resize_to` is smaller than the crop.
    """
    height, width = size
    if resize_to < min(size):
        raise UserError(
            f"a central crop of {height}x{width} does not fit into images resized to {resize_to} "
            f"pixels; set config.data.eval_resize to {min(size)} or more."
        )
    image = _limit_aspect(image, size)
    full_height, full_width = image.shape[:2]
    if full_height * width <= full_width * height:
        new_height = height * resize_to // min(size)
        new_width = full_width * new_height // full_height
    else:
        new_width = width * resize_to // min(size)
        new_height = full_height * new_width // full_width
    image = resize(
        image, (new_height, new_width), antialias=antialias, interpolation=interpolation)
    top, left = round((new_height - height) / 2), round((new_width - width) / 2)
    return np.ascontiguousarray(image[top:top + height, left:left + width])


def _limit_aspect(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cuts the ends off a very long image, which the central crop does not see, and which could
    take gigabytes once its short side is resized."""
    height, width = image.shape[:2]
    max_height = min(height, max(1, _LONGEST * width * size[0] // size[1]))
    max_width = min(width, max(1, _LONGEST * height * size[1] // size[0]))
    top, left = (height - max_height) // 2, (width - max_width) // 2
    return image[top:top + max_height, left:left + max_width]

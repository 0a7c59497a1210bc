"""RandAugment (Cubuk et al., arXiv 1909.13719) as Google's ViT recipes ran it.

The operations, their strengths and their arithmetic are those of `randaug(operations, magnitude)`
in google-research/big_vision (`pp/archive/autoaugment.py`, from TPU EfficientNet), since the
recipes of AugReg and of "better plain ViT" were tuned with them. Where they are odd, a comment says
"as Google's". timm's and torchvision's RandAugment are others: they draw from another list, at
other strengths, and may skip an operation.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

_GREY = (128, 128, 128)  # where the image was moved away or cut out
_LEVELS = np.arange(256, dtype=np.float32)
_LUMA = np.array([[0.2989, 0.5870, 0.1140]], np.float32)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / np.float32(13)


def randaugment(
    image: np.ndarray, rng: np.random.Generator, *, operations: int, magnitude: int
) -> np.ndarray:
    """Draws `operations` of `OPERATIONS` uniformly, with replacement, and applies them in turn.

    Args:
      image: uint8 [H, W, 3], RGB, of the model's size. Translations and cutouts are measured in
        pixels, for 224: at magnitude 10 by 100 pixels and 80 wide, which blanks a 32x32 image.
      rng: where the randomness comes from: operations, signs, the place of a cutout.
      operations: how many, 2 in Google's recipes.
      magnitude: strength of all of them, in [0, 30]. 10 is the scale's nominal end, which Google's
        stronger recipes exceed; 0 is not nothing (it posterizes to one bit, for example).

    Returns:
      uint8 [H, W, 3]; the input is left as it is.
    """
    for _ in range(operations):
        operation = _CHOICES[rng.integers(len(_CHOICES))]
        image = operation(image, magnitude / 10, rng)
    return image


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel's values to [0, 255]; a channel of one value stays."""
    table = np.empty((1, 256, 3), np.uint8)
    for channel, counts in enumerate(_histograms(image)):
        low, high = np.flatnonzero(counts)[[0, -1]].astype(np.float32)
        if low < high:
            scale = np.float32(255) / (high - low)
            table[0, :, channel] = np.clip(_LEVELS * scale - low * scale, 0, 255)
        else:
            table[0, :, channel] = _LEVELS
    return cv2.LUT(image, table)


def equalize(image: np.ndarray) -> np.ndarray:
    """Flattens each channel's histogram; a channel with too few values to do so stays."""
    table = np.empty((1, 256, 3), np.uint8)
    for channel, counts in enumerate(_histograms(image)):
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        darker = np.cumsum(counts) - counts
        table[0, :, channel] = (
            np.minimum((darker + step // 2) // step, 255) if step else _LEVELS)
    return cv2.LUT(image, table)


def invert(image: np.ndarray) -> np.ndarray:
    """255 - image."""
    return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the highest `bits` bits of every value.

    As Google's: 0 keeps one, since TensorFlow shifts a uint8 by at most 7; more than 8 too, since
    the negative shift becomes a large uint8.
    """
    shift = min((8 - bits) % 256, 7)
    return image & np.uint8(255 >> shift << shift)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the values from `threshold` on.

    As Google's: the threshold is a uint8 that wraps around. 256 (magnitude 10) inverts everything
    and 384 (magnitude 15) everything from 128 on, where the formula means nothing to be inverted.
    """
    return _map(image, np.where(_LEVELS < threshold % 256, _LEVELS, 255 - _LEVELS))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Adds to the values below 128."""
    return _map(image, np.where(_LEVELS < 128, np.minimum(_LEVELS + addition, 255), _LEVELS))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Saturation: from grey (factor 0) over the image (1) to exaggerated."""
    # TensorFlow's grey, which is not Pillow's: 255.5 is its way back to uint8, and truncates.
    grey = cv2.transform(image * np.float32(1 / 255), _LUMA) * np.float32(255.5)
    return _blend(cv2.cvtColor(grey.astype(np.uint8), cv2.COLOR_GRAY2RGB), image, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Moves the values away from (factor above 1) or towards one grey.

    As Google's: that grey is not the image's mean but its number of pixels / 256, at most 255: 196
    for 224x224, white from 256x256 on.
    """
    grey = min(image.shape[0] * image.shape[1] // 256, 255)
    return _map(image, _blend(grey, _LEVELS, factor))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """factor * image."""
    return _map(image, _blend(0, _LEVELS, factor))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from (factor above 1) or towards a 3x3 blur; the outermost pixels stay."""
    blurred = image.copy()
    smooth = cv2.filter2D(image.astype(np.float32), cv2.CV_32F, _SMOOTH)
    blurred[1:-1, 1:-1] = smooth[1:-1, 1:-1].astype(np.uint8)
    return _blend(blurred, image, factor)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates around the centre, counter-clockwise."""
    radians = np.float32(degrees) * np.float32(math.pi / 180)
    cos, sin = np.cos(radians), np.sin(radians)
    last_y, last_x = (np.float32(side - 1) for side in image.shape[:2])
    return _transform(image, (
        (cos, -sin, (last_x - (cos * last_x - sin * last_y)) / np.float32(2)),
        (sin, cos, (last_y - (sin * last_x + cos * last_y)) / np.float32(2))))


def shear_x(image: np.ndarray, slope: float) -> np.ndarray:
    """Moves row y by slope * y to the left; the first row stays."""
    return _transform(image, ((1, slope, 0), (0, 1, 0)))


def shear_y(image: np.ndarray, slope: float) -> np.ndarray:
    """Moves column x by slope * x up; the first column stays."""
    return _transform(image, ((1, 0, 0), (slope, 1, 0)))


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
    """Moves the image to the left."""
    return _transform(image, ((1, 0, pixels), (0, 1, 0)))


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
    """Moves the image up."""
    return _transform(image, ((1, 0, 0), (0, 1, pixels)))


def cutout(image: np.ndarray, half_side: int, center: tuple[int, int]) -> np.ndarray:
    """Greys a square (DeVries and Taylor, arXiv 1708.04552), or what of it is in the image.

    Args:
      image: uint8 [H, W, 3].
      half_side: half the square's side, in pixels.
      center: (row, column), in the image.
    """
    row, column = center
    image = image.copy()
    image[max(row - half_side, 0):row + half_side,
          max(column - half_side, 0):column + half_side] = _GREY
    return image


def _histograms(image):
    """Counts of the 256 values, int64 [256] for every channel."""
    return [cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
            for channel in range(3)]


def _map(image, table):
    """table[value] for every value; the table's 256 entries are truncated to uint8."""
    return cv2.LUT(image, table.astype(np.uint8))


def _blend(degenerate, image, factor):
    """degenerate + factor * (image - degenerate), clipped and truncated, not rounded, to uint8."""
    mixed = np.subtract(image, degenerate, dtype=np.float32)
    mixed *= factor
    mixed += degenerate
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)


def _transform(image, matrix):
    """The nearest pixels at matrix (2x3) @ (x, y, 1), for every pixel (x, y) of the result."""
    height, width = image.shape[:2]
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    source = np.empty((height, width, 2), np.int16)
    for axis, row in enumerate(np.array(matrix, np.float32)):
        at = row[0] * x + row[1] * y + row[2]
        # OpenCV would round halves to even, which repeats and drops pixels under a regular shear.
        source[..., axis] = np.trunc(at + np.copysign(np.float32(0.5), at))
    return cv2.remap(image, source, None, cv2.INTER_NEAREST,
                     borderMode=cv2.BORDER_CONSTANT, borderValue=_GREY)


def _signed(value, rng):
    return value if rng.random() < 0.5 else -value


def _enhance(level):
    return level * 1.8 + 0.1


# Each is called with the image, magnitude / 10 and the generator.
OPERATIONS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "AutoContrast": lambda image, level, rng: autocontrast(image),
    "Equalize": lambda image, level, rng: equalize(image),
    "Invert": lambda image, level, rng: invert(image),
    "Rotate": lambda image, level, rng: rotate(image, _signed(level * 30, rng)),
    "Posterize": lambda image, level, rng: posterize(image, int(level * 4)),
    "Solarize": lambda image, level, rng: solarize(image, int(level * 256)),
    "Color": lambda image, level, rng: color(image, _enhance(level)),
    "Contrast": lambda image, level, rng: contrast(image, _enhance(level)),
    "Brightness": lambda image, level, rng: brightness(image, _enhance(level)),
    "Sharpness": lambda image, level, rng: sharpness(image, _enhance(level)),
    "ShearX": lambda image, level, rng: shear_x(image, _signed(level * 0.3, rng)),
    "ShearY": lambda image, level, rng: shear_y(image, _signed(level * 0.3, rng)),
    "TranslateX": lambda image, level, rng: translate_x(image, _signed(level * 100, rng)),
    "TranslateY": lambda image, level, rng: translate_y(image, _signed(level * 100, rng)),
    "Cutout": lambda image, level, rng: cutout(
        image, int(level * 40), tuple(rng.integers(image.shape[:2]))),
    "SolarizeAdd": lambda image, level, rng: solarize_add(image, int(level * 110)),
}
_CHOICES = tuple(OPERATIONS.values())

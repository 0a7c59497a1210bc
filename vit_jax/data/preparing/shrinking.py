"""What happens to one image on its way into a prepared data set: a check, and shrinking."""

import simplejpeg

from vit_jax.data import augment
from vit_jax.data.decode import BadImageError, decode_image

_LARGEST_TRAINED = 100_000_000  # pixels, the default of config.data.max_pixels
_LARGEST_SHRUNK = 500_000_000  # pixels; decoding them takes 1.5 GB
_LONGEST_JPEG = 65_500  # pixels: libjpeg's JPEG_MAX_DIMENSION, below the format's 65,535


def fit_image(data: bytes, *, resize: int | None, quality: int) -> bytes:
    """The file to store for an image file.

    Without `resize`, the file itself, provided that it can be decoded. With it, images whose short
    side is longer are shrunk to it (Pillow's antialiased bicubic, the long side rounded down as in
    torchvision's Resize), and other formats become JPEG; a JPEG that is small enough is kept as it
    is. JPEGs are written with 4:2:0 chroma subsampling, upright and without metadata.

    Args:
      data: a JPEG, PNG, WebP, BMP or GIF file.
      resize: pixels of the short side, or None.
      quality: of the JPEGs that are written, 1 to 100.

    Raises:
      BadImageError: it cannot be decoded, or has too many pixels to train on or to shrink.
    """
    if resize is None:
        decode_image(data, max_pixels=_LARGEST_TRAINED)
        return data
    image = decode_image(data, max_pixels=_LARGEST_SHRUNK)
    height, width = image.shape[:2]
    short = min(height, width)
    shrink = short > resize
    if shrink:
        height, width = height * resize // short, width * resize // short
    if height * width > _LARGEST_TRAINED or max(height, width) > _LONGEST_JPEG:
        raise BadImageError(f"{width} x {height} pixels are too many, even when shrunk")
    if shrink:
        image = augment.resize(image, (height, width), antialias=True, interpolation="bicubic")
    elif data.startswith(b"\xff\xd8"):
        return data
    return simplejpeg.encode_jpeg(image, quality=quality, colorsubsampling="420")

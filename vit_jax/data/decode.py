"""From an encoded image to RGB pixels, defined as what Pillow's `convert('RGB')` gives.

Ordinary JPEGs, nearly all photos, take a shorter way to the same bits through simplejpeg.
"""

import io
import struct
import threading
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")

# EXIF 2.3, 4.6.4 A: what has to be done to see an image upright.
_UPRIGHT = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}


class BadImageError(ValueError):
    """An image that cannot be decoded; the message is the reason."""


def decode_image(data: bytes | np.ndarray, *, max_pixels: int) -> np.ndarray:
    """RGB pixels of an image, whatever it came in.

    EXIF orientation is applied and alpha is dropped, not composited. Of 16 bits the upper 8 are
    kept (x >> 8, which Pillow does to 16-bit colour and is done here to 16-bit grey). Of several
    frames the first is decoded.

    Args:
      data: a JPEG, PNG, WebP, BMP or GIF file; or pixels, uint8 [H, W], [H, W, 1], [H, W, 3] or
        [H, W, 4], which may be returned without a copy.
      max_pixels: larger images are refused from their header, before memory is spent on them.

    Returns:
      uint8 [H, W, 3], contiguous.

    Raises:
      BadImageError: empty, truncated, damaged, too large, or of another format.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data, max_pixels)
    if not data:
        raise BadImageError("the file is empty")
    if (pixels := _decode_colour_jpeg(data, max_pixels)) is not None:
        return _upright(pixels, _exif_orientation(_jpeg_exif(data)))
    try:
        with _open(data) as image:
            _check_size(*image.size, max_pixels)
            return _upright(_to_rgb(image), _exif_orientation(image.info.get("exif", b"")))
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"it is no {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file"
                            ) from error
    except Exception as error:  # a parser of damaged files raises anything
        reason = str(error) or type(error).__name__
        raise BadImageError(f"it is damaged or incomplete ({reason})") from error


def _from_array(pixels: np.ndarray, max_pixels: int) -> np.ndarray:
    if pixels.dtype != np.uint8:
        raise BadImageError(f"pixels must be uint8, not {pixels.dtype}")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or 0 in pixels.shape:
        raise BadImageError(f"pixels must have shape [H, W] or [H, W, 1, 3 or 4], not "
                            f"{list(pixels.shape)}")
    _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    return np.ascontiguousarray(pixels[..., :3])


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(f"{width} x {height} pixels are more than max_pixels={max_pixels}")


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels))


def _decode_colour_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Pixels of an ordinary JPEG; None for all that Pillow has to look at."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, max_pixels)
    if colours not in ("YCbCr", "RGB"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, strict=True)
    except ValueError:  # damaged, if only a little: Pillow decides
        return None


# Pillow warns about oddities of files that do not change their pixels. Filters belong to the whole
# process, so only one thread at a time may change them, and no pixels are decoded meanwhile.
_QUIET = threading.Lock()


def _open(data: bytes) -> Image.Image:
    """Reads the header, without decoding pixels."""
    with _QUIET, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        # `max_pixels` replaces Pillow's own limit, which belongs to the process as well.
        Image.MAX_IMAGE_PIXELS = None
        return Image.open(io.BytesIO(data), formats=_FORMATS)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of the first frame."""
    image.load()
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip, not scale
        grey = (np.clip(np.asarray(image), 0, 0xFFFF) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    image.info.pop("transparency", None)  # dropped anyway, and Pillow warns about some kinds
    return np.asarray(image.convert("RGB"))


def _jpeg_exif(data: bytes) -> bytes:
    """The EXIF segment of a JPEG, from before its pixels (ITU T.81, B.1.1); b"" without one."""
    position = 2
    try:
        while data[position] == 0xFF:
            while data[position] == 0xFF:  # any number of fill bytes
                position += 1
            marker, length = data[position], int.from_bytes(data[position + 1:position + 3], "big")
            body = data[position + 3:position + 1 + length]
            if marker == 0xE1 and body.startswith(b"Exif\0\0"):
                return body
            if marker == 0xDA:  # start of scan
                break
            position += 1 + length
    except IndexError:
        pass
    return b""


def _exif_orientation(exif: bytes) -> int:
    """1 to 8; 1, which is upright, where it is not given or cannot be understood."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == 0x0112:
                code = {1: "B", 3: "H", 4: "I"}.get(kind, "H")  # by the standard it is 3
                (value,) = struct.unpack_from(order + code, tiff, entry + 8)
                return value if value in _UPRIGHT else 1
    except struct.error:
        pass
    return 1

"""From an encoded image to RGB pixels, defined as what Pillow's `convert('RGB')` gives.

Ordinary JPEGs, nearly all photos, take a shorter way to the same bits through simplejpeg.
"""

import io
import struct
import threading
import warnings
from typing import NamedTuple

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
    jpeg = _read_jpeg_header(data)
    if jpeg:
        _check_size(jpeg.width, jpeg.height, max_pixels)
        if jpeg.components == 3:
            try:
                return _upright(simplejpeg.decode_jpeg(data, strict=True), jpeg.orientation)
            except ValueError:
                pass  # damaged, if only a little: Pillow decides
        data = jpeg.without_metadata
    try:
        with _open(data) as image:
            _check_size(*image.size, max_pixels)
            exif = image.info.get("exif", b"")
            return _upright(_to_rgb(image), jpeg.orientation if jpeg else _exif_orientation(exif))
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


class _JpegHeader(NamedTuple):
    height: int
    width: int
    components: int  # 1 grey, 3 colour, 4 CMYK or YCCK
    orientation: int
    without_metadata: bytes  # the file, less EXIF, previews and the like: Pillow may warn of them


def _read_jpeg_header(data: bytes) -> _JpegHeader | None:
    """What comes before the pixels (ITU T.81, B.2); None where it is no well-formed JPEG."""
    if data[:2] != b"\xff\xd8":
        return None
    frame, orientation, kept, position = None, None, [data[:2]], 2
    try:
        while True:
            start = position
            if data[position] != 0xFF:
                return None
            while data[position] == 0xFF:  # any number of fill bytes
                position += 1
            marker = data[position]
            if 0xD0 <= marker <= 0xD9:  # has no business here, and no length
                return None
            (length,) = struct.unpack_from(">H", data, position + 1)
            body = data[position + 3:position + 1 + length]
            position += 1 + length
            if marker == 0xE1 and body.startswith(b"Exif\0\0") and orientation is None:
                orientation = _exif_orientation(body)
            elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                frame = struct.unpack_from(">HHB", body, 1)
            if marker == 0xDA:  # start of scan
                break
            if not 0xE1 <= marker <= 0xED:
                kept.append(data[start:position])
    except (IndexError, struct.error):
        return None
    if frame is None:
        return None
    return _JpegHeader(*frame, orientation or 1, b"".join(kept) + data[start:])


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

"""From an encoded image to RGB pixels, defined as what Pillow's `convert('RGB')` gives.

Ordinary JPEGs, nearly all photos, are decoded faster and bit-identically by simplejpeg, and
`open_image` decodes no more of them than a crop needs.
"""

import contextlib
import io
import struct
import threading
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# Markers of JPEG segments: the frame's, if baseline, extended or progressive; and EXIF's.
_FRAMES, _EXIF = (0xC0, 0xC1, 0xC2), 0xE1
_PROGRESSIVE = 0xC2
# Rows below a crop that have a say in its last ones. Chroma is interpolated between rows; and where
# scans of a progressive JPEG are missing, libjpeg smooths, over two more blocks in each direction.
_MARGIN, _PROGRESSIVE_MARGIN = 16, 48

# What simplejpeg raises for a header that libjpeg refuses, and for one with a subsampling it has no
# name for, such as 4:4:1.
_UNKNOWN = (ValueError, KeyError)

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
        exif, _ = _jpeg_segments(data).get(_EXIF, (b"", 0))
        return _upright(pixels, _exif_orientation(exif))
    try:
        with _open(data) as image:
            _check_size(*image.size, max_pixels)
            return _upright(_to_rgb(image), _exif_orientation(image.info.get("exif", b"")))
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"it is not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file"
                            ) from error
    except Exception as error:  # a parser of damaged files raises anything
        reason = str(error) or type(error).__name__
        raise BadImageError(f"it is damaged or incomplete ({reason})") from error


class Whole:
    """An image that is already decoded, with the interface of `Jpeg`."""

    def __init__(self, pixels: np.ndarray):
        """`pixels`: uint8 [H, W, 3]."""
        self._pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def crop(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int] | None = None
    ) -> np.ndarray:
        """The pixels of (top, left, height, width), as a view; all of them, whatever `at_least`."""
        top, left, height, width = box
        return self._pixels[top:top + height, left:left + width]


class Jpeg:
    """An ordinary JPEG, of which no more is decoded than a crop needs.

    Attributes:
      height, width: in pixels, upright.
    """

    def __init__(
        self, data: bytes, size: tuple[int, int], frame: int, orientation: int, max_pixels: int
    ):
        """`size` is (height, width) as stored, `frame` the position of the frame header's body in
        `data`, `orientation` EXIF's."""
        self._data, self._stored, self._frame = data, size, frame
        self._orientation, self._max_pixels = orientation, max_pixels
        self.height, self.width = size if orientation < 5 else size[::-1]

    def crop(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int] | None = None
    ) -> np.ndarray:
        """The pixels of (top, left, height, width), as a view; without `at_least` to the bit those
        of `decode_image`.

        What is below the box is not decoded: the height in the header is changed to end there.

        Args:
          box: (top, left, height, width).
          at_least: (height, width) for a box that may come at 1/2, 1/4 or 1/8 of its size, the
            smallest that keeps so many pixels, and widened to whole ones. libjpeg then takes the
            lowest frequencies of every block of 8x8 pixels, which is much like their mean.

        Raises:
          BadImageError: it cannot be decoded.
        """
        top, left, height, width = _stored_box(box, self._stored, self._orientation)
        if at_least and self._orientation >= 5:  # lies on its side
            at_least = at_least[::-1]
        scale = _scale(height, width, at_least) if at_least else 1
        marker = self._data[self._frame - 3]
        margin = _PROGRESSIVE_MARGIN if marker == _PROGRESSIVE else _MARGIN
        rows = min(self._stored[0], top + height + margin)
        at = self._frame + 1  # after the precision: 16 bits of height
        shorter = b"".join((self._data[:at], rows.to_bytes(2, "big"), self._data[at + 2:]))
        try:
            # Not strict, since libjpeg warns about the data that are left over.
            pixels = simplejpeg.decode_jpeg(
                shorter, min_height=-(-rows // scale), min_width=-(-self._stored[1] // scale),
                min_factor=scale, strict=False)
        except ValueError:
            return Whole(decode_image(self._data, max_pixels=self._max_pixels)).crop(box)
        return _UPRIGHT[self._orientation](
            pixels[top // scale:-(-(top + height) // scale),
                   left // scale:-(-(left + width) // scale)])


def _stored_box(box, stored, orientation):
    """Where in a stored image of (height, width) the pixels of an upright box are."""
    top, left, height, width = box
    if orientation >= 5:
        top, left, height, width = left, top, width, height
    if orientation in (3, 4, 6, 7):
        top = stored[0] - top - height
    if orientation in (2, 3, 7, 8):
        left = stored[1] - left - width
    return top, left, height, width


def _scale(height, width, at_least):
    """The largest of libjpeg's fast scales that leaves a box at least so large."""
    for scale in (8, 4, 2):
        if height >= scale * at_least[0] and width >= scale * at_least[1]:
            return scale
    return 1


def open_image(data: bytes | np.ndarray, *, max_pixels: int) -> Jpeg | Whole:
    """Any image that `decode_image` can decode, with `height`, `width` and `crop(box)`.

    Ordinary JPEGs, which are in colour and whole as far as their end tells, are not decoded here.
    Arguments and errors are those of `decode_image`.
    """
    if isinstance(data, bytes) and data.startswith(b"\xff\xd8"):
        segments = _jpeg_segments(data)
        frames = [segments[marker][1] for marker in _FRAMES if marker in segments]
        whole = data.rstrip(b"\0").endswith(b"\xff\xd9")
        if frames and whole:
            with contextlib.suppress(*_UNKNOWN):
                height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
                _check_size(width, height, max_pixels)
                if colours in ("YCbCr", "RGB"):
                    exif, _ = segments.get(_EXIF, (b"", 0))
                    return Jpeg(data, (height, width), frames[0], _exif_orientation(exif),
                                max_pixels)
    return Whole(decode_image(data, max_pixels=max_pixels))


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
    except _UNKNOWN:
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


def _jpeg_segments(data: bytes) -> dict[int, tuple[bytes, int]]:
    """Body and its position of the segments of a JPEG before its pixels, by marker (ITU T.81, B.1);
    of several with the same marker the first, but under _EXIF the one that holds EXIF."""
    found, position = {}, 2
    try:
        while data[position] == 0xFF:
            while data[position] == 0xFF:  # any number of fill bytes
                position += 1
            marker, length = data[position], int.from_bytes(data[position + 1:position + 3], "big")
            body = data[position + 3:position + 1 + length]
            if marker != _EXIF or body.startswith(b"Exif\0\0"):
                found.setdefault(marker, (body, position + 3))
            if marker == 0xDA:  # start of scan
                break
            position += 1 + length
    except IndexError:
        pass
    return found


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

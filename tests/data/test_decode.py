import concurrent.futures
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from image_files import edged_photo as photo
from image_files import encode
from PIL import Image, ImageOps

from vit_jax.data import decode
from vit_jax.data.decode import BadImageError, decode_image

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("error")]

LIMIT = 1_000_000
ORIENTATION = 0x0112


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def check(data, expected):
    """Exactly these pixels, in the promised form, and without a warning (see pytestmark)."""
    pixels = decode_image(data, max_pixels=LIMIT)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)


def refusal(data, max_pixels=LIMIT) -> str:
    with pytest.raises(BadImageError) as error:
        decode_image(data, max_pixels=max_pixels)
    assert isinstance(error.value, ValueError)
    return str(error.value)


def png(mode: int, bits: int, rows: list[bytes], width: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, for what Pillow cannot write. `mode` is the PNG colour type."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(
            ">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, len(rows), bits, mode, 0, 0, 0)
    chunks = [(b"IHDR", head), *extra, (b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")


# JPEG: the short way through simplejpeg must not be seen.


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8), (17, 33), (37, 53), (64, 63), (240, 321)])
def test_jpeg_is_bit_identical_to_pillow(size):
    image = photo(*size)
    files = [
        encode(image, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive,
               restart_marker_blocks=restart)
        for quality in (30, 75, 95) for subsampling in (0, 1, 2)
        for progressive in (False, True) for restart in (0, 2)
    ]
    files += [simplejpeg.encode_jpeg(np.array(image), quality=80, colorsubsampling=subsampling)
              for subsampling in ("444", "422", "420", "440", "411")]
    files += [encode(image, "JPEG", keep_rgb=True), encode(image, "JPEG", optimize=True)]
    for data in files:
        check(data, pillow(data))


def test_a_subsampling_that_simplejpeg_does_not_know():
    """4:4:1: four rows of chroma to one of brightness."""
    data = bytearray(encode(photo(37, 53), "JPEG", subsampling="4:4:4"))
    data[data.index(b"\xff\xc0") + 11] = 0x14
    check(bytes(data), pillow(bytes(data)))
    assert isinstance(decode.open_image(bytes(data), max_pixels=LIMIT), decode.Whole)


def test_cifar10_is_bit_identical_to_pillow(cifar10_dir):
    from vit_jax.data.sources import open_eval

    source = open_eval("tfds:cifar10", dir=cifar10_dir, eval_split=None, image_size=(32, 32))
    for index in range(0, 10_000, 50):
        check(source[index].image, pillow(source[index].image))


def test_ordinary_jpegs_take_the_short_way(monkeypatch):
    monkeypatch.setattr(decode, "_open", None)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for options in ({}, {"exif": exif}, {"progressive": True}):
        assert decode_image(encode(photo(), "JPEG", **options), max_pixels=LIMIT).size


def test_what_the_short_way_refuses_is_decided_by_pillow():
    """A JPEG with rubbish before its next restart marker: libjpeg warns, Pillow shows it."""
    data = encode(photo(64, 64), "JPEG", restart_marker_blocks=1)
    at = data.index(b"\xff\xd3")
    damaged = data[:at] + b"\x12\x34\x56" + data[at:]
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(damaged, strict=True)
    check(damaged, pillow(damaged))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, kind, order):
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F] = "a camera"  # so that it is not the first entry
    exif[ORIENTATION] = orientation
    data = encode(photo(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert expected.shape == ((53, 37, 3) if orientation > 4 else (37, 53, 3))
    check(data, expected)


def test_exif_orientation_of_a_grey_jpeg():
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    data = encode(photo().convert("L"), "JPEG", exif=exif)
    check(data, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("exif", [
    b"Exif\0\0",
    b"Exif\0\0II*\0",
    b"Exif\0\0II*\0\xff\xff\xff\xff",
    b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x1a\0\x05\0\0\0\x01\xff\xff\xff\xff" * 3,
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\0\0\0",
])
def test_exif_that_makes_no_sense_is_ignored_in_silence(exif, mode):
    image = photo().convert(mode)
    plain, data = encode(image, "JPEG"), encode(image, "JPEG", exif=exif)
    data = data.replace(b"JFIF", b"JUNK")  # without JFIF, Pillow looks for the resolution in EXIF
    check(data, pillow(plain))


def test_png_that_is_no_proper_animation():
    rows = [bytes(range(9))] * 3
    check(png(2, 8, rows, 3, (b"acTL", struct.pack(">II", 0, 0))), pillow(png(2, 8, rows, 3)))


# Modes


def test_grey_jpeg():
    data = encode(photo().convert("L"), "JPEG")
    check(data, pillow(data))


@pytest.mark.parametrize("adobe_transform", [None, 0, 2])
def test_cmyk_and_ycck_jpeg(adobe_transform):
    """As Adobe writes them, inverted; transform 2 says that the file is YCCK."""
    data = encode(photo().convert("CMYK"), "JPEG")
    at = data.index(b"Adobe")
    if adobe_transform is None:
        data = data[: at - 4] + data[at + 12:]
    else:
        data = data[: at + 11] + bytes([adobe_transform]) + data[at + 12:]
    expected = pillow(data)
    check(data, expected)
    if adobe_transform == 0:
        assert np.abs(expected.astype(int) - np.asarray(photo())).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA"])
def test_png_modes(mode):
    image = photo().convert(mode)
    if mode == "PA":  # cannot be written as PNG: test what is done to it
        np.testing.assert_array_equal(decode._to_rgb(image), np.asarray(image.convert("RGB")))
        return
    check(encode(image, "PNG"), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_not_composited():
    colour = np.asarray(photo())
    transparent = np.dstack([colour, np.zeros(colour.shape[:2], np.uint8)])
    check(encode(Image.fromarray(transparent), "PNG"), colour)
    check(encode(Image.fromarray(transparent), "WEBP", lossless=True, exact=True), colour)
    grey = np.dstack([colour[..., 0], colour[..., 1]])
    check(encode(Image.fromarray(grey, "LA"), "PNG"), np.repeat(colour[..., :1], 3, axis=-1))


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 200, 10))])
def test_palette_with_transparency(transparency):
    image = photo().quantize(20)
    data = encode(image, "PNG", transparency=transparency)
    check(data, np.asarray(image.convert("RGB")))
    check(encode(image, "GIF", transparency=3), np.asarray(image.convert("RGB")))


def test_grey_and_colour_with_a_transparent_value():
    for mode, value in (("L", 10), ("RGB", (250, 10, 60)), ("1", 0)):
        image = photo().convert(mode)
        check(encode(image, "PNG", transparency=value), np.asarray(image.convert("RGB")))


def test_16_bits_keep_the_upper_8():
    values = np.array([[0, 1, 255, 256], [257, 0x1234, 0xABCD, 0xFFFF]], np.uint16)
    upper = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    assert upper.max() == 255
    check(encode(Image.fromarray(values), "PNG"), upper)
    for colour_type, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        pixels = np.repeat(values[..., None], channels, -1)
        if channels in (2, 4):
            pixels[..., -1] = 0
        rows = [row.astype(">u2").tobytes() for row in pixels]
        check(png(colour_type, 16, rows, 4), upper)


def test_32_bit_grey_is_what_older_pillow_makes_of_16_bits():
    values = np.array([[-5, 0, 255, 0x1234], [0xFFFF, 70_000, 256, 1]], np.int32)
    grey = decode._to_rgb(Image.fromarray(values, "I"))[..., 0]
    assert grey.tolist() == [[0, 0, 0, 0x12], [255, 255, 1, 0]]


@pytest.mark.parametrize("kind", ["BMP", "WEBP", "GIF"])
def test_other_formats(kind):
    for mode in ("RGB", "L", "P"):
        if (kind, mode) != ("WEBP", "P"):
            data = encode(photo().convert(mode), kind)
            check(data, pillow(data))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "MPO"])
def test_first_frame(kind):
    options = {"save_all": True, "append_images": [photo(seed=1), photo(seed=2)]}
    if kind == "WEBP":
        options["lossless"] = True
    data = encode(photo(seed=0), kind, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    check(data, pillow(data))
    if kind != "GIF":  # which has to choose 256 colours
        assert np.abs(pillow(data).astype(int) - np.asarray(photo(seed=0))).mean() < 12
        assert np.abs(pillow(data).astype(int) - np.asarray(photo(seed=1))).mean() > 24


# Arrays


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_arrays(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    three = pixels[..., :3] if pixels.shape[-1] in (3, 4) else pixels.reshape(5, 7, 1)
    check(pixels, np.broadcast_to(three, (5, 7, 3)))
    check(np.asfortranarray(pixels), np.broadcast_to(three, (5, 7, 3)))


@pytest.mark.parametrize(("pixels", "complaint"), [
    (np.zeros((5, 7, 3), np.float32), "must be uint8, not float32"),
    (np.zeros((5, 7, 2), np.uint8), r"not \[5, 7, 2\]"),
    (np.zeros((0, 7, 3), np.uint8), r"not \[0, 7, 3\]"),
    (np.zeros((1, 5, 7, 3), np.uint8), r"not \[1, 5, 7, 3\]"),
    (np.zeros((2000, 1000, 3), np.uint8), "1000 x 2000 pixels are more than max_pixels=1000000"),
])
def test_bad_arrays(pixels, complaint):
    with pytest.raises(BadImageError, match=complaint):
        decode_image(pixels, max_pixels=LIMIT)


# Damage


@pytest.mark.parametrize("data", [
    b"this is not an image", b"\xff\xd8", b"\xff\xd8" + b"\xff" * 99, b"<svg></svg>", b"\0" * 1000,
    encode(photo(), "TIFF"), encode(photo(), "PPM"), encode(photo().convert("F"), "TIFF"),
])
def test_not_an_image(data):
    assert refusal(data) == "it is not a JPEG, PNG, WEBP, BMP or GIF file"


def test_empty():
    assert refusal(b"") == "the file is empty"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_truncated(kind, mode):
    data = encode(photo(200, 200).convert(mode), kind)
    for part in (0.01, 0.1, 0.5, 0.9):
        reason = refusal(data[:int(part * len(data))])
        assert reason and "\n" not in reason and len(reason) < 120


def test_damaged_anywhere_is_decoded_or_refused():
    """Whatever a parser makes of it: pixels or BadImageError, no other exception, no warning."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    files = [encode(photo(), kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")]
    files += [encode(photo().convert("CMYK"), "JPEG"), encode(photo(), "BMP"),
              encode(photo(), "GIF"), encode(photo(), "PNG", save_all=True,
                                             append_images=[photo(seed=1)])]
    refused = 0
    for data in files:
        for _ in range(150):
            damaged = bytearray(data)
            for at in rng.integers(0, min(len(data), 300), 3):
                damaged[at] = rng.integers(256)
            try:
                pixels = decode_image(bytes(damaged), max_pixels=LIMIT)
            except BadImageError:
                refused += 1
            else:
                assert pixels.ndim == 3 and pixels.shape[-1] == 3
    assert 100 < refused < 150 * len(files)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_max_pixels(kind, mode, monkeypatch):
    data = encode(photo(50, 40).convert(mode), kind)
    assert refusal(data, max_pixels=1999) == "40 x 50 pixels are more than max_pixels=1999"
    # Pillow's own limit neither replaces ours nor warns.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode_image(data, max_pixels=2000).shape == (50, 40, 3)


def test_bombs_are_refused_from_the_header(monkeypatch):
    monkeypatch.setattr(decode, "_to_rgb", None)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    jpeg = bytearray(encode(photo(), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5:at + 9] = struct.pack(">HH", 65_000, 64_000)
    assert refusal(bytes(jpeg)) == "64000 x 65000 pixels are more than max_pixels=1000000"
    # A marker without a length, and where its length would lead, a small frame.
    hidden = b"\xff\xd8\xff\xd0" + jpeg[2:].ljust(0xFFE0) + encode(photo(), "JPEG")[2:]
    assert refusal(hidden) == "64000 x 65000 pixels are more than max_pixels=1000000"
    bomb = png(0, 1, [b"\0" * 25_000], 200_000)
    at = bomb.index(b"IHDR")
    head = b"IHDR" + struct.pack(">II", 200_000, 200_000) + bomb[at + 12:at + 17]
    bomb = bomb[:at] + head + struct.pack(">I", zlib.crc32(head)) + bomb[at + 21:]
    assert "200000 x 200000 pixels" in refusal(bomb, max_pixels=100_000_000)


def test_nothing_on_stderr(capfd):
    for data in (encode(photo(), "JPEG")[:400], b"\xff\xd8\xff\xe0\0\x10JFIF"):
        refusal(data)
    assert capfd.readouterr() == ("", "")


def test_many_threads():
    files = [encode(photo(seed=seed), kind) for seed in range(8) for kind in ("JPEG", "PNG", "GIF")]
    expected = [pillow(data) for data in files]
    filters = list(warnings.filters)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(lambda data: decode_image(data, max_pixels=LIMIT), files * 10))
    for pixels, wanted in zip(decoded, expected * 10, strict=True):
        np.testing.assert_array_equal(pixels, wanted)
    assert warnings.filters == filters

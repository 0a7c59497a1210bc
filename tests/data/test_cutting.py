"""Parts of an image, decoded no further than needed: to the bit those of the whole."""

import io

import numpy as np
import pytest
import simplejpeg
from image_files import edged_photo as photo
from image_files import encode
from PIL import Image

from vit_jax.data import augment
from vit_jax.data.decode import BadImageError, Jpeg, Whole, decode_image, open_image

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("error")]

LIMIT = 1_000_000
ORIENTATION = 0x0112


def boxes(height, width, count=12):
    """Random ones, and the corners."""
    rng = np.random.default_rng(0)
    yield from [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1)]
    for _ in range(count):
        tall, wide = (int(rng.integers(1, side + 1)) for side in (height, width))
        yield int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1)), tall, wide


@pytest.mark.parametrize("options", [
    {}, {"restart_marker_blocks": 2}, {"optimize": True}, {"progressive": True},
    {"progressive": True, "restart_marker_blocks": 2},
], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("shape", [(37, 53), (96, 64), (1, 1), (130, 20)])
def test_a_part_of_a_jpeg_is_to_the_bit_that_of_the_whole(shape, subsampling, options):
    data = encode(photo(*shape), "JPEG", quality=90, subsampling=subsampling, **options)
    whole = decode_image(data, max_pixels=LIMIT)
    image = open_image(data, max_pixels=LIMIT)
    assert isinstance(image, Jpeg) and (image.height, image.width) == shape
    for top, left, height, width in boxes(*shape):
        np.testing.assert_array_equal(
            image.crop((top, left, height, width)),
            whole[top:top + height, left:left + width])


def test_a_part_does_not_decode_what_is_below_it(monkeypatch):
    rows = []

    def decoded(data, **options):
        pixels = original(data, **options)
        rows.append(len(pixels))
        return pixels

    original = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", decoded)
    image = open_image(encode(photo(200, 50), "JPEG"), max_pixels=LIMIT)
    assert not rows
    image.crop((10, 5, 70, 20))
    assert rows == [10 + 70 + 16]


def test_a_part_of_a_progressive_jpeg_whose_last_scans_are_missing():
    """libjpeg smooths what it has, over many rows."""
    data = encode(photo(200, 40), "JPEG", progressive=True, subsampling="4:2:0")
    scans = [at for at in range(len(data)) if data.startswith(b"\xff\xda", at)]
    for end in scans[1:4]:
        cut = data[:end] + b"\xff\xd9"
        whole = decode_image(cut, max_pixels=LIMIT)
        image = open_image(cut, max_pixels=LIMIT)
        assert isinstance(image, Jpeg)
        for height in range(1, 150, 5):
            np.testing.assert_array_equal(image.crop((0, 0, height, 40)), whole[:height])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_part_of_a_turned_jpeg(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(photo(150, 90), "JPEG", exif=exif.tobytes())
    whole = decode_image(data, max_pixels=LIMIT)
    image = open_image(data, max_pixels=LIMIT)
    assert isinstance(image, Jpeg) and (image.height, image.width) == whole.shape[:2]
    for top, left, height, width in boxes(image.height, image.width):
        np.testing.assert_array_equal(
            image.crop((top, left, height, width)), whole[top:top + height, left:left + width])
    for size in ((24, 32), (image.height, image.width)):  # it can be resized, or need not be
        kept, cut = (augment.inception_crop(one, size, np.random.default_rng(0), area=(1, 1),
                                            aspect=(0.1, 10), antialias=False)
                     for one in (Whole(whole), image))
        np.testing.assert_array_equal(kept, cut)
    # Twice as small in one direction alone, so that a mix-up of the two is noticed.
    tall, wide = image.height // 2, image.width // 2 - 10
    small = image.crop((0, 0, image.height, image.width), at_least=(tall, wide))
    assert small.shape[:2] == (-(-image.height // 2), -(-image.width // 2))
    assert image.crop((0, 0, *whole.shape[:2]), at_least=(tall + 1, wide)).shape == whole.shape


@pytest.mark.parametrize("data", [
    encode(photo().convert("L"), "JPEG"), encode(photo().convert("CMYK"), "JPEG"),
    encode(photo(), "PNG"), np.asarray(photo()),
], ids=["grey", "cmyk", "png", "pixels"])
def test_other_images_are_decoded_before_they_are_cut(data):
    image = open_image(data, max_pixels=LIMIT)
    assert isinstance(image, Whole)
    expected = decode_image(data, max_pixels=LIMIT)
    assert (image.height, image.width) == expected.shape[:2]
    np.testing.assert_array_equal(image.crop((3, 5, 20, 11)), expected[3:23, 5:16])
    np.testing.assert_array_equal(image.crop((3, 5, 20, 11), at_least=(2, 2)), expected[3:23, 5:16])


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("options", [{}, {"subsampling": "4:4:4"}, {"progressive": True}], ids=str)
def test_a_part_at_a_smaller_scale(scale, options):
    """Near the means of the pixels it stands for, and to the bit a part of the whole image at that
    scale, wherever the box is."""
    colours = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    smooth = Image.fromarray(colours).resize((261, 195), Image.Resampling.BICUBIC)
    data = encode(smooth, "JPEG", quality=95, **options)
    means = np.asarray(Image.open(io.BytesIO(data)).reduce(scale), int)
    image = open_image(data, max_pixels=LIMIT)
    whole = image.crop((0, 0, 195, 261), at_least=(195 // scale, 261 // scale))
    assert whole.shape == means.shape
    assert np.abs(whole - means)[:-1, :-1].max() <= 6  # the last ones have fewer pixels to mean
    for top, left, height, width in boxes(195, 261):
        target = max(1, height // scale), max(1, width // scale)
        got = image.crop((top, left, height, width), at_least=target)
        if height < scale or width < scale:
            continue
        rows, columns = -(-(top + height) // scale), -(-(left + width) // scale)
        np.testing.assert_array_equal(got, whole[top // scale:rows, left // scale:columns])
        assert got.shape[0] >= target[0] and got.shape[1] >= target[1]


def test_cutting_refuses_what_decoding_refuses():
    data = encode(photo(200, 200), "JPEG")
    for bad, limit in ((data[: len(data) // 2], LIMIT), (b"", LIMIT), (data, 100)):
        with pytest.raises(BadImageError) as decoded:
            decode_image(bad, max_pixels=limit)
        with pytest.raises(BadImageError) as cut:
            open_image(bad, max_pixels=limit)
        assert str(cut.value) == str(decoded.value)


def test_libjpegs_refusal_of_a_part_leads_to_the_whole():
    """A quantisation table is gone: libjpeg gives up, and so do we in the end."""
    data = encode(photo(), "JPEG")
    at = data.index(b"\xff\xdb")
    damaged = data[:at] + b"\xff\xfe" + data[at + 2:]  # a comment in the first table's place
    with pytest.raises(BadImageError):
        decode_image(damaged, max_pixels=LIMIT)
    with pytest.raises(BadImageError, match="damaged"):
        open_image(damaged, max_pixels=LIMIT).crop((0, 0, 10, 10))


def test_a_damaged_jpeg_keeps_the_pixels_that_libjpeg_makes_of_it():
    data = bytearray(encode(photo(120, 120), "JPEG", quality=95))
    middle = len(data) // 2
    data[middle:middle + 3] = b"\x55\xaa\x55"
    whole = decode_image(bytes(data), max_pixels=LIMIT)
    np.testing.assert_array_equal(
        open_image(bytes(data), max_pixels=LIMIT).crop((20, 10, 50, 60)), whole[20:70, 10:70])

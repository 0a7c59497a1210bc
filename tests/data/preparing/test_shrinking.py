import io

import numpy as np
import pytest
from image_files import encode, photo
from PIL import Image

from vit_jax.config_keys import FIELDS
from vit_jax.data.decode import BadImageError, decode_image
from vit_jax.data.preparing import shrinking
from vit_jax.data.preparing.shrinking import fit_image


def fit(data, resize=None, quality=95):
    return fit_image(data, resize=resize, quality=quality)


def decode(data):
    return decode_image(data, max_pixels=10**9)


@pytest.mark.parametrize("size", [(100, 301), (301, 100), (65, 67), (64, 500)])
def test_the_short_side_is_shrunk_as_torchvision_does(size):
    """Its Resize keeps `int(long * short' / short)` of the long side."""
    data = encode(photo(*size), quality=95)
    short = min(size)
    expected = tuple(side * 64 // short for side in size)
    result = decode(fit(data, 64))
    assert result.shape == (*expected, 3)
    direct = Image.open(io.BytesIO(data)).resize(expected[::-1], Image.Resampling.BICUBIC)
    # What is left is JPEG's loss at quality 95, on smooth colours a grey level or two.
    assert np.abs(result.astype(int) - np.asarray(direct)).mean() < 2


def test_high_frequencies_do_not_alias():
    """Stripes of one pixel are grey at a quarter of the size; nearest pixels would show stripes."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    result = decode(fit(encode(stripes, "PNG"), 64))
    assert np.abs(result[8:-8, 8:-8].astype(int) - 127.5).max() < 4


def test_quality():
    noise = encode(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8), "PNG")
    files = [fit(noise, 64, quality) for quality in (10, 95, 100)]
    assert len(files[0]) < len(files[1]) < len(files[2])
    with Image.open(io.BytesIO(files[1])) as image:
        assert image.format == "JPEG" and image.layer[0][1:3] == (2, 2)  # 4:2:0
        written = image.quantization
    # Pillow's tables for the same quality; both scale those of the standard (ITU T.81, K.1).
    assert written == Image.open(io.BytesIO(encode(photo(8, 8), quality=95))).quantization


@pytest.mark.parametrize("resize", [None, 64, 100])
def test_a_small_jpeg_stays_as_it_is(resize):
    for mode in ("RGB", "L", "CMYK"):
        data = encode(photo(64, 90), mode=mode)
        assert fit(data, resize) is data


def test_without_resize_every_file_stays_as_it_is():
    grey16 = (photo(200, 200)[..., 0].astype(np.uint16) << 8) + 77
    for data in (encode(photo(200, 200), "PNG"), encode(photo(200, 200), "WEBP"),
                 encode(grey16, "PNG"), encode(photo(200, 200), mode="CMYK")):
        assert fit(data) is data


def test_with_resize_other_forms_become_jpeg():
    grey16 = np.full((80, 80), 40_000, np.uint16)
    for form, pixels, size in (("PNG", grey16, (64, 64)), ("WEBP", photo(30, 40), (30, 40)),
                               ("PNG", photo(640, 480), (85, 64))):
        result = fit(encode(pixels, form), 64)
        assert result.startswith(b"\xff\xd8")
        assert decode(result).shape == (*size, 3)
    assert np.abs(decode(fit(encode(grey16, "PNG"), 64)).astype(int) - (40_000 >> 8)).max() <= 1


def test_shrunk_images_stand_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    data = encode(photo(100, 300), exif=exif)
    assert decode(fit(data, 50)).shape == (150, 50, 3)
    with Image.open(io.BytesIO(fit(data, 50))) as image:
        assert not image.getexif()
    assert fit(data, 100) is data  # and decoded upright


def test_what_cannot_be_used():
    for data in (b"", b"text", encode(photo(80, 80))[:300]):
        for resize in (None, 64):
            with pytest.raises(BadImageError):
                fit(data, resize)


def test_the_largest_images(monkeypatch):
    assert shrinking._LARGEST_TRAINED == FIELDS["data.max_pixels"].default
    monkeypatch.setattr(shrinking, "_LARGEST_TRAINED", 100 * 100)
    monkeypatch.setattr(shrinking, "_LARGEST_SHRUNK", 300 * 300)
    data = encode(photo(200, 200))
    with pytest.raises(BadImageError, match="max_pixels=10000"):
        fit(data)
    assert decode(fit(data, 64)).shape == (64, 64, 3)
    with pytest.raises(BadImageError, match="max_pixels=90000"):
        fit(encode(photo(301, 300)), 64)
    with pytest.raises(BadImageError, match="even when shrunk"):
        fit(encode(np.zeros((64, 200, 3), np.uint8), "PNG"), 64)


def test_the_longest_jpeg():
    assert decode(fit(encode(np.zeros((65_500, 1, 3), np.uint8), "PNG"), 64)).shape[0] == 65_500
    with pytest.raises(BadImageError, match="1 x 65501 pixels are too many, even when shrunk"):
        fit(encode(np.zeros((65_501, 1, 3), np.uint8), "PNG"), 64)

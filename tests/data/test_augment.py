import cv2
import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image

from vit_jax.data import augment
from vit_jax.data.decode import Whole, decode_image, open_image
from vit_jax.errors import UserError

pytestmark = pytest.mark.core

SIZES = [((32, 48), (16, 24)), ((37, 53), (24, 24)), ((24, 24), (60, 41)), ((1, 1), (5, 7)),
         ((100, 3), (8, 8)), ((33, 65), (33, 32)), ((300, 200), (224, 224)), ((9, 400), (8, 8))]


def noise(height, width, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def coordinates(height, width) -> np.ndarray:
    """An image whose pixels say where they are: row, column, and 255 for 'inside'."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 255)], -1).astype(np.uint8)


def bilinear(image, size) -> np.ndarray:
    """Bilinear interpolation with half-pixel centres as it is defined, in float64."""
    for axis, (old, new) in enumerate(zip(image.shape[:2], size, strict=True)):
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        weight = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
        image = np.take(image, low, axis) * (1 - weight) + np.take(image, high, axis) * weight
    return image


# resize


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_resize_without_antialiasing_is_bilinear(old, new):
    resized = augment.resize(noise(*old), new, antialias=False)
    assert resized.shape == (*new, 3) and resized.dtype == np.uint8
    assert np.abs(resized - bilinear(noise(*old), new)).max() <= 1


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("antialias", [False, True])
def test_resize_agrees_with_torch(old, new, antialias):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    image = torch.tensor(noise(*old)).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(
        image, size=new, mode="bilinear", align_corners=False, antialias=antialias)
    resized = augment.resize(noise(*old), new, antialias=antialias)
    assert np.abs(resized - expected[0].permute(1, 2, 0).numpy()).max() <= 1 + 1e-9


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_resize_with_antialiasing_is_pillow(old, new):
    expected = Image.fromarray(noise(*old)).resize(new[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(augment.resize(noise(*old), new, antialias=True), expected)


def test_resize_closed_forms():
    ramp = np.repeat(np.array([[0, 100]], np.uint8)[..., None], 3, -1)
    for antialias in (False, True):
        assert augment.resize(ramp, (1, 4), antialias=antialias)[0, :, 0].tolist() == [
            0, 25, 75, 100]
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    # A quarter of the width: without the filter only the two columns in the middle are seen.
    assert (augment.resize(stripes, (8, 16), antialias=False) == 100).all()
    stripes[:] = 0
    stripes[:, 1::4] = stripes[:, 2::4] = 200
    assert (augment.resize(stripes, (8, 16), antialias=False) == 200).all()
    # The eight columns of the filter weigh (1, 3, 5, 7, 7, 5, 3, 1) / 32.
    assert (augment.resize(stripes, (8, 16), antialias=True)[:, 1:-1] == 100).all()


@pytest.mark.parametrize("antialias", [False, True])
def test_same_size_is_the_same_image(antialias):
    image = noise(20, 30)
    np.testing.assert_array_equal(augment.resize(image, (20, 30), antialias=antialias), image)
    np.testing.assert_array_equal(augment.squash(image, (20, 30), antialias=antialias), image)


@pytest.mark.parametrize("antialias", [False, True])
def test_resize_of_a_part_and_of_read_only_pixels(antialias):
    image = noise(40, 50)
    image.setflags(write=False)
    part = image[3:21, 5:42]
    np.testing.assert_array_equal(
        augment.resize(part, (9, 9), antialias=antialias),
        augment.resize(np.array(part), (9, 9), antialias=antialias))


def test_opencv_starts_no_threads():
    assert cv2.getNumThreads() == 1


# inception_crop


def boxes(count=4000, height=200, width=300, area=(0.05, 1.0), aspect=(0.75, 4 / 3)):
    rng = np.random.default_rng(0)
    return np.array([augment.inception_box(height, width, rng, area=area, aspect=aspect)
                     for _ in range(count)])


def test_inception_boxes_are_inside_and_in_range():
    top, left, height, width = boxes().T
    assert top.min() == 0 and left.min() == 0
    assert (top + height).max() == 200 and (left + width).max() == 300
    share, aspect = height * width / 60_000, width / height
    assert 0.049 < share.min() < 0.06 and 0.85 < share.max() <= 1
    # A side is rounded to a pixel, so the ends of the range are met to about 1 / 50.
    assert 0.73 < aspect.min() < 0.76 and 1.31 < aspect.max() < 1.36


def test_inception_boxes_are_drawn_as_tensorflows():
    """Measured of 100,000 boxes by TensorFlow 2.21.0, `tf.image.sample_distorted_bounding_box(
    tf.constant([375, 500, 3]), tf.zeros((0, 0, 4)), min_object_covered=0, area_range=(0.05, 1.0),
    aspect_ratio_range=(0.75, 4 / 3), max_attempts=100, use_image_if_no_bounding_boxes=True)`."""
    _, _, height, width = boxes(20_000, 375, 500).T
    area = height * width / (375 * 500)
    # Up to 4 standard errors of 20,000 boxes. Areas drawn uniformly give 0.417, 0.07 and 0.37.
    assert abs(area.mean() - 0.3425) < 0.006
    assert abs((area < 0.1).mean() - 0.1415) < 0.01
    assert abs((area > 0.5).mean() - 0.2553) < 0.012
    assert abs((width / height).mean() - 1.0411) < 0.005


def test_inception_boxes_lie_anywhere():
    top, left, height, width = boxes(area=(0.1, 0.2)).T
    for start, room in ((top, 200 - height), (left, 300 - width)):
        place = (start + 0.5) / (room + 1)
        assert np.abs(np.quantile(place, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03


def test_inception_crop_can_be_the_whole_image():
    assert (0, 0, 30, 30) in {tuple(box) for box in boxes(4000, 30, 30).tolist()}
    assert (boxes(20, 100, 100, area=(1.0, 1.0), aspect=(1.0, 1.0)) == (0, 0, 100, 100)).all()


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10), (1, 50)])
def test_inception_crop_that_does_not_fit_is_the_whole_image(shape):
    assert (boxes(50, *shape, area=(0.9, 1.0)) == (0, 0, *shape)).all()


def test_inception_crop():
    image = coordinates(200, 240)
    first, again, other = (
        augment.inception_crop(Whole(image), (32, 40), np.random.default_rng(seed), antialias=False)
        for seed in (0, 0, 1))
    assert first.shape == (32, 40, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    top, left, height, width = augment.inception_box(
        200, 240, np.random.default_rng(0), area=(0.05, 1.0), aspect=(0.75, 4 / 3))
    np.testing.assert_array_equal(
        first, augment.resize(image[top:top + height, left:left + width], (32, 40),
                              antialias=False))
    smooth = augment.inception_crop(Whole(noise(200, 240)), (32, 40), np.random.default_rng(0),
                                    antialias=True)
    rough = augment.inception_crop(Whole(noise(200, 240)), (32, 40), np.random.default_rng(0),
                                   antialias=False)
    assert smooth.std() < rough.std()


@pytest.mark.parametrize("size, antialias", [  # decoded at 1/2, 1/4, 1/8
    (224, False), (128, False), (64, False), (128, True), (64, True), (32, True)])
def test_a_large_photo_decoded_smaller_loses_nothing(size, antialias):
    """Of matplotlib's sample photo, 512x600, quality 95: nearer to the whole photo shrunk with a
    low-pass filter than plain bilinear interpolation of it is. docs/data.md has the numbers."""
    with get_sample_data("grace_hopper.jpg") as file:
        data = file.read()
    whole = decode_image(data, max_pixels=10**6)
    expected = augment.resize(whole, (size, size), antialias=True)
    plain, scaled = (
        augment.inception_crop(
            open_image(data, max_pixels=10**6), (size, size), np.random.default_rng(0),
            area=(1, 1), aspect=(512 / 600, 512 / 600), scaled_decode=smaller, antialias=antialias)
        for smaller in (False, True))
    np.testing.assert_array_equal(plain, augment.resize(whole, (size, size), antialias=antialias))
    assert (plain != scaled).any()
    loss, plain_loss = psnr(scaled, expected), psnr(plain, expected)
    print(f"{size}, antialias={antialias}: {loss:.1f} dB, at full size {plain_loss:.1f} dB")
    # Measured: 42.5 to 47.2 dB, and 6.9 to 11.6 more than at full size; libjpegs may differ.
    assert loss > (42 if antialias else plain_loss + 5)


def psnr(image, other):
    error = np.mean((image.astype(float) - other) ** 2)
    return 10 * np.log10(255**2 / error) if error else np.inf


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 700)])
def test_inception_crop_of_tiny_images(shape):
    for seed in range(20):
        crop = augment.inception_crop(Whole(noise(*shape)), (8, 8), np.random.default_rng(seed),
                                      antialias=bool(seed % 2))
        assert crop.shape == (8, 8, 3)


# pad_crop


def test_pad_crop_reaches_every_shift_and_brings_in_zeros():
    image = coordinates(8, 12)
    seen = set()
    for seed in range(400):
        crop = augment.pad_crop(image, (8, 12), np.random.default_rng(seed), padding=2)
        assert crop.shape == (8, 12, 3) and crop.flags.c_contiguous
        inside = crop[..., 2] == 255
        assert (crop[~inside] == 0).all()
        rows, columns = np.nonzero(inside)
        down, right = rows - crop[inside][:, 0], columns - crop[inside][:, 1]
        assert len(set(down)) == len(set(right)) == 1
        assert inside.sum() == (8 - abs(down[0])) * (12 - abs(right[0]))
        seen.add((int(down[0]), int(right[0])))
    assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


def test_pad_crop_of_another_size_is_resized_first():
    image = noise(64, 40)
    for antialias in (False, True):
        np.testing.assert_array_equal(
            augment.pad_crop(image, (16, 16), np.random.default_rng(0), padding=0,
                             antialias=antialias),
            augment.squash(image, (16, 16), antialias=antialias))


# center_crop


@pytest.mark.parametrize("shape", [(100, 100), (120, 90), (90, 121), (333, 500), (37, 211)])
@pytest.mark.parametrize(("size", "resize_to"), [(32, 36), (33, 36), (32, 32), (64, 73)])
def test_center_crop_is_torchvisions(shape, size, resize_to):
    """Against its documented arithmetic: int(resize_to * long / short), round(margin / 2.0)."""
    height, width = shape
    new_height = resize_to if height <= width else int(resize_to * height / width)
    new_width = resize_to if width <= height else int(resize_to * width / height)
    resized = np.asarray(Image.fromarray(noise(*shape)).resize(
        (new_width, new_height), Image.Resampling.BILINEAR))
    top, left = int(round((new_height - size) / 2.0)), int(round((new_width - size) / 2.0))
    np.testing.assert_array_equal(
        augment.center_crop(noise(*shape), (size, size), resize_to=resize_to, antialias=True),
        resized[top:top + size, left:left + size])


@pytest.mark.parametrize("shape", [(100, 100), (50, 200), (200, 50), (61, 97)])
@pytest.mark.parametrize("size", [(24, 48), (48, 24)])
def test_center_crop_to_a_rectangle(shape, size):
    """Everything of the relatively short side is seen; and the middle stays in the middle."""
    crop = augment.center_crop(coordinates(*shape), size, resize_to=24, antialias=False)
    assert crop.shape == (*size, 3)
    for axis in (0, 1):
        seen = crop[..., axis].astype(float)
        assert abs(seen.mean() - (shape[axis] - 1) / 2) < 3
    scale = max(size[0] / shape[0], size[1] / shape[1])
    for axis in (0, 1):
        span = np.ptp(crop[..., axis].astype(float)) + 1 / scale
        assert abs(span - size[axis] / scale) < 4


def test_center_crop_keeps_the_aspect():
    disc = np.zeros((100, 300, 3), np.uint8)
    disc[(np.mgrid[:100, :300] - [[[50]], [[150]]]).__pow__(2).sum(0) < 30**2] = 255
    crop = augment.center_crop(disc, (50, 50), resize_to=50, antialias=False)[..., 0] > 127
    height, width = np.ptp(np.nonzero(crop), axis=1) + 1
    assert abs(height - 30) <= 1 and abs(width - 30) <= 1


def test_center_crop_smaller_than_the_crop():
    with pytest.raises(UserError, match="32x40 does not fit .* resized to 31 .*eval_resize to 32"):
        augment.center_crop(noise(50, 50), (32, 40), resize_to=31, antialias=False)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (2, 30_000)])
def test_center_crop_of_a_line_takes_little_memory(shape, monkeypatch):
    resized = []
    resize = augment.resize

    def spy(image, size, **how):
        resized.append(size)
        return resize(image, size, **how)

    monkeypatch.setattr(augment, "resize", spy)
    for size in ((64, 64), (32, 64)):
        crop = augment.center_crop(noise(*shape), size, resize_to=64, antialias=False)
        assert crop.shape == (*size, 3)
    assert all(height * width <= 64 * 64 * 64 for height, width in resized)

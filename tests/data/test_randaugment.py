"""The operations against Pillow, SciPy, closed forms and values recorded from Google's code."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage
from sklearn.datasets import load_sample_image

from vit_jax.config import validate
from vit_jax.data import pipeline, randaugment
from vit_jax.data.randaugment import OPERATIONS
from vit_jax.data.records import Record

SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")

# What google-research/big_vision's pp/archive/autoaugment.py makes of `ramps()` at magnitude 10 and
# 15, run in a tf.data pipeline (TensorFlow 2.12.1, TensorFlow Addons 0.20.0, NumPy 1.24.3), at the
# pixels PIXELS. Its random numbers were set: the sign is plus, the cutout's centre (150, 90).
PIXELS = ([10, 60, 110, 160, 210], [20, 30, 110, 190, 180])
GOOGLE = """
AutoContrast 10: 17 1 245, 51 9 245, 125 61 200, 199 155 98, 223 193 75
Equalize 10: 2 8 246, 21 40 246, 123 150 153, 231 233 52, 248 248 36
Invert 10: 205 254 7, 185 246 7, 142 194 42, 99 101 120, 85 64 138
Rotate 10: 128 128 128, 71 8 219, 113 61 187, 156 151 168, 128 128 128
Rotate 15: 128 128 128, 75 7 205, 113 61 187, 151 135 166, 128 128 128
Posterize 10: 48 0 240, 64 0 240, 112 48 208, 144 144 128, 160 176 112
Posterize 15: 48 0 248, 68 8 248, 112 60 212, 156 152 132, 168 188 116
Solarize 10: 205 254 7, 185 246 7, 142 194 42, 99 101 120, 85 64 138
Solarize 15: 50 1 7, 70 9 7, 113 61 42, 99 101 120, 85 64 117
SolarizeAdd 10: 160 111 248, 180 119 248, 223 171 213, 156 154 135, 170 191 227
SolarizeAdd 15: 215 166 248, 235 174 248, 255 226 213, 156 154 135, 170 191 255
Color 10: 56 0 255, 84 0 255, 130 31 255, 159 155 119, 164 204 63
Color 15: 62 0 255, 98 0 255, 147 1 255, 163 157 104, 159 218 10
Contrast 10: 0 0 255, 0 0 255, 38 0 228, 120 116 80, 146 186 45
Contrast 15: 0 0 255, 0 0 255, 0 0 243, 84 78 25, 123 182 0
Brightness 10: 95 1 255, 133 17 255, 214 115 255, 255 255 255, 255 255 222
Brightness 15: 140 2 255, 196 25 255, 255 170 255, 255 255 255, 255 255 255
Sharpness 10: 50 1 255, 70 9 255, 113 61 220, 156 154 142, 170 191 110
Sharpness 15: 51 2 255, 71 10 255, 113 62 227, 156 154 149, 171 191 104
ShearX 10: 51 1 248, 76 14 244, 124 79 185, 128 128 128, 128 128 128
ShearX 15: 51 1 247, 79 17 241, 130 89 168, 128 128 128, 128 128 128
ShearY 10: 52 1 238, 73 10 249, 124 79 206, 175 209 120, 128 128 128
ShearY 15: 53 1 249, 74 11 246, 130 89 215, 128 128 128, 128 128 128
TranslateX 10: 83 6 201, 103 39 195, 146 117 106, 128 128 128, 128 128 128
TranslateX 15: 100 8 153, 120 54 143, 128 128 128, 128 128 128, 128 128 128
TranslateY 10: 83 11 252, 103 24 252, 146 117 185, 128 128 128, 128 128 128
TranslateY 15: 100 16 254, 120 31 222, 128 128 128, 128 128 128, 128 128 128
Cutout 10: 50 1 248, 70 9 248, 128 128 128, 156 154 135, 170 191 117
"""


class Fixed:
    """A generator whose numbers are set."""

    def __init__(self, sign=1, center=(0, 0)):
        self.sign, self.center = sign, center

    def random(self):
        return 0.25 if self.sign > 0 else 0.75

    def integers(self, high):
        return np.array(self.center)


def ramps() -> np.ndarray:
    y, x = np.mgrid[:224, :224]
    channels = [40 + (x + y) // 3, x * y // 197, 255 - x * x // 300 - 7 * y % 32]
    return np.stack(channels, -1).astype(np.uint8)


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


CHINA = load_sample_image("china.jpg")
IMAGES = {
    "photo": CHINA[100:324, 200:424].copy(),
    "wide photo": load_sample_image("flower.jpg")[50:210, 150:390].copy(),
    "noise": noise(37, 53),
    "dull noise": noise(60, 40) // 8 + 90,
    "one colour": np.full((30, 20, 3), [0, 77, 255], np.uint8),
}
images = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())


def difference(ours, theirs) -> int:
    return int(np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max())


@pytest.mark.parametrize("line", GOOGLE.strip().splitlines())
def test_recorded_from_google(line):
    operation, _, pixels = line.partition(": ")
    name, magnitude = operation.split()
    pixels = [[int(value) for value in pixel.split()] for pixel in pixels.split(", ")]
    ours = OPERATIONS[name](ramps(), int(magnitude) / 10, Fixed(center=(150, 90)))
    # Sharpness is the one whose float sums depend on the processor: it may fall on either side of
    # an integer in the blur, which the factors 1.9 and 2.8 then move by up to 2.
    assert difference(ours[PIXELS], pixels) <= (2 if name == "Sharpness" else 0)


# Against Pillow.


@images
def test_those_that_are_pillows(image):
    picture = Image.fromarray(image)
    np.testing.assert_array_equal(randaugment.invert(image), ImageOps.invert(picture))
    np.testing.assert_array_equal(randaugment.equalize(image), ImageOps.equalize(picture))
    for bits in range(1, 9):
        np.testing.assert_array_equal(
            randaugment.posterize(image, bits), ImageOps.posterize(picture, bits))
    for threshold in (0, 1, 100, 128, 255):
        np.testing.assert_array_equal(
            randaugment.solarize(image, threshold), ImageOps.solarize(picture, threshold))
    # Pillow computes in float64, Google in float32; both truncate, so 1 is possible.
    assert difference(randaugment.autocontrast(image), ImageOps.autocontrast(picture)) <= 1


@images
@pytest.mark.parametrize("factor", [0.1, 0.64, 1.0, 1.9, 2.8])
def test_blends_are_pillows(image, factor):
    picture = Image.fromarray(image)
    brightness = ImageEnhance.Brightness(picture).enhance(factor)
    color = ImageEnhance.Color(picture).enhance(factor)
    sharpness = ImageEnhance.Sharpness(picture).enhance(factor)
    # The same blend of the same two images; float32 and truncation make it up to 1.
    assert difference(randaugment.brightness(image, factor), brightness) <= 1
    # The greys differ by at most 1, since Pillow's is rounded, and so do the blurs.
    assert difference(randaugment.color(image, factor), color) <= abs(1 - factor) + 1
    assert difference(randaugment.sharpness(image, factor), sharpness) <= abs(1 - factor) + 1


@images
@pytest.mark.parametrize("factor", [0.1, 1.0, 2.8])
def test_contrast_is_pillows_blend_with_another_grey(image, factor):
    """Pillow takes the mean of the image; Google's histogram sums to the number of pixels."""
    grey = min(image.shape[0] * image.shape[1] / 256, 255)
    degenerate = Image.new("RGB", image.shape[1::-1], (int(grey),) * 3)
    expected = Image.blend(degenerate, Image.fromarray(image), factor)
    assert difference(randaugment.contrast(image, factor), expected) <= 1


@pytest.mark.parametrize(
    ("shape", "grey"), [((8, 8), 0), ((100, 255), 99), ((224, 224), 196), ((300, 300), 255)])
def test_grey_of_contrast(shape, grey):
    black = np.zeros((*shape, 3), np.uint8)
    assert (randaugment.contrast(black, 0.1) == int(grey * 0.9)).all()


# Against SciPy.


@pytest.mark.parametrize("image", [IMAGES["wide photo"], noise(64, 64), noise(37, 91)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0.1, 0.7, 1.0, 1.5, 2.0, 3.0])
def test_shears_and_rotations_are_scipys(image, sign, level):
    middle = (np.array(image.shape[:2]) - 1) / 2
    angle = np.deg2rad(30 * level * sign)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for name, matrix, offset in (
        ("ShearX", np.array([[1, 0], [0.3 * level * sign, 1]]), np.zeros(2)),
        ("ShearY", np.array([[1, 0.3 * level * sign], [0, 1]]), np.zeros(2)),
        ("Rotate", rotation, middle - rotation @ middle),
    ):
        expected = np.stack([
            ndimage.affine_transform(
                channel, matrix, offset, order=0, mode="grid-constant", cval=128)
            for channel in np.moveaxis(image, -1, 0)], -1)
        # Between two pixels the float32 of Google's coordinates decides, and SciPy's are float64.
        source = np.tensordot(matrix, np.indices(image.shape[:2]), 1) + offset[:, None, None]
        clear = (np.abs(source % 1 - 0.5) > 1e-4).all(0)
        assert clear.mean() > 0.8
        ours = OPERATIONS[name](image, level, Fixed(sign))
        np.testing.assert_array_equal(ours[clear], expected[clear])


def test_directions():
    image = noise(31, 31)
    np.testing.assert_array_equal(randaugment.rotate(image, 90.0), np.rot90(image))
    np.testing.assert_array_equal(randaugment.rotate(image, 0.0), image)
    np.testing.assert_array_equal(randaugment.translate_x(image, 7)[:, :-7], image[:, 7:])
    np.testing.assert_array_equal(randaugment.translate_x(image, -7)[:, 7:], image[:, :-7])
    np.testing.assert_array_equal(randaugment.translate_y(image, 7)[:-7], image[7:])
    assert (randaugment.translate_x(image, 7)[:, -7:] == 128).all()
    assert (randaugment.translate_y(image, -7)[:7] == 128).all()


def test_halves_are_rounded_away_from_zero():
    """TensorFlow's std::round. To even would repeat and drop pixels in row 1 of this shear."""
    image = noise(3, 8)
    sheared = randaugment.shear_x(image, 0.5)
    np.testing.assert_array_equal(sheared[1, :-1], image[1, 1:])
    assert (sheared[1, -1] == 128).all()
    sheared = randaugment.shear_x(image, -0.5)
    np.testing.assert_array_equal(sheared[1, 1:], image[1, 1:])
    assert (sheared[1, 0] == 128).all()  # at -0.5


@pytest.mark.parametrize("center", [(0, 0), (20, 9), (39, 29)])
def test_cutout(center):
    image = noise(40, 30) // 2  # without the grey of the cutout
    cut = (randaugment.cutout(image, 6, center) == 128).all(-1)
    y, x = np.mgrid[:40, :30]
    inside = (y >= center[0] - 6) & (y < center[0] + 6) & (x >= center[1] - 6) & (x < center[1] + 6)
    np.testing.assert_array_equal(cut, inside)
    np.testing.assert_array_equal(randaugment.cutout(image, 6, center)[~inside], image[~inside])


# Magnitudes.


@pytest.mark.parametrize(("name", "function", "arguments"), [
    ("Rotate", randaugment.rotate, {0: 0, 10: 30, 15: 45, 20: 60}),
    ("ShearX", randaugment.shear_x, {0: 0, 10: 0.3, 15: 0.45, 20: 0.6}),
    ("ShearY", randaugment.shear_y, {0: 0, 10: 0.3, 15: 0.45, 20: 0.6}),
    ("TranslateX", randaugment.translate_x, {0: 0, 1: 10, 10: 100, 15: 150}),
    ("TranslateY", randaugment.translate_y, {0: 0, 1: 10, 10: 100, 15: 150}),
    ("Posterize", randaugment.posterize, {5: 2, 10: 4, 12: 4, 15: 6, 20: 8}),
    ("Solarize", randaugment.solarize, {0: 0, 5: 128, 7: 179}),
    ("SolarizeAdd", randaugment.solarize_add, {0: 0, 7: 77, 10: 110, 15: 165}),
    ("Color", randaugment.color, {0: 0.1, 5: 1, 10: 1.9, 15: 2.8}),
    ("Contrast", randaugment.contrast, {0: 0.1, 5: 1, 10: 1.9, 15: 2.8}),
    ("Brightness", randaugment.brightness, {0: 0.1, 5: 1, 10: 1.9, 15: 2.8}),
    ("Sharpness", randaugment.sharpness, {0: 0.1, 5: 1, 10: 1.9, 15: 2.8}),
])
def test_magnitudes(name, function, arguments):
    image = IMAGES["photo"]
    for magnitude, argument in arguments.items():
        np.testing.assert_array_equal(
            OPERATIONS[name](image, magnitude / 10, Fixed()), function(image, argument))
        if name in SIGNED:
            np.testing.assert_array_equal(
                OPERATIONS[name](image, magnitude / 10, Fixed(sign=-1)),
                function(image, -argument))


def test_magnitude_of_cutout():
    for magnitude, half_side in {0: 0, 1: 4, 10: 40, 15: 60}.items():
        np.testing.assert_array_equal(
            OPERATIONS["Cutout"](IMAGES["photo"], magnitude / 10, Fixed(center=(100, 110))),
            randaugment.cutout(IMAGES["photo"], half_side, (100, 110)))


@images
def test_oddities_of_uint8_arithmetic_in_tensorflow(image):
    for magnitude in (10, 20, 30):  # a threshold of 256 wraps around to 0
        np.testing.assert_array_equal(OPERATIONS["Solarize"](image, magnitude / 10, None),
                                      255 - image)
    np.testing.assert_array_equal(OPERATIONS["Solarize"](image, 1.5, None),
                                  np.where(image < 128, image, 255 - image))
    for magnitude in (0, 2, 23, 30):  # 0 bits, or more than 8
        np.testing.assert_array_equal(OPERATIONS["Posterize"](image, magnitude / 10, None),
                                      np.where(image < 128, 0, 128))


# The whole.


def test_operations_are_drawn_uniformly_and_independently(monkeypatch):
    names = list(OPERATIONS)
    assert len(names) == 16
    drawn = []

    def record(index):
        def operation(image, level, rng):
            assert level == 1.5
            drawn.append(index)
            return image
        return operation

    monkeypatch.setattr(randaugment, "_CHOICES", tuple(map(record, range(16))))
    rng = np.random.default_rng(0)
    for _ in range(8000):
        randaugment.randaugment(IMAGES["noise"], rng, operations=2, magnitude=15)
    pairs = np.zeros((16, 16))
    np.add.at(pairs, tuple(np.reshape(drawn, (8000, 2)).T), 1)
    # Five deviations of a binomial count: 1000 +- 31 of each, 31 +- 5.6 of each pair.
    assert np.abs(pairs.sum(1) - 500).max() < 5 * 22 and np.abs(pairs.sum(0) - 500).max() < 5 * 22
    assert np.abs(pairs - 8000 / 256).max() < 5 * 5.6


def test_signs_and_places_are_random():
    rng = np.random.default_rng(0)
    image = noise(24, 24) // 2
    for name in SIGNED:
        plus, minus = (OPERATIONS[name](image, 0.1, Fixed(sign)) for sign in (1, -1))
        draws = [OPERATIONS[name](image, 0.1, rng) for _ in range(200)]
        count = sum((draw == plus).all() for draw in draws)
        assert 70 < count < 130  # four deviations
        assert count + sum((draw == minus).all() for draw in draws) == 200
    cuts = [np.argwhere((OPERATIONS["Cutout"](image, 0.1, rng) == 128).all(-1)).max(0)
            for _ in range(1000)]
    assert {tuple(side) for side in np.transpose([np.min(cuts, 0), np.max(cuts, 0)])} == {(3, 23)}


@pytest.mark.parametrize("shape", [(224, 224), (40, 60), (3, 7), (1, 1), (1, 9)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_and_types(name, shape):
    image = noise(*shape)
    image.setflags(write=False)
    for magnitude in (0, 10, 30):
        result = OPERATIONS[name](image, magnitude / 10, np.random.default_rng(0))
        assert result.shape == image.shape and result.dtype == np.uint8


def test_a_function_of_image_and_generator():
    image = IMAGES["photo"].copy()

    def results():
        rng = np.random.default_rng(3)
        return [randaugment.randaugment(image, rng, operations=2, magnitude=15) for _ in range(40)]

    first = results()
    np.testing.assert_array_equal(first, results())
    assert len({result.tobytes() for result in first}) > 30
    np.testing.assert_array_equal(image, IMAGES["photo"])
    np.testing.assert_array_equal(
        randaugment.randaugment(image, np.random.default_rng(0), operations=0, magnitude=15), image)


# In the stream of batches.


class Photos:
    name, split, class_names = "photos", "train", ("sky", "ground")

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return Record(CHINA[10 * index:][:200, :200], index % 2, f"photo {index}")


def take(config, randaugment_, workers=0):
    config.batch_size, config.data.train_crop, config.data.flip = 12, "inception", True
    config.data.randaugment, config.data.workers = randaugment_, workers
    stream = pipeline.train_batches(
        Photos(), validate(config), (96, 64), pipeline.BadImages("error"))
    batches = list(itertools.islice(stream, 3))
    stream.close()
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def test_batches(tiny_config):
    plain, augmented = take(tiny_config, None), take(tiny_config, (2, 15))
    assert augmented["image"].shape == (36, 96, 64, 3) and augmented["image"].dtype == np.uint8
    np.testing.assert_array_equal(augmented["label"], plain["label"])
    changed = (augmented["image"] != plain["image"]).any((1, 2, 3))
    assert changed.mean() > 0.8
    threaded = take(tiny_config, (2, 15), workers=3)
    for key in augmented:
        np.testing.assert_array_equal(augmented[key], threaded[key])


def test_flip_comes_first(tiny_config, monkeypatch):
    """Google's order. The crops and flips are those of a run without RandAugment."""
    seen = []

    def spy(image, rng, **arguments):
        seen.append(arguments)
        return image

    plain = take(tiny_config, None)
    monkeypatch.setattr(pipeline, "randaugment", spy)
    flipped = take(tiny_config, (2, 15))
    assert seen == [{"operations": 2, "magnitude": 15}] * 36
    assert 0 < plain["flip"].sum() < 36 and not flipped["flip"].any()
    np.testing.assert_array_equal(
        flipped["image"],
        np.where(plain["flip"][:, None, None, None], plain["image"][:, :, ::-1], plain["image"]))

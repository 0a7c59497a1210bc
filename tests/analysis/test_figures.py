"""The figures hold the numbers they are given, for every shape of model; how they look is for eyes.
"""

import numpy as np
import pytest

from vit_jax.analysis import figures


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def photos(count, height=16, width=24):
    return np.uint8(255 * random(count, height, width, 3))


@pytest.fixture(autouse=True)
def style():
    with figures.style():
        yield


def shown(axes):
    (image,) = axes.images
    return np.asarray(image.get_array())


@pytest.mark.parametrize("count, panels", [(1, 3), (2, 6), (3, 12)])
def test_rollout(count, panels, tmp_path):
    images, maps = photos(count), random(count, 2, 3)
    maps[0, 0, 0] = 100  # hides nothing: the scale ends at a percentile
    figure = figures.rollout(images, maps, [f"{i}.png" for i in range(count)])
    figure.savefig(tmp_path / "a.png")
    axes = figure.axes[:panels]
    np.testing.assert_array_equal(shown(axes[0]), images[0])
    top = np.quantile(maps[0], 0.98)
    np.testing.assert_allclose(shown(axes[2]), np.minimum(maps[0] / top, 1))
    assert axes[2].get_title() == f"{top:.2%}"
    masked = np.float64(shown(axes[1]))
    assert masked.shape == images[0].shape and (masked <= images[0]).all()


def test_the_image_is_darkened_where_the_weights_are_low(tmp_path):
    weights = np.tile([[0.0, 1.0]], (2, 1))[None]
    white = np.full((1, 8, 8, 3), 255, np.uint8)
    masked = shown(figures.rollout(white, weights, ["a"]).axes[1])
    assert masked[:, :2].max() < 10 and masked[:, -2:].min() > 245


@pytest.mark.parametrize("layers, heads, height, width", [
    (2, 3, 4, 5), (1, 1, 1, 1), (40, 16, 3, 2), (3, 20, 2, 9)])
def test_heads(layers, heads, height, width, tmp_path):
    maps = random(layers, heads, height, width)
    figure = figures.heads(photos(1, height, width)[0], maps, "a.png", "Attention")
    figure.savefig(tmp_path / "a.png")
    mosaic = figure.axes[1]
    picture = np.ma.filled(shown(mosaic), np.nan)
    assert picture.shape == (layers * (height + 1) - 1, heads * (width + 1) - 1)
    for layer, head in ((0, 0), (layers - 1, heads - 1), (layers // 2, heads // 2)):
        row, column = layer * (height + 1), head * (width + 1)
        expected = maps[layer, head] / np.quantile(maps[layer, head], 0.98)
        np.testing.assert_allclose(
            picture[row : row + height, column : column + width], np.minimum(expected, 1))
    ticks = dict(zip([label.get_text() for label in mosaic.get_yticklabels()],
                     mosaic.get_yticks(), strict=True))
    assert ticks["1"] == (height - 1) / 2  # the middle of the first map
    assert np.diff(list(ticks.values())).tolist() == [
        (height + 1) * (int(b) - int(a)) for a, b in zip(list(ticks)[:-1], list(ticks)[1:],
                                                         strict=True)]


def test_maps_of_zeros_are_drawn(tmp_path):
    figures.rollout(photos(1), np.zeros((1, 2, 2)), ["a"]).savefig(tmp_path / "a.png")
    figures.heads(photos(1)[0], np.zeros((1, 1, 2, 2)), "a", "").savefig(tmp_path / "a.png")


def test_distances(tmp_path):
    values = random(4, 3)
    figure = figures.distances(values, 0.6, 5)
    figure.savefig(tmp_path / "a.png")
    (axes,) = figure.axes
    dots, mean, uniform = axes.lines
    np.testing.assert_allclose(dots.get_xydata(), [
        (layer + 1, values[layer, head]) for layer in range(4) for head in range(3)])
    np.testing.assert_allclose(mean.get_ydata(), values.mean(1))
    assert set(uniform.get_ydata()) == {0.6}
    assert axes.get_title() == "Mean attention distance over 5 images"
    assert axes.get_ylim()[0] == 0


@pytest.mark.parametrize("height, width", [(2, 3), (1, 1), (16, 2)])
def test_positions(height, width, tmp_path):
    values = random(height, width, height, width) * 2 - 1
    figure = figures.positions(values)
    figure.savefig(tmp_path / "a.png")
    picture = shown(figure.axes[0])
    row, column = (height - 1) * (height + 1), (width - 1) * (width + 1)
    np.testing.assert_array_equal(picture[row:, column:], values[-1, -1])
    assert max(figure.get_size_inches()) < 11  # a page


def test_positions_of_a_large_grid_are_every_few():
    """18 rows and 37 columns of patches: every third, in the middle, by their own numbers."""
    values = random(18, 37, 18, 37)
    axes = figures.positions(values).axes[0]
    rows, columns = range(1, 18, 3), range(0, 37, 3)
    picture = shown(axes)
    assert picture.shape == (len(rows) * 19 - 1, len(columns) * 38 - 1)
    np.testing.assert_array_equal(picture[19 : 37, 2 * 38 : 3 * 38 - 1], values[4, 6])
    for labels, chosen in ((axes.get_yticklabels(), rows), (axes.get_xticklabels(), columns)):
        assert [label.get_text() for label in labels] == [str(i + 1) for i in chosen]


@pytest.mark.parametrize("count, size", [(28, 4), (3, 1), (9, 2)])
def test_filters(count, size, tmp_path):
    components = random(count, size, size, 3) - 0.5
    components[0] = 0
    components[0, 0, 0, 0] = -1
    figure = figures.filters(components, np.linspace(0.5, 0, count))
    figure.savefig(tmp_path / "a.png")
    first, second = (shown(axes) for axes in figure.axes[:2])
    assert first[0, 0].tolist() == [0, 0.5, 0.5]  # gray is zero, here without red
    assert np.abs(second - 0.5).max() == pytest.approx(0.5)
    assert figure.axes[0].get_title() == "1: 50.0%"


@pytest.mark.parametrize("count", [2, 13, 49])
def test_similarity(count, tmp_path):
    values = random(count, count)
    figure = figures.similarity(values, 1024, 1)
    figure.savefig(tmp_path / "a.png")
    axes = figure.axes[0]
    np.testing.assert_array_equal(shown(axes), values)
    assert len(axes.texts) == (count**2 if count <= 13 else 0)
    assert axes.get_title() == "Similarity of layers: 1,024 patches of 1 image"


@pytest.mark.parametrize("name, title", [
    ("a.png", "a.png"),
    ("$x_1$.png", "$x_1$.png"),
    ("猫 Ä.png", "? Ä.png"),
    ("a very long name of a photograph.jpeg", "a very lon…ph.jpeg"),
])
def test_any_file_name(name, title, tmp_path):
    figure = figures.rollout(photos(1), random(1, 2, 2), [name])
    figure.savefig(tmp_path / "a.png")  # warns of missing letters, reads formulas
    assert figure.axes[0].get_title() == title

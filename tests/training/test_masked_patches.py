"""Masked patch prediction: statistics of the corruption, targets and losses against NumPy."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.masked import MASK, masked_patch_model
from vit_jax.models.variants import create_model
from vit_jax.training.masked_patches import (
    class_colors,
    color_classes,
    cut_patches,
    make_eval_step,
    make_loss_sum,
    make_targets,
    predicted_colors,
    prediction_loss,
)
from vit_jax.training.masked_patches import sample_corruption as sample_corruption_eagerly
from vit_jax.training.step import Pixels, normalize

PIXELS = Pixels((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
sample_corruption = jax.jit(sample_corruption_eagerly, static_argnames=("patches", "rate"))


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def images_uint8(batch=3, height=8, width=12, seed=0):
    """Smooth colours with noise, so that the mean colours of patches differ."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (batch, height // 4, width // 4, 3)).repeat(4, 1).repeat(4, 2)
    noise = rng.integers(-40, 40, (batch, height, width, 3))
    return (colours + noise).clip(0, 255).astype(np.uint8)


# --- Corruption -------------------------------------------------------------------------------


@pytest.mark.parametrize("patches, rate, count", [
    (196, 0.5, 98), (196, 0.15, 29), (49, 0.5, 24), (2, 0.5, 1)])
def test_exactly_that_many_patches_of_every_image(patches, rate, count):
    corruption = sample_corruption(keys(50), patches, rate)
    assert corruption.corrupted.shape == corruption.sources.shape == (50, patches)
    assert (np.sum(corruption.corrupted, axis=1) == count).all()


def test_shares_of_masked_swapped_and_kept():
    """2,000 images of 64 patches: 64,000 corrupted ones, within 4.5 standard deviations."""
    corrupted, sources = map(np.asarray, sample_corruption(keys(2000), 64))
    own = np.arange(64)
    assert (sources[~corrupted] == np.broadcast_to(own, sources.shape)[~corrupted]).all()
    assert sources.min() == MASK and sources.max() == 63
    total = corrupted.sum()
    masked = sources == MASK
    kept = (sources == own) & corrupted
    swapped = corrupted & ~masked & ~kept
    for chosen, share in ((masked, 0.8), (swapped, 0.1), (kept, 0.1)):
        assert abs(chosen.sum() / total - share) < 4.5 * np.sqrt(share * (1 - share) / total)
    # Every patch is corrupted in half of the images, and not always with the same others.
    assert np.abs(corrupted.mean(0) - 0.5).max() < 4.5 * np.sqrt(0.25 / 2000)
    pairs = np.corrcoef(corrupted.T)[np.triu_indices(64, 1)]
    assert np.abs(pairs + 1 / 63).max() < 5 / np.sqrt(2000)  # one of 64 less for the others
    # 'Another patch' is another one, each equally likely: the offsets are uniform over 1..63.
    offsets = (sources - own)[swapped] % 64
    counts = np.bincount(offsets, minlength=64)
    assert counts[0] == 0
    expected = swapped.sum() / 63
    chi_squared = np.sum((counts[1:] - expected) ** 2 / expected)
    assert chi_squared < 62 + 4.5 * np.sqrt(2 * 62)
    # It may be a corrupted one as well: what is taken is its embedding before the corruption.
    rows, columns = np.nonzero(swapped)
    assert 0.45 < corrupted[rows, sources[rows, columns]].mean() < 0.55


def test_images_are_corrupted_for_themselves():
    one = sample_corruption(keys(4), 64)
    two = sample_corruption(keys(4)[2:], 64)
    np.testing.assert_array_equal(one.sources[2:], two.sources)
    assert (one.corrupted[0] != one.corrupted[1]).any()
    assert (one.sources != sample_corruption(keys(4, seed=1), 64).sources).any()


@pytest.mark.parametrize("patches, rate", [(1, 0.9), (3, 0.1), (64, 0.0)])
def test_nothing_to_corrupt(patches, rate):
    with pytest.raises(ValueError, match=f"corrupts none of {patches} patches"):
        sample_corruption(keys(1), patches, rate)


# --- Targets ----------------------------------------------------------------------------------


def test_patches_are_cut_in_rows():
    images = images_uint8()
    patches = np.asarray(cut_patches(jnp.asarray(images), 4))
    for n in range(6):
        row, column = divmod(n, 3)
        np.testing.assert_array_equal(
            patches[:, n], images[:, 4 * row:4 * row + 4, 4 * column:4 * column + 4])


def color_class(pixels):
    """The definition, in exact fractions of Python."""
    index = 0
    for channel in range(3):
        values = [int(v) for v in pixels[..., channel].ravel()]
        index = 8 * index + min(7, 8 * sum(values) // (255 * len(values)))
    return index


@pytest.mark.parametrize("target", ["mean_color", "downsized_colors"])
def test_color_targets(target):
    images = images_uint8(2, 16, 24)
    side = 8
    targets = np.asarray(make_targets(jnp.asarray(images), target, side, PIXELS))
    for b in range(2):
        for n in range(6):
            top, left = side * (n // 3), side * (n % 3)
            patch = images[b, top:top + side, left:left + side]
            if target == "mean_color":
                assert targets[b, n] == color_class(patch)
                continue
            for cell in range(16):
                y, x = 2 * (cell // 4), 2 * (cell % 4)
                assert targets[b, n, cell] == color_class(patch[y:y + 2, x:x + 2])
    assert len(np.unique(targets)) > 10


def test_borders_of_the_colours():
    """White is the last class, and the borders are exact: 8 * 255 * k / 8 of 255."""
    def of(value, size=2):
        return int(color_classes(jnp.full((size, size, 3), value, jnp.uint8)))

    assert of(0) == 0 and of(255) == 511 and of(255, 32) == 511
    assert [of(31) % 8, of(32) % 8, of(223) % 8, of(224) % 8] == [0, 1, 6, 7]
    reds = jnp.asarray(np.array([255, 0, 0], np.uint8)[None, None])
    assert int(color_classes(reds)) == 7 * 64
    # A mean of exactly 255 / 8 is level 1, one grey level in 1,024 pixels less is level 0.
    exact = np.full((16, 16, 3), 31, np.uint8)
    exact[:14, :, :] = 32  # 224 * 32 + 32 * 31 = 8160 = 255 * 256 / 8
    assert int(color_classes(jnp.asarray(exact))) == 64 + 8 + 1
    exact[0, 0] -= 1
    assert int(color_classes(jnp.asarray(exact))) == 0


def test_pixel_targets_are_what_the_model_sees():
    images = images_uint8()
    targets = np.asarray(make_targets(jnp.asarray(images), "pixels", 4, PIXELS))
    assert targets.shape == (3, 6, 48)
    seen = (images / 255 - np.array(PIXELS.mean)) / np.array(PIXELS.std)
    np.testing.assert_allclose(
        targets[1, 4].reshape(4, 4, 3), seen[1, 4:8, 4:8], atol=1e-6)


def test_class_colors():
    colours = np.asarray(class_colors(jnp.arange(512)))
    assert len(np.unique(colours, axis=0)) == 512
    np.testing.assert_allclose(colours[7 * 64 + 2 * 8 + 1], [7.5 / 8, 2.5 / 8, 1.5 / 8])
    painted = np.rint(255 * colours)[:, None, None].astype(np.uint8)
    assert np.asarray(color_classes(jnp.asarray(painted))).tolist() == list(range(512))
    # Red is red: hue 0 for the class of red alone.
    assert colorsys.rgb_to_hsv(*colours[7 * 64])[0] == 0


def test_predicted_colors():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 512)).astype(np.float32)
    np.testing.assert_allclose(
        predicted_colors(logits, "mean_color"), class_colors(logits.argmax(-1)))
    cells = rng.normal(size=(2, 3, 16, 512)).astype(np.float32)
    np.testing.assert_allclose(
        predicted_colors(cells, "downsized_colors"),
        np.asarray(class_colors(cells.argmax(-1))).mean(2), atol=1e-6)
    images = images_uint8()
    exact = make_targets(jnp.asarray(images), "pixels", 4, PIXELS)
    np.testing.assert_allclose(
        predicted_colors(exact, "pixels", PIXELS),
        np.asarray(cut_patches(images, 4)).mean((2, 3)) / 255, atol=1e-6)
    assert predicted_colors(exact + 9, "pixels", PIXELS).max() == 1.0


# --- Loss -------------------------------------------------------------------------------------


def numpy_loss(predictions, targets, corrupted):
    """Image by image and patch by patch, in float64."""
    result = []
    for prediction, target, chosen in zip(
            np.float64(predictions), np.asarray(targets), np.asarray(corrupted), strict=True):
        of_patches = []
        for n in np.flatnonzero(chosen):
            if target.dtype.kind == "f":
                of_patches.append(np.mean((prediction[n] - target[n]) ** 2))
                continue
            logits, classes = prediction[n].reshape(-1, 512), target[n].reshape(-1)
            log_sum = np.log(np.exp(logits).sum(-1))
            of_patches.append(np.mean(log_sum - logits[np.arange(len(classes)), classes]))
        result.append(np.mean(of_patches))
    return result


@pytest.mark.parametrize("target, width", [
    ("mean_color", (512,)), ("downsized_colors", (16, 512)), ("pixels", (48,))])
def test_loss_against_numpy(target, width):
    images = jnp.asarray(images_uint8())
    targets = make_targets(images, target, 4, PIXELS)
    predictions = np.random.default_rng(1).normal(size=(3, 6, *width)).astype(np.float32)
    corrupted = sample_corruption(keys(3), 6).corrupted
    losses = prediction_loss(jnp.asarray(predictions), targets, corrupted)
    np.testing.assert_allclose(losses, numpy_loss(predictions, targets, corrupted), rtol=1e-5)
    # Nothing of an uncorrupted patch is scored: whatever is predicted there, or was.
    garbled = np.where(np.asarray(corrupted).reshape(3, 6, *[1] * len(width)), predictions, 1e3)
    other = jnp.where(jnp.reshape(corrupted, (3, 6, *[1] * (targets.ndim - 2))), targets, 0)
    np.testing.assert_array_equal(prediction_loss(garbled, other, corrupted), losses)
    gradient = jax.grad(lambda p: jnp.sum(prediction_loss(p, targets, corrupted)))(
        jnp.asarray(predictions))
    touched = np.abs(gradient).reshape(3, 6, -1).max(-1) > 0
    np.testing.assert_array_equal(touched, corrupted)


@pytest.fixture(scope="module")
def setup():
    """A tiny model with parameters that are not zero, and a batch."""
    model = masked_patch_model(create_model(
        "B/16", num_classes=7, patch_size=4, hidden_size=16, mlp_dim=24, num_heads=2, num_layers=1,
    ), "mean_color")
    images = images_uint8(4)
    params = jax.jit(lambda: model.init(jax.random.key(0), normalize(images), train=False))()[
        "params"]
    head = params["patch_head"]
    assert not np.any(head["kernel"])  # as every head here starts
    head["kernel"] = 0.5 * jax.random.normal(jax.random.key(1), head["kernel"].shape)
    batch = {"image": jnp.asarray(images), "mask": jnp.array([True, True, False, True]),
             "index": jnp.array([4, 5, 6, 7], jnp.int32)}
    return model, params, batch


def test_loss_sum_of_a_batch(setup):
    """Over the valid images, of the model's predictions for the corruption that its key gives."""
    model, params, batch = setup
    loss_sum = jax.jit(make_loss_sum(model, 0.5, PIXELS))
    key = jax.random.key(3)
    corruption = sample_corruption(jax.random.split(jax.random.split(key)[0], 4), 6)
    predictions = model.apply(
        {"params": params}, normalize(batch["image"], PIXELS), corruption.sources, train=False)
    expected = numpy_loss(
        predictions, make_targets(batch["image"], "mean_color", 4), corruption.corrupted)
    np.testing.assert_allclose(
        loss_sum(params, batch, key), expected[0] + expected[1] + expected[3], rtol=1e-5)
    assert loss_sum(params, batch, jax.random.key(4)) != loss_sum(params, batch, key)


def test_gradients_reach_the_mask_token_and_every_parameter(setup):
    model, params, batch = setup
    gradients = jax.jit(jax.grad(make_loss_sum(model, 0.5)))(params, batch, jax.random.key(0))
    sizes = {jax.tree_util.keystr(path, simple=True, separator="/"): float(np.abs(leaf).max())
             for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    assert sizes.pop("mask_token") > 1e-3
    for path, size in sizes.items():
        if "key/bias" not in path:  # a constant added to all logits of a row: no gradient
            assert size > 1e-6, path


def test_evaluation_depends_on_the_image_and_its_place_alone(setup):
    model, params, batch = setup
    step = jax.jit(make_eval_step(model, 0.5, seed=0, pixels=PIXELS))
    rows = step(params, batch)
    corruption = sample_corruption(
        jnp.stack([jax.random.fold_in(jax.random.key(0), i) for i in (4, 5, 6, 7)]), 6)
    predictions = model.apply(
        {"params": params}, normalize(batch["image"], PIXELS), corruption.sources, train=False)
    targets = np.asarray(make_targets(batch["image"], "mean_color", 4))
    np.testing.assert_allclose(
        rows["loss"], numpy_loss(predictions, targets, corruption.corrupted), rtol=1e-5)
    right = np.asarray(predictions).argmax(-1) == targets
    np.testing.assert_allclose(
        rows["accuracy"], [r[c].mean() for r, c in zip(right, corruption.corrupted, strict=True)])
    part = step(params, {name: values[2:] for name, values in batch.items()})
    np.testing.assert_allclose(part["loss"], rows["loss"][2:], rtol=1e-5)


@pytest.mark.parametrize("target", ["downsized_colors", "pixels"])
def test_the_accuracy_of_other_targets_is_that_of_the_mean_colour(target, setup, monkeypatch):
    """Predictions that are right in detail are right in the mean; others are not."""
    model, params, batch = setup
    model = model.clone(target=target)
    targets = make_targets(batch["image"], target, 4, PIXELS)
    perfect = jax.nn.one_hot(targets, 512) if target == "downsized_colors" else targets
    for predictions, low, high in ((perfect, 0.7, 1.0), (jnp.zeros_like(perfect), 0.0, 0.3)):
        monkeypatch.setattr(
            type(model), "apply", lambda *args, predictions=predictions, **kwargs: predictions)
        rows = make_eval_step(model, 0.5, 0, PIXELS)(params, batch)
        assert low <= np.mean(rows["accuracy"]) <= high
    if target == "pixels":
        monkeypatch.setattr(type(model), "apply", lambda *args, **kwargs: perfect)
        rows = make_eval_step(model, 0.5, 0, PIXELS)(params, batch)
        assert np.mean(rows["accuracy"]) == 1.0 and np.max(rows["loss"]) == 0.0

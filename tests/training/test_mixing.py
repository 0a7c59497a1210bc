"""Random erasing, mixup and CutMix: against timm, SciPy and NumPy, and on every mesh alike."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from tiny import make_tiny_config
from tiny_steps import build, compile_run, follow, make_batch, run

from vit_jax.config import validate
from vit_jax.training import mixing, partition
from vit_jax.training.losses import targets_from_labels
from vit_jax.training.step import normalize

KEY = jax.random.key(0)
EVERYTHING = dict(mixup=0.8, cutmix=1.0, erasing=0.5)


@functools.partial(jax.jit, static_argnames=("mixup", "cutmix", "erasing"))
def draw(key, batch, mixup=0.0, cutmix=0.0, erasing=0.0):
    return mixing.draw(key, batch, mixup=mixup, cutmix=cutmix, erasing=erasing)


def blank(rows):
    """Images that are too small to take time."""
    return {"image": np.zeros((rows, 1, 1, 3), np.uint8), "label": np.zeros(rows, np.int32),
            "mask": np.ones(rows, bool)}


def test_mixup_weights_are_a_folded_beta():
    """max(l, 1 - l) <= x exactly when 1 - x <= l <= x. At points, because float32 rounds many
    weights to 1; five standard deviations of a count of 20,000."""
    weights = np.asarray(draw(KEY, blank(20_000), mixup=0.2)["blend"])
    beta = scipy.stats.beta(0.2, 0.2)
    for x in (0.55, 0.6, 0.7, 0.8, 0.9, 0.99, 0.9999):
        expected = beta.cdf(x) - beta.cdf(1 - x)
        deviation = (expected * (1 - expected) / 20_000) ** 0.5
        assert abs((weights <= x).mean() - expected) < 5 * deviation
    assert weights.min() >= 0.5 and weights.max() <= 1


def test_with_both_each_image_takes_one_of_them():
    """And each its own alpha: with 100 for mixup its weights stay near 1/2."""
    rows = 4000
    drawn = draw(KEY, blank(rows), mixup=100.0, cutmix=1.0)
    cut = np.asarray(drawn["blend"]) == 1
    assert abs(cut.mean() - 0.5) < 5 * 0.5 / rows**0.5  # five standard deviations
    assert np.asarray(drawn["blend"])[~cut].max() < 0.7
    boxed = np.asarray(drawn["cut_box"]).any(1)
    assert not boxed[~cut].any()  # of a single pixel, a box is all or nothing


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_area_of_cutmix_boxes(alpha):
    """A side of s times the image's, centred anywhere, keeps s - s^2 / 4 of it after clipping on
    average; the axes are independent given s^2 ~ Beta. For alpha 1 that is 0.3208."""
    height, width = size = (1000, 2000)
    beta = scipy.stats.beta(alpha, alpha)
    shares = beta.rvs(20_000, random_state=0)
    boxes = np.asarray(mixing.cutmix_boxes(KEY, jnp.float32(shares), size), np.float64)
    top, left, bottom, right = boxes.T
    assert 0 <= top.min() and 0 <= left.min() and bottom.max() <= height and right.max() <= width
    areas = (bottom - top) * (right - left) / (height * width)
    expected = scipy.integrate.quad(
        lambda u: beta.pdf(u) * (u**0.5 - u / 4) ** 2, 0, 1, limit=200)[0]
    # Five standard errors of the mean, and the pixel that truncation costs each side.
    assert abs(areas.mean() - expected) < 5 * areas.std() / 20_000**0.5 + 1.5e-3


def test_pairs_and_masks():
    """Row i mixes with row i - 1, unless that one could not be decoded."""
    batch = make_batch(0, rows=32, invalid=(3, 31))
    drawn = draw(KEY, batch, **EVERYTHING)
    for name in ("image", "label", "erase_box", "noise_key"):
        rolled = [jax.random.key_data(x) if name == "noise_key" else x
                  for x in (drawn["partner"][name], drawn[name])]
        np.testing.assert_array_equal(rolled[0], np.roll(rolled[1], 1, axis=0))
    mixed = (np.asarray(drawn["blend"]) < 1) | np.asarray(drawn["cut_box"]).any(1)
    assert not mixed[[0, 4]].any()
    everyone = draw(KEY, make_batch(0, rows=32), **EVERYTHING)
    mixed = (np.asarray(everyone["blend"]) < 1) | np.asarray(everyone["cut_box"]).any(1)
    assert mixed[[0, 4]].all()


def test_mixed_images_and_targets_against_loops():
    """All three at once: the partner is erased too, as in timm, whose loader erases first."""
    batch = make_batch(0, rows=32, invalid=(7,))
    drawn = draw(KEY, batch, **EVERYTHING)
    targets = np.eye(10)[batch["label"]] * 0.9 + 0.01
    erased = np.asarray(normalize(batch["image"])).copy()
    for row, (top, left, bottom, right) in enumerate(np.asarray(drawn["erase_box"])):
        noise = jax.random.normal(drawn["noise_key"][row], erased.shape[1:])
        erased[row, top:bottom, left:right] = noise[top:bottom, left:right]
    images, expected = erased.copy(), targets.copy()
    for row, (top, left, bottom, right) in enumerate(np.asarray(drawn["cut_box"])):
        blend = float(drawn["blend"][row])
        images[row] = blend * erased[row] + (1 - blend) * erased[row - 1]
        images[row, top:bottom, left:right] = erased[row - 1, top:bottom, left:right]
        share = blend - blend * (bottom - top) * (right - left) / 64
        expected[row] = share * targets[row] + (1 - share) * targets[row - 1]
    mixed = mixing.mixed_images(drawn, normalize)
    np.testing.assert_allclose(mixed, images, rtol=1e-5, atol=1e-6)
    theirs = mixing.mixed_targets(drawn, lambda labels: targets_from_labels(labels, 10, 0.1))
    np.testing.assert_allclose(theirs, expected, rtol=1e-5)
    np.testing.assert_allclose(np.sum(theirs, axis=1), 1, rtol=1e-6)
    kinds = [np.asarray(x).any() for x in (
        drawn["erase_box"], drawn["cut_box"], drawn["blend"] < 1)]
    assert all(kinds)  # each of the three occurred


def test_mixing_against_timm(monkeypatch):
    """timm's per-element mode, forced to our draws. It pairs with the batch reversed; in a batch of
    two that is also the row before."""
    torch = pytest.importorskip("torch_shim").torch
    import timm.data.mixup as theirs

    kinds = set()
    for seed in range(12):
        batch = make_batch(seed, rows=2)
        drawn = draw(jax.random.key(seed), batch, mixup=0.8, cutmix=1.0)
        cut = np.asarray(drawn["blend"]) == 1
        kinds |= set(cut.tolist())
        boxes = iter(np.asarray(drawn["cut_box"])[cut][:, [0, 2, 1, 3]])
        monkeypatch.setattr(theirs, "rand_bbox", lambda *args, boxes=boxes, **kwargs: next(boxes))
        mixer = theirs.Mixup(mode="elem", label_smoothing=0.1, num_classes=10)
        lam = np.where(cut, 0.5, drawn["blend"])  # of cut images, timm computes it from the box
        monkeypatch.setattr(mixer, "_params_per_elem", lambda rows, x=(lam, cut): x)
        images = np.asarray(normalize(batch["image"])).transpose(0, 3, 1, 2).copy()
        images, targets = mixer(torch.tensor(images), torch.tensor(batch["label"]))
        ours = mixing.mixed_images(drawn, normalize)
        np.testing.assert_allclose(ours, images.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)
        ours = mixing.mixed_targets(drawn, lambda labels: targets_from_labels(labels, 10, 0.1))
        np.testing.assert_allclose(ours, targets.numpy(), rtol=1e-5, atol=1e-7)
    assert kinds == {True, False}


def test_cutmix_boxes_against_timm(monkeypatch):
    """From the same share and centre, timm cuts the same box."""
    pytest.importorskip("torch_shim")
    import timm.data.mixup as theirs

    size, shares = (48, 80), np.linspace(0, 1, 200, dtype=np.float32)
    centres = [np.asarray(jax.random.randint(key, shares.shape, 0, pixels))
               for key, pixels in zip(jax.random.split(KEY), size, strict=True)]
    for i, box in enumerate(np.asarray(mixing.cutmix_boxes(KEY, shares, size))):
        centre = iter([centres[0][i], centres[1][i]])
        monkeypatch.setattr(
            np.random, "randint", lambda *args, centre=centre, **kwargs: next(centre))
        top, bottom, left, right = theirs.rand_bbox((3, *size), shares[i])
        assert box.tolist() == [top, left, bottom, right]


def test_erased_boxes_against_timm():
    """Areas and aspects of 3,000 boxes each, from the same two distributions (two-sample
    Kolmogorov-Smirnov, fixed seeds)."""
    torch = pytest.importorskip("torch_shim").torch
    import random

    from timm.data.random_erasing import RandomErasing

    rows, size = 3000, (24, 32)
    random.seed(0)
    torch.manual_seed(0)
    images = RandomErasing(0.5, mode="pixel", device="cpu")(torch.zeros(rows, 1, *size))
    changed = images.numpy()[:, 0] != 0
    theirs = np.stack([changed.any(2).sum(1), changed.any(1).sum(1)], axis=1)
    boxes = np.asarray(mixing.erasing_boxes(KEY, 0.5, rows, size))
    ours = boxes[:, 2:] - boxes[:, :2]
    for sizes in (ours, theirs):  # five standard deviations
        assert abs(sizes.any(1).mean() - 0.5) < 5 * 0.5 / rows**0.5
    ours, theirs = (sizes[sizes.any(1)] for sizes in (ours, theirs))
    for measure in (lambda hw: hw.prod(1), lambda hw: hw[:, 0] / hw[:, 1]):
        assert scipy.stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


def test_erased_areas_aspects_and_places():
    """Against the distributions of the paper; rounding to whole pixels of 1000 is negligible."""
    boxes = np.asarray(mixing.erasing_boxes(KEY, 1.0, 20_000, (1000, 1000)), np.float64)
    height, width = (boxes[:, 2:] - boxes[:, :2]).T
    aspect = scipy.stats.loguniform(0.3, 1 / 0.3)
    # Draws whose longer side does not fit are repeated: compare where every area fits.
    fits = np.sqrt(1e6 / 3 * np.maximum(height / width, width / height)) < 990
    area = scipy.stats.uniform(0.02, 1 / 3 - 0.02)
    assert scipy.stats.kstest((height * width / 1e6)[fits], area.cdf).pvalue > 1e-3
    small = height * width < 0.25 * 1e6  # of any aspect, these fit
    assert scipy.stats.kstest((height / width)[small], aspect.cdf).pvalue > 1e-3
    free = (boxes[:, 0] + 0.5) / (1001 - height)
    assert scipy.stats.kstest(free, "uniform").pvalue > 1e-3
    assert boxes.min() >= 0 and boxes.max() <= 1000 and height.max() < 1000


def test_noise():
    """Standard normal, different for every pixel, channel and image; nothing outside the box."""
    images = jnp.full((8, 32, 32, 3), 5.0)
    boxes = jnp.tile(jnp.array([[4, 0, 28, 32]]), (8, 1))
    erased = np.asarray(mixing.erase(images, boxes, jax.random.split(KEY, 8)))
    noise = erased[:, 4:28].ravel()
    assert (erased[:, :4] == 5).all() and (erased[:, 28:] == 5).all()
    assert scipy.stats.kstest(noise, "norm").pvalue > 1e-3
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_devices_draw_alike_and_keep_their_images():
    """Sharded, every draw is bit for bit that of one device; the only image that moves is each
    device's last, to its neighbour; no device makes noise for the whole batch or draws in a loop
    that waits for the others."""
    mesh = partition.make_mesh(everything_on(mesh=(1, 8, 1)))
    batch = make_batch(0, rows=32)

    def augment(key, batch):
        drawn = mixing.draw(key, batch, **EVERYTHING)
        return drawn, mixing.mixed_images(drawn, normalize)

    one = jax.jit(augment)(KEY, batch)
    sharding = partition.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        on_devices = jax.device_put(batch, sharding)
        compiled = jax.jit(augment, out_shardings=sharding).lower(KEY, on_devices).compile()
        many = compiled(KEY, on_devices)
    for name in ("blend", "cut_box", "erase_box"):
        np.testing.assert_array_equal(one[0][name], many[0][name])
    np.testing.assert_allclose(one[1], many[1], rtol=1e-6, atol=1e-6)
    # In the compiled program, images are what has four axes and ends in 8, 8, 3.
    text = compiled.as_text()
    moved = re.findall(r"= \(?(\w+\[[\d,]*\]).* (all-\w+|collective-permute)(?:-start)?\(", text)
    assert {move for move in moved if re.search(r"\[\d+,8,8,3\]", move[0])} == {
        ("u8[1,8,8,3]", "collective-permute")}
    assert "f32[32,8,8,3]" not in text
    assert ("pred[]", "all-reduce") not in moved  # no loop asks all devices whether to go on


def everything_on(**settings):
    config = make_tiny_config()
    config.model.num_layers = 1
    config.loss.label_smoothing = 0.1
    config.data.mixup, config.data.cutmix = EVERYTHING["mixup"], EVERYTHING["cutmix"]
    config.data.random_erasing = EVERYTHING["erasing"]
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = settings.pop("mesh", (-1, 1, 1))
    config.update(settings)
    return config


@pytest.fixture(scope="module")
def one_device():
    """A compiled step, and the state it starts from on the host: the step consumes what it gets."""
    step, state, _ = compile_run(everything_on(), devices=1)
    return step, jax.device_get(state)


@pytest.fixture(scope="module")
def reference(one_device):
    return follow(*one_device, invalid=(5,))


@pytest.mark.parametrize("settings", [
    dict(mesh=(1, 8, 1), accumulation_steps=2),
    pytest.param(dict(mesh=(2, 2, 2), accumulation_steps=4), marks=pytest.mark.slow),
], ids=str)
def test_same_losses_on_every_mesh_and_in_parts(reference, settings):
    """SGD without dropout: only float32 rounding may differ."""
    losses, state = run(everything_on(**settings), invalid=(5,))
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(reference[1].params),
                            strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_every_step_draws_anew(one_device):
    step, state = one_device
    # The head starts at zero, where every input gives the same loss.
    kernel = np.random.default_rng(0).normal(size=state.params["head"]["kernel"].shape)
    head = state.params["head"] | {"kernel": kernel.astype(np.float32)}
    state = state.replace(params=state.params | {"head": head})
    first, again, other = (
        float(step(state.replace(step=np.int32(i)), make_batch(0))[1]["loss"]) for i in (0, 0, 1))
    assert first == again
    assert abs(first - other) > 1e-3


def test_nothing_is_traced_when_all_is_off():
    """Every draw is a random_bits in the traced program."""

    def draws(**data):
        config = everything_on()
        config.data.update(dict(mixup=0.0, cutmix=0.0, random_erasing=0.0) | data)
        make_step, init = build(validate(config))
        return str(jax.make_jaxpr(make_step())(jax.eval_shape(init), make_batch(0))).count(
            "random_bits")

    assert draws() == 0
    assert draws(random_erasing=0.1) > 0
    assert draws(cutmix=0.1) > 0

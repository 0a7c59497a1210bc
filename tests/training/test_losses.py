"""Both losses against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.training.losses import cross_entropy, targets_from_labels

pytestmark = pytest.mark.core

LABELS = np.array([0, 3, 4, 3])
LOGITS = 3 * np.random.default_rng(0).normal(size=(4, 5))


def definition(name, logits, targets):
    logits = np.asarray(logits, np.float64)
    if name == "softmax":
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -(targets * log_p).sum(-1)
    p = 1 / (1 + np.exp(-logits))
    return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_losses_against_their_definitions(name, smoothing):
    targets = targets_from_labels(LABELS, 5, smoothing)
    ours = cross_entropy(name, jnp.asarray(LOGITS, jnp.float32), targets)
    assert ours.shape == (4,) and ours.dtype == jnp.float32
    expected = definition(name, LOGITS, (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_targets():
    np.testing.assert_array_equal(targets_from_labels(LABELS, 5), np.eye(5)[LABELS])
    smooth = np.asarray(targets_from_labels(np.array([1]), 4, 0.2))
    np.testing.assert_allclose(smooth, [[0.05, 0.85, 0.05, 0.05]], rtol=1e-6)
    np.testing.assert_allclose(smooth.sum(), 1, rtol=1e-6)  # a distribution still


def test_an_untrained_head_of_zeros():
    """What a first loss is compared with: log K, and K log 2."""
    targets = targets_from_labels(LABELS, 5)
    np.testing.assert_allclose(cross_entropy("softmax", jnp.zeros((4, 5)), targets), np.log(5),
                               rtol=1e-6)
    np.testing.assert_allclose(cross_entropy("sigmoid", jnp.zeros((4, 5)), targets),
                               5 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [100.0, 1e4, 1e30])
def test_extreme_logits_are_finite(name, smoothing, size):
    """exp(100) is no float32; neither value nor gradient may become NaN or infinite."""
    logits = jnp.asarray([[size, -size, 0.0], [-size, size, size]], jnp.float32)
    targets = targets_from_labels(np.array([0, 0]), 3, smoothing)

    def total(x):
        return cross_entropy(name, x, targets).sum()

    losses = cross_entropy(name, logits, targets)
    assert np.isfinite(losses).all() and np.isfinite(jax.grad(total)(logits)).all()
    assert (losses >= 0).all()
    np.testing.assert_allclose(losses[1], 2 * size * {
        ("softmax", 0.0): 1, ("softmax", 0.1): 1 - 0.1 * 2 / 3,
        ("sigmoid", 0.0): 1.5, ("sigmoid", 0.1): 1.5 - 0.1 / 2,
    }[name, smoothing], rtol=0.02)

"""Logistic regression against scikit-learn's, in float64 and to a tight tolerance."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vit_jax.data.records import stratified_split
from vit_jax.errors import UserError
from vit_jax.probes.extraction import Features
from vit_jax.probes.linear import STRENGTHS, linear_probe, logistic_regression

CLASSES = 4
IMAGES = 300  # everywhere, since every other number is compiled anew


def blobs(images, seed, spread=1.5):
    centres = np.random.default_rng(7).normal(size=(CLASSES, 10))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, images).astype(np.int32)
    features = centres[labels] + spread * rng.normal(size=(images, 10))
    features = features * np.linspace(0.1, 10, 10) + np.linspace(-5, 5, 10)
    return Features(features.astype(np.float32), labels, np.arange(images))


def standardised(features, of):
    return (features - of.mean(0)) / (of.std(0) + 1e-5)


def sklearn_fit(x, labels, l2):
    model = LogisticRegression(C=1 / (len(x) * l2), tol=1e-10, max_iter=10_000)
    return model.fit(np.float64(x), labels)


@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-6])
def test_equals_scikit_learn(l2):
    """Weights to a common vector, which no probability depends on; float32 leaves 1e-3."""
    train = blobs(IMAGES, 0)
    x = standardised(train.features, train.features)
    weights, bias = logistic_regression(x, train.labels, CLASSES, l2)
    theirs = sklearn_fit(x, train.labels, l2)
    np.testing.assert_allclose(
        weights - weights.mean(1, keepdims=True), theirs.coef_.T, atol=1e-3)
    np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_, atol=1e-3)
    assert np.abs(theirs.coef_).max() > 0.3


@pytest.mark.parametrize("spread, expected", [(0.8, 1e-2), (3.0, 1e-1)])
def test_the_probe_chooses_on_held_out_training_images(spread, expected):
    """A strength in the middle, and, where noise is strong, the strongest."""
    train, test = blobs(IMAGES, 0, spread), blobs(500, 1, spread)
    probe = linear_probe(train, test, CLASSES)
    x = standardised(train.features, train.features)
    fit, held_out = stratified_split(train.labels, one_in=10)
    scores = {l2: sklearn_fit(x[fit], train.labels[fit], l2).score(
        np.float64(x[held_out]), train.labels[held_out]) for l2 in STRENGTHS}
    assert probe.l2 == max(scores, key=scores.get) == expected
    theirs = sklearn_fit(x, train.labels, expected).score(
        np.float64(standardised(test.features, train.features)), test.labels)
    assert probe.accuracy == pytest.approx(theirs, abs=1 / 500)  # an image on the border


def test_separable_classes():
    """Weights would grow without end, but for the regularisation."""
    train, test = blobs(IMAGES, 0, spread=0.1), blobs(500, 1, spread=0.1)
    assert linear_probe(train, test, CLASSES).accuracy == 1.0
    weights, _ = logistic_regression(
        jnp.asarray(standardised(train.features, train.features)), train.labels, CLASSES, 1e-6)
    assert np.isfinite(weights).all()


def test_nothing_to_hold_out():
    train = Features(np.eye(3, dtype=np.float32), np.arange(3, dtype=np.int32), np.arange(3))
    with pytest.raises(UserError, match="a class with at least two training images"):
        linear_probe(train, train, 3)

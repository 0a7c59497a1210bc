"""Similarities and principal components against scikit-learn, formulas and hand-made cases."""

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA
from tiny_models import random_params, tiny

from vit_jax.analysis.features import (
    filter_components,
    layer_similarity,
    position_similarity,
    position_vectors,
)
from vit_jax.models.positions import AddPositionEmbs


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# --- Position embeddings ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d"])
@pytest.mark.parametrize("options", [dict(), dict(classifier="gap"), dict(register_tokens=2)],
                         ids=str)
def test_position_vectors_are_what_the_model_adds(kind, options):
    model = tiny(position_embedding=kind, **options)
    params = random_params(model, 8, 12)
    got = position_vectors(params, (2, 3))
    assert got.shape == (2, 3, 16)
    prefix = int("token" in model.classifier)
    added = AddPositionEmbs(kind).apply(
        {"params": params["Transformer"]["posembed_input"]}, np.zeros((1, prefix + 6, 16)),
        grid=(2, 3))
    np.testing.assert_array_equal(got.reshape(6, 16), added[0, prefix:])


@pytest.mark.parametrize("kind", ["sincos_2d", "relative", "none"])
def test_positions_that_are_not_learned(kind):
    assert position_vectors(random_params(tiny(position_embedding=kind), 8, 8), (2, 2)) is None


def test_position_similarity_by_hand():
    """Opposite, orthogonal and equal directions of different lengths, and a zero."""
    positions = np.array([[[1, 0], [0, 5]], [[-2, 0], [3, 3]], [[0, 0], [0.1, 0]]], float)
    got = position_similarity(positions)
    assert got.shape == (3, 2, 3, 2)
    half = 0.5**0.5
    np.testing.assert_allclose(got[0, 0], [[1, 0], [-1, half], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(got[1, 1], [[half, half], [-half, 1], [0, half]], atol=1e-12)
    np.testing.assert_allclose(got, got.transpose(2, 3, 0, 1))


# --- Filters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 20], ids=["more filters than pixels", "fewer"])
def test_components_against_scikit_learn(width):
    kernel = normal(4, 4, 3, width) * np.linspace(1, 3, 48).reshape(4, 4, 3, 1) + 0.3
    components, shares = filter_components(kernel, 10)
    pca = PCA(10, svd_solver="full").fit(kernel.reshape(48, width).T)
    assert components.shape == (10, 4, 4, 3)
    np.testing.assert_allclose(shares, pca.explained_variance_ratio_, rtol=1e-10)
    cosines = np.sum(components.reshape(10, 48) * pca.components_, axis=1)
    np.testing.assert_allclose(np.abs(cosines), 1, rtol=1e-10)
    flat = components.reshape(10, 48)
    assert (flat.max(axis=1) >= -flat.min(axis=1)).all()  # a sign that can be reproduced


def test_there_are_no_more_components_than_pixels():
    components, shares = filter_components(normal(1, 1, 3, 50))
    assert components.shape == (3, 1, 1, 3)
    assert shares.sum() == pytest.approx(1)


# --- Similarity of layers --------------------------------------------------------------------


def unbiased_hsic(k, m):
    """Song et al. 2012, theorem 2, as it stands."""
    n = len(k)
    k, m, ones = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)
    return (np.trace(k @ m) + ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3))


def test_similarity_against_the_formula():
    features = np.stack([normal(12, 5, seed=i) + 3 for i in range(3)])
    features[1] += features[0] @ normal(5, 5, seed=9)
    grams = [layer @ layer.T for layer in features]
    got = layer_similarity(features)
    for i in range(3):
        for j in range(3):
            expected = unbiased_hsic(grams[i], grams[j]) / np.sqrt(
                unbiased_hsic(grams[i], grams[i]) * unbiased_hsic(grams[j], grams[j]))
            assert got[i, j] == pytest.approx(expected, abs=1e-10)


def test_similarity_of_many_examples_is_the_biased_one():
    """||Y'X||^2 / (||X'X|| ||Y'Y||) of centred columns (Kornblith et al. 2019), whose bias falls as
    1 / n."""
    x = normal(2000, 4)
    y = x @ normal(4, 3, seed=1) + normal(2000, 3, seed=2)
    x, y = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(y.T @ x) ** 2 / (
        np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    got = layer_similarity(np.stack([x, np.pad(y, ((0, 0), (0, 1)))]))
    assert 0.2 < expected < 0.9
    assert got[0, 1] == pytest.approx(expected, abs=3e-3)


def test_rotation_scale_and_offset_change_nothing():
    x = normal(40, 6)
    rotation = np.linalg.qr(normal(6, 6, seed=1))[0]
    got = layer_similarity(np.stack([x, 7 * x @ rotation + 100]))
    np.testing.assert_allclose(got, 1, atol=1e-9)


def test_features_that_have_nothing_in_common():
    """About 0 although there are fewer examples than channels: the biased estimate gives 0.8."""
    got = layer_similarity(np.stack([normal(100, 400, seed=1), normal(100, 400, seed=2)]))
    assert abs(got[0, 1]) < 0.05


def test_similarity_needs_four_examples():
    assert layer_similarity(normal(2, 4, 3)).shape == (2, 2)
    with pytest.raises(ValueError, match="4 examples"):
        layer_similarity(normal(2, 3, 3))


def test_bfloat16_and_device_arrays_are_taken():
    x = normal(2, 8, 3)
    np.testing.assert_allclose(
        layer_similarity(jax.numpy.asarray(x)), layer_similarity(x), atol=1e-4)

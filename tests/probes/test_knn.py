"""Weighted nearest neighbours against scikit-learn's, with DINO's weights as its function."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from vit_jax.probes import knn
from vit_jax.probes.extraction import Features


def blobs(images, seed):
    centres = np.random.default_rng(7).normal(size=(5, 12))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, images).astype(np.int32)
    features = (centres[labels] + 1.5 * rng.normal(size=(images, 12))) * rng.uniform(
        0.1, 10, (images, 1))  # lengths do not count
    return Features(features.astype(np.float32), labels, np.arange(images))


def sklearn_accuracy(train, test, neighbors, temperature):
    classifier = KNeighborsClassifier(
        neighbors, metric="cosine", algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / temperature))
    classifier.fit(np.float64(train.features), train.labels)
    return classifier.score(np.float64(test.features), test.labels)


@pytest.mark.parametrize("neighbors, temperature", [(20, 0.07), (1, 0.07), (7, 1.0), (20, 0.01)])
def test_equals_scikit_learn(neighbors, temperature):
    train, test = blobs(300, 0), blobs(211, 1)
    ours = knn.knn_accuracy(train, test, 5, neighbors, temperature)
    assert ours == sklearn_accuracy(train, test, neighbors, temperature)
    assert 0.4 < ours < 0.95


def test_the_settings_matter():
    """The comparison above would not notice a setting that is ignored."""
    train, test = blobs(300, 0), blobs(211, 1)
    assert len({knn.knn_accuracy(train, test, 5, *settings)
                for settings in ((20, 0.07), (1, 0.07), (20, 10.0))}) == 3


def test_parts_of_the_test_images(monkeypatch):
    """What does not fit into memory at once is done in parts, the last one padded."""
    train, test = blobs(300, 0), blobs(211, 1)
    whole = knn.knn_accuracy(train, test, 5)
    monkeypatch.setattr(knn, "_AT_ONCE", 300 * 50)
    assert knn.knn_accuracy(train, test, 5) == whole


def test_fewer_images_than_neighbours_and_features_of_zeros():
    train, test = blobs(6, 0), blobs(20, 1)
    assert knn.knn_accuracy(train, test, 5) == sklearn_accuracy(train, test, 6, 0.07)
    test.features[0] = 0.0
    assert np.isfinite(knn.knn_accuracy(train, test, 5))

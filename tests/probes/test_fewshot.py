"""Few-shot least squares against scikit-learn and a closed form of its own, in float64."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from vit_jax.data.records import Record
from vit_jax.probes.extraction import Features
from vit_jax.probes.fewshot import (
    accuracy,
    draw_all,
    draw_examples,
    draw_from_stream,
    fewshot_accuracies,
    least_squares,
)

CLASSES = 4


def blobs(images, width, seed=0, spread=1.5):
    """Features of classes around centres, on scales and offsets that differ by feature."""
    centres = np.random.default_rng(7).normal(size=(CLASSES, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, images).astype(np.int32)
    features = centres[labels] + spread * rng.normal(size=(images, width))
    features = features * np.linspace(0.1, 10, width) + np.linspace(-5, 5, width)
    return Features(features.astype(np.float32), labels, np.arange(images))


@pytest.mark.parametrize("images, width", [(40, 6), (9, 30), (7, 6)], ids=str)
@pytest.mark.parametrize("l2", [2.0**10, 1e-3])
def test_least_squares_is_ridge_regression(images, width, l2):
    """More images than features, fewer, and as many as with the bias column. Ridge without an
    intercept, on big_vision's columns, minimises the same; both are float64."""
    train, test = blobs(images, width), blobs(50, width, seed=1)

    def columns(features):
        x = np.float64(train.features)
        z = (np.float64(features) - x.mean(0)) / (x.std(0) + 1e-5)
        return np.hstack([z, np.full((len(z), 1), 100.0)])

    targets = np.where(np.eye(CLASSES)[train.labels] > 0, 1.0, -1.0)
    ridge = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(columns(train.features), targets)
    weights, bias = least_squares(train.features, train.labels, CLASSES, l2)
    assert weights.dtype == np.float64
    scores = test.features @ weights + bias
    expected = ridge.predict(columns(test.features))
    np.testing.assert_allclose(scores, expected, atol=1e-8 * np.abs(expected).max())
    assert accuracy(weights, bias, test) == np.mean(expected.argmax(1) == test.labels)


def test_both_forms_agree():
    """X'(XX' + l2)^-1 Y for few images equals (X'X + l2)^-1 X'Y, here written out."""
    train = blobs(8, 20)
    x = np.float64(train.features)
    std = x.std(0) + 1e-5
    z = np.hstack([(x - x.mean(0)) / std, np.full((8, 1), 100.0)])
    y = 2 * np.eye(CLASSES)[train.labels] - 1
    expected = np.linalg.inv(z.T @ z + 1024 * np.eye(21)) @ z.T @ y
    weights, bias = least_squares(train.features, train.labels, CLASSES)
    np.testing.assert_allclose(weights * std[:, None], expected[:-1], atol=1e-10)
    np.testing.assert_allclose(bias + x.mean(0) @ weights, 100 * expected[-1], atol=1e-10)


def test_features_that_are_constant_do_no_harm():
    train = blobs(12, 5)
    train.features[:, 2] = 3.0
    weights, bias = least_squares(train.features, train.labels, CLASSES)
    assert np.isfinite(weights).all() and np.isfinite(bias).all()
    np.testing.assert_allclose(weights[2], 0, atol=1e-12)


def test_examples_are_those_of_big_vision():
    """Its rule: one generator a seed, a permutation a class in order, the first of each."""
    labels = np.array([0, 1, 1, 0, 2, 1, 0, 2, 1, 1])
    draw = draw_examples(labels, 4, 2, seed=5)
    rng = np.random.default_rng(5)
    expected = [rng.permutation(np.where(labels == label)[0])[:2] for label in range(4)]
    for ours, theirs in zip(draw, expected, strict=True):
        assert ours.tolist() == theirs.tolist()
    assert [len(of_class) for of_class in draw] == [2, 2, 2, 0]
    more = draw_examples(labels, 4, 3, seed=5)
    assert all(few.tolist() == many[:2].tolist() for few, many in zip(draw, more, strict=True))
    assert any(a.tolist() != b.tolist()
               for a, b in zip(draw, draw_examples(labels, 4, 2, seed=6), strict=True))


class LargeSource:
    """A source that does not tell its labels, and counts what is read."""

    class_names = ("a", "b", "c")

    def __init__(self, labels):
        self._labels = labels
        self.read = 0

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        self.read += 1
        return Record(b"", int(self._labels[index]), "")

    def labels(self):
        return None


def test_examples_of_a_source_without_a_list_of_labels():
    labels = np.random.default_rng(0).integers(0, 3, 3000)
    source = LargeSource(labels)
    draws = draw_all(source, 5, seeds=2)
    assert source.read < 200
    for draw in draws:
        for label, indices in enumerate(draw):
            assert len(set(indices.tolist())) == 5 and (labels[indices] == label).all()
    assert draws[0][0].tolist() != draws[1][0].tolist()
    # A rare class gives what it has, every record having been looked at.
    rare = LargeSource(np.where(np.arange(100) == 17, 2, np.arange(100) % 2))
    assert [len(of_class) for of_class in draw_from_stream(rare, 3, 4, 0)] == [4, 4, 1]
    assert draw_from_stream(rare, 3, 4, 0)[2].tolist() == [17]


def test_accuracy_by_shots_and_seeds():
    """Against the pieces put together by hand; more shots know more."""
    train, test = blobs(400, 8), blobs(300, 8, seed=1)
    draws = [draw_examples(train.labels, CLASSES, 25, seed) for seed in range(3)]
    result = fewshot_accuracies(train, test, draws, (1, 5, 25))
    assert list(result) == [1, 5, 25] and all(len(values) == 3 for values in result.values())
    rows = np.concatenate([of_class[:5] for of_class in draws[2]])
    weights, bias = least_squares(train.features[rows], train.labels[rows], CLASSES)
    scores = np.float64(test.features) @ weights + bias
    assert result[5][2] == np.mean(scores.argmax(1) == test.labels)
    assert np.mean(result[1]) + 0.05 < np.mean(result[25]) > 0.5


def test_images_that_were_not_read_are_left_out():
    """`train` holds a part of the split: the chosen images, less one that could not be decoded."""
    whole, test = blobs(200, 8), blobs(100, 8, seed=1)
    draw = draw_examples(whole.labels, CLASSES, 3, 0)
    chosen = np.sort(np.concatenate(draw))

    def part(indices):
        return Features(whole.features[indices], whole.labels[indices], indices)

    all_of_them = fewshot_accuracies(part(chosen), test, [draw], (3,))
    assert all_of_them == fewshot_accuracies(whole, test, [draw], (3,))
    missing = draw[1][0]
    without = [draw[0], draw[1][1:], *draw[2:]]
    assert fewshot_accuracies(part(chosen[chosen != missing]), test, [draw], (3,)) == (
        fewshot_accuracies(whole, test, [without], (3,)))

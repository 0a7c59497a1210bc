"""Few-shot linear classification: the paper's quick measure of a representation (section 4.1).

Regularised least squares from the features of a few images per class to targets in {-1, 1}, solved
in closed form. Whatever the paper leaves open is as in big_vision's `evaluators/fewshot_lsr.py`:
features are standardised with the mean and standard deviation of the few training images, a
constant feature of 100 serves as the bias (so large that it is hardly regularised), l2 is 2^10, and
the images are drawn with three seeds. Unlike there, only one value of l2 is used, so a linear solve
in float64 replaces the eigendecomposition; the classifier is the same.
"""

from collections.abc import Sequence

import numpy as np

from vit_jax.data.records import Source
from vit_jax.probes.extraction import Features

SHOTS = (1, 5, 10, 25)
SEEDS = 3
L2 = 2.0**10
BIAS = 100.0

_TEST_ROWS = 4096  # scored at once

Draw = list[np.ndarray]  # of each class the chosen images, in the order of choice


def draw_examples(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> Draw:
    """Chooses `shots` images of every class, or all where there are fewer.

    For the same labels these are big_vision's images: one generator per seed permutes class after
    class, and fewer shots take the first of the same images.

    Args:
      labels: int [N].
      num_classes: K.
      shots: images per class, at most.
      seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(labels == label))[:shots]
            for label in range(num_classes)]


def draw_from_stream(source: Source, num_classes: int, shots: int, seed: int) -> Draw:
    """The same for a source too large to read every label: records are looked at in random order
    until every class has enough. The distribution is that of `draw_examples`, the images are not.
    """
    chosen: list[list[int]] = [[] for _ in range(num_classes)]
    lacking = num_classes
    for index in np.random.default_rng(seed).permutation(len(source)):
        of_class = chosen[source[int(index)].label]
        if len(of_class) < shots:
            of_class.append(int(index))
            lacking -= len(of_class) == shots
            if not lacking:
                break
    return [np.array(indices, np.int64) for indices in chosen]


def draw_all(source: Source, shots: int, seeds: int = SEEDS) -> list[Draw]:
    """A draw for every seed."""
    labels, classes = source.labels(), len(source.class_names)
    if labels is None:
        return [draw_from_stream(source, classes, shots, seed) for seed in range(seeds)]
    return [draw_examples(labels, classes, shots, seed) for seed in range(seeds)]


def least_squares(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2: float = L2
) -> tuple[np.ndarray, np.ndarray]:
    """The linear map whose largest output is the predicted class.

    With X the standardised features and the bias column, and Y the targets: (X'X + l2)^-1 X'Y, or,
    where there are fewer images than features, the equal X'(XX' + l2)^-1 Y.

    Args:
      features: [N, D].
      labels: int [N].
      num_classes: K.
      l2: strength of the regularisation; must be positive.

    Returns:
      Weights [D, K] and bias [K] for features as they were given, float64.
    """
    features = features.astype(np.float64)
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-5
    x = np.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)
    images, width = x.shape
    if images >= width:
        # X'Y without Y, which of many images and classes would be large: of each class the sum of
        # its images, less that of all others.
        sums = np.zeros((num_classes, width))
        np.add.at(sums, labels, x)
        solution = np.linalg.solve(x.T @ x + l2 * np.eye(width), (2 * sums - x.sum(axis=0)).T)
    else:
        y = 2.0 * (labels[:, None] == np.arange(num_classes)) - 1.0
        solution = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(images), y)
    weights = solution[:-1] / std[:, None]
    return weights, BIAS * solution[-1] - mean @ weights


def accuracy(weights: np.ndarray, bias: np.ndarray, test: Features) -> float:
    """Share of the images whose largest output is that of their class."""
    right = 0
    for start in range(0, len(test.labels), _TEST_ROWS):
        rows = slice(start, start + _TEST_ROWS)
        scores = test.features[rows].astype(np.float64) @ weights + bias
        right += int(np.sum(scores.argmax(axis=1) == test.labels[rows]))
    return right / len(test.labels)


def fewshot_accuracies(
    train: Features, test: Features, draws: Sequence[Draw], shots: Sequence[int]
) -> dict[int, list[float]]:
    """Accuracy on the test images by the number of shots, one for each draw.

    Args:
      train: has the images of the draws; those that are missing could not be decoded.
      test: what is classified.
      draws: see `draw_all`.
      shots: numbers of images per class.
    """
    def rows_of(indices):
        rows = np.searchsorted(train.index, indices)
        rows = np.minimum(rows, len(train.index) - 1)
        return rows[train.index[rows] == indices]

    result = {}
    for count in shots:
        result[count] = []
        for draw in draws:
            rows = rows_of(np.concatenate([indices[:count] for indices in draw]))
            classifier = least_squares(train.features[rows], train.labels[rows], len(draw))
            result[count].append(accuracy(*classifier, test))
    return result

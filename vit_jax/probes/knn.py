"""k-nearest-neighbour classification of features, weighted as in DINO (arXiv 2104.14294)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.probes.extraction import Features

NEIGHBORS = 20
TEMPERATURE = 0.07

_AT_ONCE = 2**26  # similarities, or votes, that are computed together: 256 MiB


def knn_accuracy(
    train: Features,
    test: Features,
    num_classes: int,
    neighbors: int = NEIGHBORS,
    temperature: float = TEMPERATURE,
) -> float:
    """Share of the test images whose nearest training images vote for their class.

    A neighbour's vote weighs exp(cosine similarity / temperature).

    Args:
      train: whose labels vote.
      test: what is classified.
      num_classes: K.
      neighbors: that vote; all where there are fewer training images.
      temperature: the lower, the more the nearest decide.
    """
    vote = jax.jit(functools.partial(
        _votes, num_classes=num_classes, neighbors=min(neighbors, len(train.labels)),
        temperature=temperature))
    known, labels = jnp.asarray(_unit(train.features)), jnp.asarray(train.labels)
    size = max(1, min(len(test.labels), _AT_ONCE // max(len(train.labels), num_classes)))
    right = 0
    for start in range(0, len(test.labels), size):
        rows = _unit(test.features[start:start + size])
        padded = np.pad(rows, ((0, size - len(rows)), (0, 0)))  # one shape, one compilation
        predictions = np.asarray(vote(padded, known, labels))[:len(rows)]
        right += int(np.sum(predictions == test.labels[start:start + size]))
    return right / len(test.labels)


def _unit(features):
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, 1e-12)


def _votes(features, known, labels, *, num_classes, neighbors, temperature):
    """The class with the most votes, for each of [n, D] features."""
    similarities = jnp.einsum("nd,md->nm", features, known, precision="highest")
    nearest, rows = jax.lax.top_k(similarities, neighbors)
    # Relative to the nearest, which leaves the order as it is and cannot overflow.
    weights = jnp.exp((nearest - nearest[:, :1]) / temperature)
    votes = jnp.zeros((len(features), num_classes))
    votes = votes.at[jnp.arange(len(features))[:, None], labels[rows]].add(weights)
    return jnp.argmax(votes, axis=1)

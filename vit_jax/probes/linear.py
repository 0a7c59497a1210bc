"""Linear probe: logistic regression on features, fitted with L-BFGS until no entry of the gradient
exceeds 1e-5. (At the two weakest regularisation strengths that stops somewhat early.)

The features are standardised with the mean and standard deviation of the training images. The
regularisation strength is chosen from `STRENGTHS` by the accuracy on a held-out tenth of the
training images; the probe is then fitted to all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.data.records import stratified_split
from vit_jax.errors import UserError
from vit_jax.probes.extraction import Features

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

_TOLERANCE = 1e-5  # of the largest entry of the gradient
_MOST_ITERATIONS = 1000


class LinearProbe(NamedTuple):
    """Its accuracy on the test images, and the strength that was chosen."""

    accuracy: float
    l2: float


def linear_probe(train: Features, test: Features, num_classes: int) -> LinearProbe:
    """Chooses the strength, fits to all training images, classifies the test images.

    Raises:
      UserError: no class has an image that could be held out.
    """
    mean, std = train.features.mean(axis=0), train.features.std(axis=0) + 1e-5
    x, labels = jnp.asarray((train.features - mean) / std), train.labels
    fit, held_out = stratified_split(labels, one_in=10)
    if not len(held_out):
        raise UserError("The linear probe needs a class with at least two training images.")

    def score(l2, rows, features, truth):
        weights, bias = logistic_regression(x[rows], labels[rows], num_classes, l2)
        logits = jnp.matmul(features, weights, precision="highest") + bias
        return float(np.mean(np.argmax(logits, axis=1) == truth))

    # The first of equals is the most regularised.
    best = max(STRENGTHS, key=lambda l2: score(l2, fit, x[held_out], labels[held_out]))
    tested = jnp.asarray((test.features - mean) / std)
    return LinearProbe(score(best, slice(None), tested, test.labels), best)


def logistic_regression(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2: float
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises mean cross-entropy + l2 / 2 * |W|^2; the bias is not regularised.

    scikit-learn's `LogisticRegression(C=1 / (N * l2))` minimises the same.

    Args:
      features: [N, D], of about unit variance.
      labels: int [N].
      num_classes: K.
      l2: strength of the regularisation.

    Returns:
      Weights float32 [D, K] and bias [K].
    """
    start = (jnp.zeros((features.shape[1], num_classes)), jnp.zeros(num_classes))
    return jax.device_get(_minimise(start, jnp.asarray(features), jnp.asarray(labels), l2))


@jax.jit
def _minimise(start, features, labels, l2):
    def loss(params):
        weights, bias = params
        logits = jnp.einsum("nd,dk->nk", features, weights, precision="highest") + bias
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses) + 0.5 * l2 * jnp.sum(weights**2)

    optimizer = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(loss)  # reuses what the line search has

    def update(carry):
        params, state = carry
        value, gradient = value_and_gradient(params, state=state)
        updates, state = optimizer.update(
            gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(params, updates), state

    def unfinished(carry):
        _, state = carry
        done = optax.tree.get(state, "count")
        steepest = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)
        return (done == 0) | ((done < _MOST_ITERATIONS) & (steepest > _TOLERANCE))

    params, _ = jax.lax.while_loop(unfinished, update, (start, optimizer.init(start)))
    return params

"""Losses per image, in float32."""

import jax
import jax.numpy as jnp
import optax


def targets_from_labels(labels: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """Class indices [B] to target probabilities [B, K]: `(1 - smoothing) one_hot + smoothing / K`
    (arXiv 1512.00567, section 7)."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def cross_entropy(name: str, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Loss of every image.

    Args:
      name: 'softmax', or 'sigmoid' for the sum of K binary cross-entropies (the paper's
        pretraining on ImageNet-21k and JFT).
      logits: float32 [B, K].
      targets: [B, K] in [0, 1].

    Returns:
      [B], in nats.
    """
    if name == "softmax":
        return optax.softmax_cross_entropy(logits, targets)
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)

"""Where a model looks: attention rollout, maps of single heads, mean attention distance.

Everything here takes a `record.Recording` and is pure JAX, to be jitted together with `record`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.analysis.record import Recording


def rollout(attention: jax.Array) -> jax.Array:
    """How much of every input token arrives in every output token, if values were passed on by
    attention alone (Abnar & Zuidema, arXiv 2005.00928, section 3; the paper's appendix D.8).

    The heads' weights are averaged; one half of a token is the residual connection, the other half
    attention, A = (I + W) / 2, so rows still add up to 1; layers are multiplied, the last leftmost.

    Args:
      attention: float32 [L, B, H, N, N].

    Returns:
      [B, N, N], from output (rows) to input tokens (columns).
    """
    mixing = (jnp.mean(attention, axis=2) + jnp.eye(attention.shape[-1])) / 2
    flow = mixing[0]
    for layer in mixing[1:]:
        flow = jnp.matmul(layer, flow, precision="highest")
    return flow


def rollout_maps(recording: Recording) -> jax.Array:
    """The rollout from the token(s) that the classifier reads to the patches: [B, height, width].

    Sums to less than 1 where there is a class token or registers, which keep the rest.
    """
    return seen_by_head(rollout(recording.attention), recording)


def attention_maps(recording: Recording) -> jax.Array:
    """Attention to the patches from the token(s) that the classifier reads, for every layer and
    head: [L, B, H, height, width]."""
    return seen_by_head(recording.attention, recording)


def seen_by_head(weights: jax.Array, recording: Recording) -> jax.Array:
    """[..., N, N] to [..., height, width]: the class token's weights of the patches or, where there
    is none, the mean of all patches' weights."""
    patches = weights[..., -recording.num_patches :]
    if recording.class_token:
        seen = patches[..., 0, :]
    else:
        seen = jnp.mean(patches[..., -recording.num_patches :, :], axis=-2)
    return seen.reshape(*seen.shape[:-1], *recording.grid)


def mean_distances(recording: Recording) -> jax.Array:
    """Mean attention distance in pixels for every layer, image and head: [L, B, H].

    A patch's distance is the mean of the distances between its centre and all patches', weighted by
    its attention; averaged over the patches (the paper's Figures 7 right and 11, where it is also
    averaged over 128 images). The class token and registers have no position in the image: they are
    excluded as queries, and the weights that patches give them are redistributed over the patches
    in proportion, so that a row's weights add up to 1. A patch that attends to none counts as 0.
    """
    distances = recording.stride * patch_distances(recording.grid)
    prefix = recording.attention.shape[-1] - recording.num_patches

    def weighted_sum(values):  # [h*w, h*w] to [L, B, H, h*w], without a copy of the weights
        values = jnp.asarray(np.pad(values, (prefix, 0)), jnp.float32)
        sums = jnp.einsum("lbhqk,qk->lbhq", recording.attention, values, precision="highest")
        return sums[..., prefix:]

    shares = weighted_sum(np.ones_like(distances))
    smallest = jnp.finfo(jnp.float32).tiny
    return jnp.mean(weighted_sum(distances) / jnp.maximum(shares, smallest), axis=-1)


def patch_distances(grid: tuple[int, int]) -> np.ndarray:
    """Euclidean distances between the centres of all pairs of patches, in patches: [h*w, h*w]."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.hypot(rows[:, None] - rows, columns[:, None] - columns)


def uniform_distance(grid: tuple[int, int], stride: int) -> float:
    """The mean attention distance in pixels of a head with uniform attention."""
    return float(stride * patch_distances(grid).mean())

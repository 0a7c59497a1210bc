"""Masked patch prediction (arXiv 2010.11929, appendix B.1.2): what is corrupted, what is to be
predicted, and the loss. The paper's code was never released; where its text leaves something open,
the choice is stated here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.masked import MASK, MaskedPatchModel, corrupted_count
from vit_jax.training.step import Batch, Metrics, Pixels, normalize

# Of the corrupted patches; the rest keep their own embedding, and are predicted like the others.
MASKED_SHARE = 0.8
SWAPPED_SHARE = 0.1

_LEVELS = 8  # of a channel: 3 bits


class Corruption(NamedTuple):
    """Which patches of a batch are corrupted, and how."""

    corrupted: jax.Array  # bool [B, N]: those that are predicted
    sources: jax.Array  # int32 [B, N]: see `vit_jax.models.masked.corrupt`


def sample_corruption(keys: jax.Array, patches: int, rate: float = 0.5) -> Corruption:
    """Corrupts exactly `corrupted_count(patches, rate)` patches of every image.

    Each of them independently becomes the mask token (80%), gets the embedding of another patch of
    the same image, chosen uniformly (10%), or keeps its own (10%). The paper does not say where the
    other patch comes from; one of the same image makes an image's loss independent of the rest of
    its batch.

    Args:
      keys: [B], one for each image.
      patches: N.
      rate: share of the patches; the paper's is 0.5, and BERT's, which it also tried, 0.15.

    Raises:
      ValueError: so few patches that none would be corrupted, or none be another.
    """
    count = corrupted_count(patches, rate)

    def sample(key):
        which, how, other = jax.random.split(key, 3)
        corrupted = jax.random.permutation(which, patches) < count
        draw = jax.random.uniform(how, (patches,))
        own = jnp.arange(patches, dtype=jnp.int32)
        offset = jax.random.randint(other, (patches,), 1, patches)
        sources = jnp.where(
            draw < MASKED_SHARE, MASK,
            jnp.where(draw < MASKED_SHARE + SWAPPED_SHARE, (own + offset) % patches, own))
        return Corruption(corrupted, jnp.where(corrupted, sources, own))

    return jax.vmap(sample)(keys)


def cut_patches(images: jax.Array, side: int) -> jax.Array:
    """[B, H, W, C] to [B, N, side, side, C], patches in row-major order."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // side, side, width // side, side, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, side, side, channels)


def color_classes(pixels: jax.Array) -> jax.Array:
    """3-bit mean colours: per channel floor(8 * mean in [0, 1]), at most 7; red is the highest.

    Args:
      pixels: uint8 [..., h, w, 3], averaged over h and w. Integers, so that nothing is rounded.

    Returns:
      int32 [...] in [0, 512).
    """
    most = 255 * pixels.shape[-3] * pixels.shape[-2]
    sums = jnp.sum(pixels, axis=(-3, -2), dtype=jnp.int32)
    return _join(jnp.minimum(_LEVELS * sums // most, _LEVELS - 1))


def _join(levels):
    return levels @ jnp.array([_LEVELS**2, _LEVELS, 1])


def class_colors(classes: jax.Array) -> jax.Array:
    """The middle of each 3-bit colour, float32 [..., 3] in [0, 1]."""
    levels = jnp.stack([classes // _LEVELS**2, classes // _LEVELS % _LEVELS, classes % _LEVELS], -1)
    return (levels + 0.5) / _LEVELS


def make_targets(
    images: jax.Array, target: str, side: int, pixels: Pixels = Pixels()  # noqa: B008
) -> jax.Array:
    """What a model should predict of every patch.

    Args:
      images: uint8 [B, H, W, 3].
      target: one of `vit_jax.models.masked.TARGETS`.
      side: pixels per side of a patch.
      pixels: statistics that 'pixels' are normalised with. The paper does not say how it scales
        them; here they are what the model would see.

    Returns:
      'mean_color': classes int32 [B, N]; 'downsized_colors': classes int32 [B, N, 16] of the
      means of 4x4 equal cells; 'pixels': float32 [B, N, side * side * 3].
    """
    patches = cut_patches(images, side)
    batch, count = patches.shape[:2]
    if target == "mean_color":
        return color_classes(patches)
    if target == "downsized_colors":
        cells = cut_patches(patches.reshape(-1, side, side, 3), side // 4)
        return color_classes(cells).reshape(batch, count, -1)
    return normalize(patches, pixels).reshape(batch, count, -1)


def prediction_loss(
    predictions: jax.Array, targets: jax.Array, corrupted: jax.Array
) -> jax.Array:
    """Mean over each image's corrupted patches; the others are not scored.

    Args:
      predictions: of the model, float32 [B, N, ...].
      targets: of `make_targets`.
      corrupted: bool [B, N].

    Returns:
      [B]: softmax cross-entropy in nats, averaged over the cells of a patch, or the squared error,
      averaged over its pixels.
    """
    if jnp.issubdtype(targets.dtype, jnp.integer):
        losses = optax.softmax_cross_entropy_with_integer_labels(predictions, targets)
    else:
        losses = jnp.square(predictions - targets)
    losses = jnp.mean(losses.reshape(*corrupted.shape, -1), axis=-1)
    return _mean_where(losses, corrupted)


def _mean_where(values, chosen):
    return jnp.sum(jnp.where(chosen, values, 0.0), axis=1) / jnp.sum(chosen, axis=1)


def predicted_colors(
    predictions: jax.Array, target: str, pixels: Pixels = Pixels()  # noqa: B008
) -> jax.Array:
    """The mean colour that predictions [B, N, ...] of any target imply, [B, N, 3] in [0, 1]; for
    classes, the middle of the most likely one."""
    if target == "mean_color":
        return class_colors(jnp.argmax(predictions, axis=-1))
    if target == "downsized_colors":
        return jnp.mean(class_colors(jnp.argmax(predictions, axis=-1)), axis=2)
    means = jnp.mean(predictions.reshape(*predictions.shape[:2], -1, 3), axis=2)
    return jnp.clip(means * jnp.asarray(pixels.std) + jnp.asarray(pixels.mean), 0.0, 1.0)


def make_loss_sum(
    model: MaskedPatchModel, rate: float, pixels: Pixels = Pixels()  # noqa: B008
) -> Callable[[Any, Batch, jax.Array], jax.Array]:
    """Returns loss_sum(params, batch, key), summed over the valid images of the batch: what the
    train step differentiates."""

    def loss_sum(params, batch, key):
        corruption_key, dropout_key = jax.random.split(key)
        images = batch["image"]
        keys = jax.random.split(corruption_key, len(images))
        corruption = sample_corruption(keys, model.num_patches(images.shape[1:3]), rate)
        predictions = model.apply(
            {"params": params}, normalize(images, pixels), corruption.sources, train=True,
            rngs={"dropout": dropout_key})
        targets = make_targets(images, model.target, model.patch_pixels, pixels)
        losses = prediction_loss(predictions, targets, corruption.corrupted)
        return jnp.sum(jnp.where(batch["mask"], losses, 0.0))

    return loss_sum


def make_eval_step(
    model: MaskedPatchModel, rate: float, seed: int, pixels: Pixels = Pixels()  # noqa: B008
) -> Callable[[Any, Batch], Metrics]:
    """Builds eval_step(params, batch) -> per image: loss [B] and accuracy [B], the share of its
    corrupted patches whose 3-bit mean colour is right (whatever the target).

    The batch needs `index`, int32 [B], each image's place in its split. The corruption depends on
    it and the seed alone, so it is the same in every evaluation and for every batch size.
    """

    def eval_step(params, batch):
        images, side = batch["image"], model.patch_pixels
        key = jax.random.key(seed)
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["index"])
        corruption = sample_corruption(keys, model.num_patches(images.shape[1:3]), rate)
        predictions = model.apply(
            {"params": params}, normalize(images, pixels), corruption.sources, train=False)
        targets = make_targets(images, model.target, side, pixels)
        colors = predicted_colors(predictions, model.target, pixels)
        levels = jnp.minimum(jnp.floor(_LEVELS * colors).astype(jnp.int32), _LEVELS - 1)
        right = _join(levels) == color_classes(cut_patches(images, side))
        return {
            "loss": prediction_loss(predictions, targets, corruption.corrupted),
            "accuracy": _mean_where(right, corruption.corrupted),
        }

    return eval_step

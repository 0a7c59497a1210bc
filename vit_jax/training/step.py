"""The train step and the evaluation step: pure functions of (state, batch).

A batch is a dictionary of arrays with a leading axis B, made by `vit_jax.data.pipeline`:

  image  uint8 [B, H, W, 3]
  label  int32 [B]
  mask   bool [B], False for padding and for images that could not be decoded
  flip   bool [B], images to mirror (training only)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from vit_jax.training import mixing
from vit_jax.training.losses import cross_entropy, targets_from_labels
from vit_jax.training.optimizer import hold_frozen
from vit_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
LossSum = Callable[[Any, Batch, jax.Array], jax.Array]  # of (params, batch, key)
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

_MIXING_STREAM = 2**32 - 1  # folded into the step's key; no part of the batch has this index


class Pixels(NamedTuple):
    """Mean and standard deviation of pixels in [0, 1], one number or (R, G, B)."""

    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5


def normalize(images: jax.Array, pixels: Pixels = Pixels()) -> jax.Array:  # noqa: B008
    """uint8 [..., C] in [0, 255] to float32, [-1, 1] with the default statistics."""
    mean, std = (255.0 * np.asarray(x, np.float64) for x in pixels)
    return (images.astype(jnp.float32) - mean.astype(np.float32)) / std.astype(np.float32)


def flip(images: jax.Array, mirrored: jax.Array) -> jax.Array:
    """Mirrors the images [B, H, W, C] whose entry in `mirrored` [B] is True, left to right."""
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def make_loss_sum(
    model: nn.Module, config: ml_collections.ConfigDict, pixels: Pixels = Pixels()  # noqa: B008
) -> LossSum:
    """The loss of classification, summed over the valid images."""

    def loss_sum(params, batch, key):
        images = mixing.mixed_images(batch, lambda x: normalize(x, pixels))
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        with jax.named_scope("loss"):
            targets = mixing.mixed_targets(batch, lambda labels: targets_from_labels(
                labels, logits.shape[-1], config.loss.label_smoothing))
            losses = cross_entropy(config.loss.name, logits, targets)
            return jnp.sum(jnp.where(batch["mask"], losses, 0.0))

    return loss_sum


def make_train_step(
    loss_sum: LossSum,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ml_collections.ConfigDict,
    *,
    axis_name: str | None = None,
) -> TrainStep:
    """Builds the step: forward, backward, update.

    Args:
      loss_sum: loss_sum(params, batch, key), summed over the valid images; see `make_loss_sum`.
      optimizer: turns gradients into updates.
      schedule: learning rate by update, for the metrics.
      config: the run's config; read are seed, accumulation_steps, ema_decay, optimizer.frozen and,
        of data, mixup, cutmix and random_erasing.
      axis_name: pmap's axis, whose devices each hold a part of the batch; None under jit, where
        the batch is one (sharded) array and the compiler sums over devices. Under pmap dropout,
        mixup, CutMix and erasing differ from jit's: each device draws and pairs for itself.

    Returns:
      step(state, batch) -> (state, {loss, grad_norm, learning_rate}). The loss is the mean over
      the valid images of the whole batch, whatever the number of devices and accumulation steps.
    """
    parts, data = config.accumulation_steps, config.data

    def total(x):
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        batch = batch | {"image": flip(batch["image"], batch["flip"])}
        if data.mixup or data.cutmix or data.random_erasing:
            batch = mixing.draw(
                jax.random.fold_in(key, _MIXING_STREAM), batch, mixup=data.mixup,
                cutmix=data.cutmix, erasing=data.random_erasing)
        valid = total(jnp.sum(batch["mask"], dtype=jnp.float32))

        def part_gradient(part, key):
            return jax.value_and_grad(
                lambda params: loss_sum(hold_frozen(config, params), part, key))(state.params)

        if parts == 1:
            loss, gradients = part_gradient(batch, key)
        else:
            # Strided, so that every part takes its share from every device: a contiguous split of
            # an array that is sharded by batch would move images between devices.
            split = jax.tree.map(
                lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

            def accumulate(sums, part_and_index):
                part, index = part_and_index
                new = part_gradient(part, jax.random.fold_in(key, index))
                return jax.tree.map(jnp.add, sums, new), None

            zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            (loss, gradients), _ = jax.lax.scan(accumulate, zeros, (split, jnp.arange(parts)))

        with jax.named_scope("optimizer"):
            # Sums over parts and devices, divided once: the mean over all valid images.
            loss, gradients = jax.tree.map(
                lambda x: total(x) / jnp.maximum(valid, 1.0), (loss, gradients))
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            metrics = {
                "loss": loss,
                "grad_norm": optax.tree.norm(gradients),
                "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            }
            params = optax.apply_updates(state.params, updates)
            step, ema_params = state.step + 1, state.ema_params
            if config.ema_decay is not None:
                ema_params = moving_average(ema_params, params, config.ema_decay, step)
        return TrainState(step, params, opt_state, ema_params), metrics

    return train_step


def moving_average(average: Any, params: Any, decay: float, updates: jax.Array) -> Any:
    """`d * average + (1 - d) * params` with d = min(decay, (1 + t) / (10 + t)) after t updates, as
    TensorFlow's ExponentialMovingAverage with num_updates: while there are few updates a long
    average would hold little but the initial weights."""
    share = jnp.maximum(1 - decay, 9 / (10 + updates))
    return jax.tree.map(lambda a, p: a + share * (p - a), average, params)


def make_eval_step(
    model: nn.Module, config: ml_collections.ConfigDict, pixels: Pixels = Pixels()  # noqa: B008
) -> Callable[[Any, Batch], Metrics]:
    """Builds eval_step(params, batch) -> per image: loss [B], prediction [B] and in_top5 [B]. The
    loss is that of the label itself: smoothing only regularizes training."""

    def eval_step(params, batch):
        logits = model.apply({"params": params}, normalize(batch["image"], pixels), train=False)
        num_classes = logits.shape[-1]
        targets = targets_from_labels(batch["label"], num_classes)
        _, best = jax.lax.top_k(logits, min(5, num_classes))
        return {
            "loss": cross_entropy(config.loss.name, logits, targets),
            "prediction": best[:, 0],
            "in_top5": jnp.any(best == batch["label"][:, None], axis=1),
        }

    return eval_step

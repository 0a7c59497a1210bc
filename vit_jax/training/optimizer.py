"""From the config to an optax optimizer and its learning-rate schedule."""

import re

import jax
import jax.numpy as jnp
import ml_collections
import optax

from vit_jax.errors import UserError
from vit_jax.training.adafactor import scale_by_adafactor


def make_schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
    """Learning rate of update `step` (0 for the first): linear warmup from 0, then decay, then for
    rsqrt and constant a linear cooldown to 0, which update `total_steps` would reach (arXiv
    2106.04560, section 3.5).

    Raises:
      UserError: warmup and cooldown leave no steps, the decay needs no cooldown, or it would end
        above its peak.
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    warmup, cooldown = schedule.warmup_steps, schedule.cooldown_steps
    if cooldown and schedule.name in ("cosine", "linear"):
        raise UserError(
            f"config.schedule.cooldown_steps={cooldown} is for schedules without an end, rsqrt and "
            f"constant; set it to 0 for config.schedule.name={schedule.name!r}."
        )
    if warmup + cooldown and warmup + cooldown >= total_steps:
        with_cooldown = f" with cooldown_steps={cooldown}" if cooldown else ""
        raise UserError(
            f"config.schedule.warmup_steps={warmup}{with_cooldown} leaves no step of "
            f"the {total_steps} for the rest of the schedule; lower "
            + ("both." if cooldown else f"it, as with --config.schedule.warmup_steps="
               f"{total_steps // 10}.")
        )
    if schedule.name in ("cosine", "linear") and schedule.end_value > peak:
        raise UserError(
            f"config.schedule.end_value={schedule.end_value} is above "
            f"config.optimizer.learning_rate={peak}; use a smaller value."
        )
    steps = total_steps - warmup
    if schedule.name == "cosine":
        alpha = schedule.end_value / peak if peak else 0.0
        decay = optax.cosine_decay_schedule(peak, steps, alpha)
    elif schedule.name == "linear":
        decay = optax.linear_schedule(peak, schedule.end_value, steps)
    elif schedule.name == "rsqrt":
        def decay(step):  # inverse square root, as in arXiv 2106.04560
            return peak / jnp.sqrt(1.0 + step / float(schedule.timescale))
    else:
        decay = optax.constant_schedule(peak)
    phases, starts = [decay], []
    if warmup:
        phases, starts = [optax.linear_schedule(0.0, peak, warmup), decay], [warmup]
    if cooldown:
        reached = float(decay(steps - cooldown))
        phases.append(optax.linear_schedule(reached, 0.0, cooldown))
        starts.append(total_steps - cooldown)
    return optax.join_schedules(phases, starts) if starts else decay


def make_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule, params
) -> optax.GradientTransformation:
    """Clipping -> direction of SGD, Adam or Adafactor -> decoupled weight decay of kernels ->
    learning rate.

    Args:
      config: the run's config; its `optimizer` section is read.
      schedule: learning rate by update.
      params: parameters, or their shapes.

    Raises:
      UserError: a pattern of `optimizer.frozen` is no regular expression, matches no parameter, or
        leaves none to train.
    """
    o = config.optimizer
    steps = []
    if o.clip_norm is not None:
        steps.append(optax.clip_by_global_norm(o.clip_norm))
    dtype = jnp.dtype(o.momentum_dtype)
    if o.name == "sgd":
        steps.append(optax.trace(o.momentum, accumulator_dtype=dtype))
    elif o.name == "adafactor":
        steps.append(scale_by_adafactor())
        if o.momentum:
            steps.append(optax.ema(o.momentum, debias=False, accumulator_dtype=dtype))
    else:
        steps.append(optax.scale_by_adam(o.beta1, o.beta2, o.epsilon, mu_dtype=dtype))
    if o.weight_decay:
        steps.append(optax.add_decayed_weights(o.weight_decay, mask=_is_kernel))
    if o.layer_decay != 1.0:
        steps.append(_scale_by_layer(o.layer_decay, _count_blocks(params)))
    steps.append(optax.scale_by_learning_rate(schedule))
    optimizer = optax.chain(*steps)
    if not o.frozen:
        return optimizer
    # Frozen parameters have neither optimizer state nor a part in the clipped norm.
    labels = _frozen_labels(o.frozen, params)
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def _is_kernel(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def hold_frozen(config: ml_collections.ConfigDict, params):
    """The parameters, with gradients stopped for those that `optimizer.frozen` names, so that the
    part of the backward pass that only these need is not computed."""
    if not config.optimizer.frozen:
        return params
    return jax.tree.map(
        lambda label, x: jax.lax.stop_gradient(x) if label == "frozen" else x,
        _frozen_labels(config.optimizer.frozen, params), params)


def _names(params):
    return ["/".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(params)]


def _count_blocks(params):
    names = _names(params)
    stacked = [leaf.shape[0] for name, leaf in zip(names, jax.tree.leaves(params), strict=True)
               if "/encoderblock/" in name]
    return stacked[0] if stacked else 1 + max(
        (int(m[1]) for name in names if (m := re.search(r"encoderblock_(\d+)/", name))),
        default=-1)


def _scale_by_layer(decay: float, blocks: int) -> optax.GradientTransformation:
    """Layer-wise learning-rate decay as in BEiT and MAE (arXiv 2111.06377, appendix A): 1 for the
    head and the final norm, `decay` for the last block, down to `decay ** (blocks + 1)` for the
    embeddings (and a hybrid's ResNet). Updates may lack those of frozen blocks."""

    def scale(updates):
        def factor(name, leaf):
            if re.match(r"(head|patch_head|pre_logits|Transformer/encoder_norm)/", name):
                return 1.0
            if match := re.search(r"encoderblock_(\d+)/", name):
                return decay ** (blocks - int(match[1]))
            if "/encoderblock/" in name:
                factors = decay ** (blocks - jnp.arange(blocks, dtype=jnp.float32))
                return factors.reshape(-1, *[1] * (leaf.ndim - 1))
            return decay ** (blocks + 1)

        leaves, structure = jax.tree.flatten(updates)
        return structure.unflatten(
            [leaf * factor(name, leaf)
             for name, leaf in zip(_names(updates), leaves, strict=True)])

    return optax.stateless(lambda updates, params: scale(updates))


def _frozen_labels(patterns, params):
    paths, structure = _names(params), jax.tree.structure(params)
    frozen = set()
    for pattern in patterns:
        try:
            matches = [path for path in paths if re.search(pattern, path)]
        except re.error as error:
            raise UserError(
                f"config.optimizer.frozen: {pattern!r} is not a regular expression: {error}."
            ) from None
        if not matches:
            raise UserError(
                f"config.optimizer.frozen: {pattern!r} matches no parameter; their paths look like "
                f"{', '.join(paths[:3])} and {paths[-1]}."
            )
        frozen.update(matches)
    if len(frozen) == len(paths):
        raise UserError("config.optimizer.frozen matches every parameter; nothing would train.")
    return structure.unflatten("frozen" if path in frozen else "trained" for path in paths)

"""Adafactor's update direction, as "Scaling Vision Transformers" uses it.

Adam keeps a second moment per parameter. For a matrix, Adafactor (arXiv 1804.04235) keeps only the
means of these moments over rows and over columns, which take hardly any memory. The variant of
arXiv 2106.04560, section 3.4 (big_vision's `scale_by_adafactor`), neither clips the update nor
multiplies it by the parameters' scale, and caps the decay so that the average does not freeze in
long runs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_DECAY_POWER = 0.8
_DECAY_CAP = 0.999
_SMALLEST_FACTORED = 32  # parameters with a shorter second axis keep their full second moment
_EPSILON = 1e-30  # added to squared gradients


class Factors(NamedTuple):
    """Means of squared gradients over one axis, and over the other."""

    rows: jax.Array
    columns: jax.Array


class AdafactorState(NamedTuple):
    """Updates done, and for every parameter its second moment: whole, or as Factors."""

    count: jax.Array
    nu: Any


def scale_by_adafactor() -> optax.GradientTransformation:
    """Gradients divided by the root of their second moment; momentum not included.

    Unlike `optax.scale_by_factored_rms` it treats every block of a stacked `encoderblock`
    (`scan_layers`) as the same block alone, so both layouts train alike and can be converted into
    each other.
    """

    def init(params):
        def zeros(path, param):
            return jax.tree.map(jnp.zeros_like, _per_block(path, _statistics)(param))

        return AdafactorState(
            jnp.zeros((), jnp.int32), jax.tree.map_with_path(zeros, params))

    def update(gradients, state, params=None):
        count = optax.safe_increment(state.count)
        decay = jnp.minimum(_DECAY_CAP, 1 - count.astype(jnp.float32) ** -_DECAY_POWER)

        def average(path, gradient, moment):
            return jax.tree.map(
                lambda old, new: decay * old + (1 - decay) * new,
                moment, _per_block(path, _statistics)(gradient))

        def divide(path, gradient, moment):
            return _per_block(path, _divide_by_root)(gradient, moment)

        nu = jax.tree.map_with_path(average, gradients, state.nu)
        return jax.tree.map_with_path(divide, gradients, nu), AdafactorState(count, nu)

    return optax.GradientTransformation(init, update)


def _per_block(path, function):
    """The function for the parameter at this path: over the layer axis of stacked blocks."""
    stacked = any(key.key == "encoderblock" for key in path)
    return jax.vmap(function) if stacked else function


def _statistics(gradient):
    """Squared gradients, or their means over the two longest axes in turn."""
    squares = gradient**2 + _EPSILON
    axes = _longest_axes(gradient.shape)
    if axes is None:
        return squares
    row, column = axes
    return Factors(rows=squares.mean(column), columns=squares.mean(row))


def _divide_by_root(gradient, moment):
    """By the root of rows * columns / mean(rows), the factored second moment. Each factor by
    itself: their product underflows where gradients are zero."""
    if not isinstance(moment, Factors):
        return gradient * jax.lax.rsqrt(moment)
    row, column = _longest_axes(gradient.shape)
    rows = jnp.expand_dims(moment.rows, column)
    columns = jnp.expand_dims(moment.columns, row)
    share = rows / rows.mean(row, keepdims=True)
    return gradient * jax.lax.rsqrt(share) * jax.lax.rsqrt(columns)


def _longest_axes(shape):
    """The two longest axes, in their order; None if one of them is too short to be worth it."""
    axes = sorted(sorted(range(len(shape)), key=lambda axis: shape[axis])[-2:])
    if len(axes) < 2 or min(shape[axis] for axis in axes) < _SMALLEST_FACTORED:
        return None
    return axes

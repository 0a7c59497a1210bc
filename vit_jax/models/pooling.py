"""The ResNets' max-pooling, with a gradient of comparisons and sums.

For JAX's own gradient, XLA's GPU compiler stores the index of every window's maximum and then
scatters, and its CPU backend takes five times as long (docs/performance.md).
"""

import functools

import jax
import jax.numpy as jnp


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max-pooling with stride 2, `nn.max_pool(x, (3, 3), (2, 2), 'SAME')`, of [B, H, W, C].

    The gradient is the same too: all of it goes to the first maximum of a window, row by row.
    """
    return _pool(_pool(x, 2), 1)


def _forward(x):
    return max_pool(x), x


def _backward(x, cotangent):
    # First in a row, then the first of the rows: the order of ties in `max_pool`'s gradient.
    return (_pool_gradient(x, 2, _pool_gradient(_pool(x, 2), 1, cotangent)),)


max_pool.defvjp(_forward, _backward)


def _pool(x, axis):
    return functools.reduce(jnp.maximum, _windows(x, axis))


def _pool_gradient(x, axis, cotangent):
    """From the gradient of `_pool(x, axis)` to that of x."""
    first, second, _ = _windows(x, axis)
    top = _pool(x, axis)
    is_first = first == top
    is_second = (second == top) & ~is_first
    to_first, to_second = (jnp.where(here, cotangent, 0) for here in (is_first, is_second))
    to_third = jnp.where(is_first | is_second, 0, cotangent)
    # The third of a window is the first of the next. The last window's is none, or padding.
    to_first += _shift(to_third, axis, 1, 0)
    gradient = jnp.stack([to_first, to_second], axis + 1)
    shape = list(x.shape)
    shape[axis] = 2 * cotangent.shape[axis]
    return jax.lax.slice_in_dim(gradient.reshape(shape), shape[axis] - x.shape[axis], None,
                                axis=axis)


def _windows(x, axis):
    """The first, second and third number of every window of three along an axis."""
    size = x.shape[axis]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (size % 2, 0)  # 'SAME' begins before the first number of an odd size
    x = jnp.pad(x, padding, constant_values=-jnp.inf)
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1:])
    first, second = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return first, second, _shift(first, axis, -1, -jnp.inf)


def _shift(x, axis, by, fill):
    """Moved one further or back along an axis, with `fill` in the free place."""
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (by, -by, 0)
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), padding)

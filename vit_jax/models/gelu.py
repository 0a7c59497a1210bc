"""GELU whose backward pass keeps its argument alone.

Differentiated by JAX, it would keep the argument and what follows from it, three arrays as wide as
the MLP. To compute these again costs less than to write and read them, on a GPU as on a CPU.
"""

import functools
import math

import jax
import jax.numpy as jnp

_SLOPE = math.sqrt(8 / math.pi)
_CUBIC = 0.044715


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: jax.Array, approximate: bool) -> jax.Array:
    """`x * Phi(x)` with the normal distribution function Phi (arXiv 1606.08415), any shape.

    Computed in float32 and returned in the type of x. `approximate` is the formula with tanh,
    written as `x * sigmoid(2 u)`, for 1 + tanh(u) = 2 sigmoid(2 u); otherwise Phi is exact.
    """
    return _forward(x, approximate)[0]


def _forward(x, approximate):
    wide = x.astype(jnp.float32)
    return (wide * _distribution(wide, approximate)).astype(x.dtype), x


def _distribution(x, approximate):
    if approximate:
        return jax.nn.sigmoid(_SLOPE * (x + _CUBIC * x * x * x))
    return 0.5 * jax.lax.erfc(x * -math.sqrt(0.5))


def _backward(approximate, x, cotangent):
    wide = x.astype(jnp.float32)
    phi = _distribution(wide, approximate)
    if approximate:
        density = phi * (1 - phi) * _SLOPE * (1 + 3 * _CUBIC * wide * wide)
    else:
        density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    slope = phi + wide * density
    return ((cotangent.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_forward, _backward)

"""GELU whose backward pass saves only its input.

By default, JAX would save the input and intermediate results, three arrays as wide as the MLP.
Recomputing these costs less than writing and reading them, on GPUs as well as on CPUs.
"""

import functools
import math

import jax
import jax.numpy as jnp

from vit_jax.models.gpu import compute_capability

_SLOPE = math.sqrt(8 / math.pi)
_CUBIC = 0.044715


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: jax.Array, approximate: bool) -> jax.Array:
    """`x * Phi(x)` with the normal distribution function Phi (arXiv 1606.08415), any shape.

    Computed in float32 and returned in the type of x. `approximate` selects the tanh formula,
    written as `x * sigmoid(2 u)`, since 1 + tanh(u) = 2 sigmoid(2 u), or in the form that XLA lets
    cuBLAS compute; otherwise Phi is exact.
    """
    if approximate and _cublas_computes_it(x.dtype):
        return as_xla_knows_it(x)
    wide = x.astype(jnp.float32)
    return (wide * _distribution(wide, approximate)).astype(x.dtype)


def _cublas_computes_it(dtype) -> bool:
    """Whether fusing GELU into the preceding matrix product is faster than running both separately.
    That is reported for 16-bit types on data-center GPUs since Hopper, and the opposite for others
    (github.com/karpathy/llm.c, pull requests 338 and 591; sgl-project/sglang, 28168 and 34350)."""
    return dtype.itemsize == 2 and (9, 0) <= compute_capability() < (11, 0)


def as_xla_knows_it(x: jax.Array) -> jax.Array:
    """The tanh formula in the form that XLA can fuse into a preceding matrix product, which then
    applies GELU to its float32 results, so that the hidden layer is not read and written again.
    Where it is not fused, it is computed in the type of x and rounded at every step."""
    u = (_SLOPE / 2) * (x + _CUBIC * (x * (x * x)))
    return x * (0.5 * (1 + jnp.tanh(u)))


def _forward(x, approximate):
    return gelu(x, approximate), x


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

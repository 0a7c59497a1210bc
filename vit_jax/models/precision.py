"""Mixed precision: bfloat16 operands, float32 results, in the forward and the backward pass."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_float32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum(subscripts, a, b)` accumulated and returned in float32, whatever a and b are.

    Attention logits and class logits need the float32 result. Plain
    `preferred_element_type=float32` would give it too, but its gradient multiplies a float32
    cotangent by a bfloat16 operand, and that product runs at float32 speed. Here the cotangent
    is rounded to the operands' type first, so every matrix multiplication of a bfloat16 model is
    a bfloat16 one.
    """
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _forward(subscripts, a, b):
    return einsum_float32(subscripts, a, b), (a, b)


def _backward(subscripts, operands, cotangent):
    _, pull_back = jax.vjp(functools.partial(jnp.einsum, subscripts), *operands)
    return pull_back(cotangent.astype(jnp.result_type(*operands)))


einsum_float32.defvjp(_forward, _backward)


def promote_operands(inputs, kernel, bias, *, dtype):
    """For `nn.Dense(promote_dtype=...)`: operands in `dtype`, the bias stays float32."""
    return inputs.astype(dtype), kernel.astype(dtype), bias


def dot_general_float32(inputs, kernel, dimension_numbers, precision=None):
    """For `nn.Dense(dot_general=...)`: [..., D] times [D, K] with a float32 result."""
    del dimension_numbers, precision  # Dense always contracts the last axis with the first
    return einsum_float32("...d,dk->...k", inputs, kernel)

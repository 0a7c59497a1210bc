"""Layer normalisation whose backward pass keeps its input and two numbers a token."""

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-6


class LayerNorm(nn.Module):
    """Each token to mean 0 and variance 1, then times `scale` plus `bias` (arXiv 1607.06450)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] of any type to float32 [..., D]."""
        width = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        return layer_norm(x, scale, bias)


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalises x [..., D] by token; scale and bias are [D], the result is float32.

    Differentiated by JAX, a bfloat16 model would keep several float32 arrays as large as the tokens
    here; this keeps the tokens as they are, which the residual connection needs anyway.
    """
    return _forward(x, scale, bias)[0]


def _forward(x, scale, bias):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    # As Flax has it, and therefore Google: both means in one pass over the tokens.
    variance = jnp.maximum(jnp.mean(wide * wide, axis=-1, keepdims=True) - mean * mean, 0.0)
    factor = jax.lax.rsqrt(variance + EPSILON)
    return (wide - mean) * (factor * scale) + bias, (x, mean, factor, scale)


def _backward(residuals, cotangent):
    x, mean, factor, scale = residuals
    normal = (x.astype(jnp.float32) - mean) * factor
    tokens = tuple(range(x.ndim - 1))
    d_scale, d_bias = jnp.sum(cotangent * normal, axis=tokens), jnp.sum(cotangent, axis=tokens)
    d_normal = cotangent * scale
    along = jnp.mean(d_normal * normal, axis=-1, keepdims=True)
    d_x = (d_normal - jnp.mean(d_normal, axis=-1, keepdims=True) - normal * along) * factor
    return d_x.astype(x.dtype), d_scale, d_bias


layer_norm.defvjp(_forward, _backward)

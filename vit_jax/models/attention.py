"""Multi-head self-attention with Google's parameter tree (query, key, value, out)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models.precision import einsum_float32

IMPLEMENTATIONS = ("xla", "cudnn")


class MultiHeadDotProductAttention(nn.Module):
    """Self-attention, eq. 5-8 of the paper: `softmax(q k^T / sqrt(head_dim)) v`, then a projection.

    Logits and softmax are float32 whatever `dtype` is; the four projections and both attention
    products run in `dtype`.

    Attributes:
      num_heads: heads H; must divide the width D.
      dtype: type of the computation.
      dropout_rate: dropout of the attention weights (every weight drawn for itself).
      relative_positions: adds `q . r[p_q - p_k]` to the logits (paper, appendix D.4), with one
        learned vector r per offset and head.
      implementation: 'xla', or 'cudnn' for the fused kernel of NVIDIA GPUs (bfloat16 only,
        without dropout and relative positions).
    """

    num_heads: int
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    relative_positions: bool = False
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps tokens [B, N, D] to [B, N, D]."""
        _, length, width = x.shape
        if width % self.num_heads:
            raise ValueError(
                f"hidden_size {width} is not divisible by num_heads {self.num_heads}; "
                "choose a width that is a multiple of the number of heads."
            )
        head_dim = width // self.num_heads

        def project(name):
            return nn.DenseGeneral(
                (self.num_heads, head_dim),
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                name=name,
            )(x)

        query, key, value = project("query"), project("key"), project("value")  # [B, N, H, d]

        if self.implementation == "cudnn":
            self._check_cudnn(train)
            heads = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        else:
            logits = einsum_float32("bqhd,bkhd->bhqk", query, key)
            if self.relative_positions:
                logits += self._relative_logits(query, length, head_dim)
            weights = jax.nn.softmax(logits * head_dim**-0.5, axis=-1)
            weights = nn.Dropout(self.dropout_rate)(weights, deterministic=not train)
            heads = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(self.dtype), value)

        out = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            name="out",
        )(heads)
        return checkpoint_name(out, "attention_out")

    def _relative_logits(self, query, length, head_dim):
        """Logits [B, H, N, N] of the queries against one learned vector per offset p_q - p_k."""
        name, shape = "relative_embedding", (2 * length - 1, self.num_heads, head_dim)
        if self.has_variable("params", name):
            have = jnp.shape(self.get_variable("params", name))
            if have != shape:
                raise ValueError(
                    f"{name} of these parameters has shape {list(have)}, but {length} tokens need "
                    f"{list(shape)}: they were made for another image size. Use that size."
                )
        table = self.param(name, nn.initializers.normal(0.02), shape)
        by_offset = einsum_float32("bqhd,rhd->bhqr", query, table.astype(self.dtype))
        positions = jnp.arange(length)
        offsets = positions[:, None] - positions[None, :] + length - 1  # [N, N], all >= 0
        return jnp.take_along_axis(by_offset, offsets[None, None], axis=-1)

    def _check_cudnn(self, train):
        if self.relative_positions or (train and self.dropout_rate):
            raise ValueError(
                "attention_implementation='cudnn' supports neither attention dropout nor relative "
                "position embeddings; use attention_implementation='xla'."
            )
        if jnp.dtype(self.dtype) == jnp.float32:
            raise ValueError(
                "attention_implementation='cudnn' needs dtype='bfloat16'; in float32 use 'xla'."
            )

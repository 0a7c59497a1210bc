"""Multi-head self-attention with Google's parameter tree (query, key, value, out)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models.gpu import compute_capability
from vit_jax.models.partition import constrain_tokens
from vit_jax.models.precision import einsum_float32

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def choose_implementation(
    requested: str,
    *,
    dtype: Any,
    length: int,
    head_dim: int,
    dropout_rate: float = 0.0,
    relative_positions: bool = False,
) -> tuple[str, str]:
    """Which attention kernel runs on this machine's (first) device.

    Args:
      requested: one of IMPLEMENTATIONS; 'auto' is cuDNN's fused kernel wherever it can be used.
      dtype: of queries, keys and values.
      length: tokens N.
      head_dim: width of a head.
      dropout_rate: of the attention weights; 0 outside of training.
      relative_positions: whether the logits get learned terms of relative positions.

    Returns:
      (name, reason): 'xla' or 'cudnn', and if 'auto' chose 'xla', what ruled out cuDNN (otherwise
      '').

    Raises:
      ValueError: 'cudnn' is requested and cannot be used.
    """
    if requested == "xla":
        return "xla", ""
    reason = _rules_out_cudnn(dtype, length, head_dim, dropout_rate, relative_positions)
    if reason and requested == "cudnn":
        raise ValueError(
            f"attention_implementation='cudnn' cannot be used here: {reason}; use 'auto' or 'xla'."
        )
    return ("xla", reason) if reason else ("cudnn", "")


def _rules_out_cudnn(dtype, length, head_dim, dropout_rate, relative_positions):
    if compute_capability() < (8, 0):
        return "cuDNN's kernel needs an NVIDIA GPU of compute capability 8.0 or later"
    if reason := cudnn_lacks(dtype, head_dim, dropout_rate, relative_positions):
        return reason
    return _cudnn_refusal(jnp.dtype(dtype).name, length, head_dim)


@functools.cache
def _cudnn_refusal(dtype: str, length: int, head_dim: int) -> str:
    """Why the installed versions of JAX, XLA and cuDNN reject it; '' if they do not."""
    heads = jax.ShapeDtypeStruct((1, fused_length(length), 1, head_dim), dtype)
    try:
        _compile(jax.grad(lambda x: fused_attend(x, x, x, length).sum()), heads)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        return f"JAX refuses cuDNN's kernel: {reason.splitlines()[0].rstrip('.')}"
    return ""


def _compile(function, argument):
    jax.jit(function).lower(argument).compile()


def cudnn_lacks(dtype: Any, head_dim: int, dropout_rate: float, relative_positions: bool) -> str:
    """What rules out cuDNN's kernel on any GPU; '' if nothing does. Arguments are those of
    `choose_implementation`."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's kernel needs dtype bfloat16, not {jnp.dtype(dtype).name}"
    if relative_positions:
        return "cuDNN's kernel has no learned relative positions"
    if dropout_rate:
        return "JAX offers no attention dropout with cuDNN's kernel"
    if head_dim % 8 or head_dim > 128:
        return (f"cuDNN's kernel needs heads of a width that is a multiple of 8 and at most 128, "
                f"not {head_dim}")
    return ""


def fused_length(length: int) -> int:
    """How many tokens `fused_attend` needs for so many: JAX (0.10 to 0.12) refuses cuDNN's gradient
    for odd numbers, such as 14x14 patches and a class token. Those need one more."""
    return length + length % 2


def of_length(x: jax.Array, length: int) -> jax.Array:
    """Tokens [B, N, D] truncated, or padded with zeros, to [B, length, D]."""
    return jnp.pad(x[:, :length], ((0, 0), (0, max(0, length - x.shape[1])), (0, 0)))


def fused_attend(
    query: jax.Array, key: jax.Array, value: jax.Array, length: int, implementation: str = "cudnn"
) -> jax.Array:
    """`attend` by the kernel that `jax.nn.dot_product_attention` calls `implementation`.

    Tokens after the first `length` are padding: nothing attends to them, and their own results are
    meaningless.
    """
    lengths = None
    if query.shape[1] > length:
        lengths = jnp.full(query.shape[0], length, jnp.int32)
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation=implementation)


@jax.custom_vjp
def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`softmax(q k^T / sqrt(d)) v` of queries, keys and values [B, N, H, d], in their type.

    Equal to using `jax.nn.softmax`, but computed in the order of FlashAttention (arXiv 2205.14135):
    the normalisation divides the product with the values, [N, d], instead of the weights, [N, N],
    and the backward pass, too, uses the unnormalised weights. XLA's CPU backend runs this three
    times as fast, mainly because heads come before tokens in every product.
    """
    return _attend_forward(query, key, value)[0]


def _attend_forward(query, key, value):
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [B, H, N, d]
    query *= _scale(query)
    logits = einsum_float32("bhqd,bhkd->bhqk", query, key)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(query.dtype)
    heads = einsum_float32("bhqk,bhkd->bhqd", weights, value) / total
    heads = heads.astype(query.dtype).swapaxes(1, 2)
    return heads, (query, key, value, weights, total, heads)


def _attend_backward(residuals, cotangent):
    # Without the barrier XLA's GPU compiler saves the float32 logits instead and recomputes `exp`.
    query, key, value, weights, total, heads = jax.lax.optimization_barrier(residuals)
    # The gradient of softmax subtracts the weighted mean of the weights' gradients; summed with
    # the values first, it needs no array [N, N] (arXiv 2205.14135, B.2).
    mean = jnp.sum(cotangent.astype(jnp.float32) * heads, axis=-1, keepdims=True)
    mean = mean.swapaxes(1, 2) / total
    cotangent = (cotangent.swapaxes(1, 2) / total).astype(query.dtype)
    d_weights = einsum_float32("bhqd,bhkd->bhqk", cotangent, value) - mean
    d_logits = (weights * d_weights).astype(query.dtype)
    d_query = einsum_float32("bhqk,bhkd->bhqd", d_logits, key) * _scale(query)
    d_key = einsum_float32("bhqk,bhqd->bhkd", d_logits, query)
    d_value = jnp.einsum("bhqk,bhqd->bhkd", weights, cotangent)
    return tuple(x.astype(query.dtype).swapaxes(1, 2) for x in (d_query, d_key, d_value))


def _scale(query):
    return query.shape[-1] ** -0.5


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def product_apart(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` of [T, D] and [D, K], not merged with other products of the same x by XLA.

    Its GPU compiler merges small ones (up to 64 MB) into one product, forward and backward. Adding
    the biases of queries, keys and values and splitting the result then takes another pass over
    memory, and concatenating their gradients yet another.
    """
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    return x @ kernel


def _product_forward(x, kernel):
    # Written out, since remat's policies look for products but not inside custom VJPs.
    apart = jax.lax.optimization_barrier((x, kernel))
    return jnp.matmul(*apart), (x, kernel)


def _product_backward(operands, cotangent):
    x, kernel = jax.lax.optimization_barrier(operands)
    return cotangent @ kernel.T, x.T @ cotangent


product_apart.defvjp(_product_forward, _product_backward)


class _Projection(nn.Module):
    """`nn.DenseGeneral` to heads as a plain matrix product: cuBLAS can add a bias that is a vector,
    but XLA first broadcasts one of shape [H, d] to all tokens. `apart`: use `product_apart`."""

    num_heads: int
    head_dim: int
    dtype: Any
    apart: bool

    @nn.compact
    def __call__(self, x):
        """Maps tokens [B, N, D] of type `dtype` to [B, N, H, d]."""
        width, heads = x.shape[-1], (self.num_heads, self.head_dim)
        columns = self.num_heads * self.head_dim

        def xavier_uniform(key):
            return nn.initializers.xavier_uniform()(key, (width, columns)).reshape(width, *heads)

        kernel = self.param("kernel", xavier_uniform).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, heads).astype(self.dtype)
        product = product_apart if self.apart else jnp.matmul
        y = product(x.reshape(-1, width), kernel.reshape(width, columns))
        return (y + bias.reshape(columns)).reshape(*x.shape[:2], *heads)


class MultiHeadDotProductAttention(nn.Module):
    """Self-attention, eq. 5-8 of the paper: `softmax(q k^T / sqrt(head_dim)) v`, then a projection.

    Logits and softmax are float32 whatever `dtype` is; the four projections and both attention
    products run in `dtype`.

    Attributes:
      num_heads: heads H; must divide the width D.
      dtype: type of the computation.
      dropout_rate: dropout of the attention weights (drawn independently for every weight).
      relative_positions: adds `q . r[p_q - p_k]` to the logits (paper, appendix D.4), with one
        learned vector r per offset and head.
      implementation: 'xla'; 'cudnn' for the fused kernel of NVIDIA GPUs; or 'auto' for whichever
        `choose_implementation` chooses.
    """

    num_heads: int
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    relative_positions: bool = False
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, *, length: int | None = None, queries: int | None = None, train: bool,
    ) -> jax.Array:
        """Maps tokens [B, N, D] to [B, N, D], or only the first `queries` of them: [B, queries, D].

        If `length` is given, the tokens after it are padding for cuDNN's kernel: nothing attends to
        them, and their outputs are meaningless.
        """
        batch, tokens, width = x.shape
        length = tokens if length is None else length
        x = x.astype(self.dtype)  # once, or the three gradients would be summed in float32
        if width % self.num_heads:
            raise ValueError(
                f"hidden_size {width} is not divisible by num_heads {self.num_heads}; "
                "choose a width that is a multiple of the number of heads."
            )
        head_dim = width // self.num_heads

        # A fused kernel never materialises the weights, so recording takes the path that does.
        recording = self.is_mutable_collection("intermediates")
        implementation, _ = choose_implementation(
            "xla" if recording else self.implementation,
            dtype=self.dtype,
            length=length,
            head_dim=head_dim,
            dropout_rate=self.dropout_rate if train else 0.0,
            relative_positions=self.relative_positions,
        )
        fused = implementation == "cudnn" and queries is None  # a few queries do not need it
        # Padded here and not around the kernel, where XLA would copy eight arrays instead of two.
        x = of_length(x, fused_length(length) if fused else length)
        # A single token per image is so small that the compiler would prefer to shard its features.
        asking = constrain_tokens(x[:, :queries])
        query, key, value = (
            _Projection(self.num_heads, head_dim, self.dtype, implementation == "cudnn",
                        name=name)(inputs)
            for name, inputs in (("query", asking), ("key", x), ("value", x)))

        if fused:
            heads = fused_attend(query, key, value, length)
        elif recording or self.relative_positions or (train and self.dropout_rate):
            logits = einsum_float32("bqhd,bkhd->bhqk", query, key)
            if self.relative_positions:
                logits += self._relative_logits(query, length, head_dim)
            weights = jax.nn.softmax(logits * head_dim**-0.5, axis=-1)
            self.sow("intermediates", "attention", weights)
            weights = nn.Dropout(self.dropout_rate)(weights, deterministic=not train)
            heads = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(self.dtype), value)
        else:
            heads = attend(query, key, value)

        out = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            name="out",
        )(heads.reshape(-1, self.num_heads, head_dim))
        out = out.reshape(batch, heads.shape[1], width)
        return checkpoint_name(of_length(out, queries or tokens), "attention_out")

    def _relative_logits(self, query, length, head_dim):
        """Logits [B, H, Q, N] of Q queries against one learned vector per offset p_q - p_k."""
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
        offsets = positions[: query.shape[1], None] - positions + length - 1  # [Q, N], all >= 0
        return jnp.take_along_axis(by_offset, offsets[None, None], axis=-1)

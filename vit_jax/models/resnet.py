"""The paper's ResNets (BiT): standardised convolutions, group normalisation, post-activation.

They serve twice: as the stem of a hybrid ViT (`resnet_features`, called in the ViT's own scope so
that the parameter tree is Google's) and, with a head, as the convolutional baseline (`ResNet`).
Equal to Google's code in the kernel standardisation ((w - mean) / (std + 1e-5)), the group
normalisation (32 groups, eps 1e-6) and the padding (SAME, so stride 2 pads right and bottom first).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.pooling import max_pool
from vit_jax.models.precision import dot_general_float32, promote_operands


def standardize(kernel: jax.Array) -> jax.Array:
    """Each output channel of a kernel [h, w, in, out] to mean 0 and (almost) variance 1."""
    kernel = kernel - jnp.mean(kernel, axis=(0, 1, 2))
    return kernel / (jnp.std(kernel, axis=(0, 1, 2)) + 1e-5)


class StdConv(nn.Module):
    """Convolution without bias whose kernel is standardised at every use (arXiv 1903.10520)."""

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            standardize(kernel).astype(self.dtype),
            window_strides=self.strides,
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


@jax.custom_vjp
def add_relu(a: jax.Array, b: jax.Array) -> jax.Array:
    """`relu(a + b)` whose backward pass uses the result instead of the sum. The result is saved for
    the next convolution anyway, whereas XLA's GPU compiler would recompute the sum from the
    shortcut and the input of group normalisation."""
    return nn.relu(a + b)


def _add_relu_forward(a, b):
    result = add_relu(a, b)
    return result, result


def _add_relu_backward(result, cotangent):
    # Without the barrier XLA would simplify relu(x) > 0 to x > 0 and need the sum after all.
    cotangent = jnp.where(jax.lax.optimization_barrier(result) > 0, cotangent, 0)
    return cotangent, cotangent


add_relu.defvjp(_add_relu_forward, _add_relu_backward)


GroupNorm = functools.partial(nn.GroupNorm, num_groups=32, epsilon=1e-6)


class ResidualUnit(nn.Module):
    """Bottleneck: 1x1 -> 3x3 (strided) -> 1x1 to four times the width, ReLU after the addition."""

    features: int
    strides: tuple[int, int] = (1, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(StdConv, dtype=self.dtype)
        norm = functools.partial(GroupNorm, dtype=self.dtype)
        wide = 4 * self.features

        shortcut = x
        if x.shape[-1] != wide or self.strides != (1, 1):
            shortcut = conv(wide, (1, 1), self.strides, name="conv_proj")(shortcut)
            shortcut = norm(name="gn_proj")(shortcut)

        y = nn.relu(norm(name="gn1")(conv(self.features, (1, 1), name="conv1")(x)))
        y = nn.relu(norm(name="gn2")(conv(self.features, (3, 3), self.strides, name="conv2")(y)))
        y = conv(wide, (1, 1), name="conv3")(y)
        y = norm(name="gn3", scale_init=nn.initializers.zeros)(y)
        return add_relu(shortcut, y)


class ResNetStage(nn.Module):
    """`num_units` bottlenecks, the first of which may reduce the resolution."""

    num_units: int
    features: int
    first_strides: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        for i in range(self.num_units):
            strides = self.first_strides if i == 0 else (1, 1)
            x = ResidualUnit(self.features, strides, self.dtype, name=f"unit{i + 1}")(x)
        return x


def resnet_features(x, stages: tuple[int, ...], width_factor: int = 1, dtype=jnp.float32):
    """Root (7x7/2, max-pool/2) and stages; call it inside a compact method.

    Args:
      x: images [B, H, W, C].
      stages: bottlenecks per stage; () is the root alone.
      width_factor: multiplies every width; 1 gives 64 channels at the root.
      dtype: type of the computation.

    Returns:
      [B, H / s, W / s, C'] with s = `total_stride(stages)`.
    """
    width = 64 * width_factor
    x = StdConv(width, (7, 7), (2, 2), dtype, name="conv_root")(x)
    x = nn.relu(GroupNorm(dtype=dtype, name="gn_root")(x))
    x = max_pool(x)
    for i, num_units in enumerate(stages):
        strides = (1, 1) if i == 0 else (2, 2)
        x = ResNetStage(num_units, width * 2**i, strides, dtype, name=f"block{i + 1}")(x)
    return x


def total_stride(stages: tuple[int, ...]) -> int:
    """Input pixels per output pixel: 4 for the root, doubled by every stage but the first."""
    return 4 * 2 ** max(0, len(stages) - 1)


class ResNet(nn.Module):
    """Convolutional baseline: the stem of the hybrids, global average pooling, linear head.

    Attributes:
      num_classes: classes K; 0 returns the pooled features.
      stages: bottlenecks per stage, (3, 4, 6, 3) for R50.
      width_factor: the `x2` of R50x2.
      head_bias_init: initial bias of every class.
      dtype: type of the computation; logits are float32.
    """

    num_classes: int
    stages: tuple[int, ...]
    width_factor: int = 1
    head_bias_init: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] in [-1, 1] to logits [B, K], or features if K = 0."""
        del train  # nothing in this network is random
        check_images(images)
        x = resnet_features(images, self.stages, self.width_factor, self.dtype)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        if not self.num_classes:
            return x
        return make_head(self.num_classes, self.head_bias_init, self.dtype)(x)


def make_head(num_classes: int, bias_init: float, dtype, name: str = "head") -> nn.Dense:
    """The zero-initialised linear head, with operands in `dtype` and float32 logits."""
    return nn.Dense(
        num_classes,
        dtype=dtype,
        kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(bias_init),
        promote_dtype=promote_operands,
        dot_general=dot_general_float32,
        name=name,
    )


def check_images(images) -> None:
    """Refuses what a model would silently get wrong: a missing batch axis, or uint8 pixels."""
    if jnp.ndim(images) != 4:
        raise ValueError(f"images must have shape [B, H, W, C], not {list(jnp.shape(images))}.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floats in [-1, 1], not {images.dtype}; "
            "scale uint8 pixels with x / 127.5 - 1."
        )

"""What the backward pass keeps, against lists written by hand."""

import collections

import jax
import jax.numpy as jnp
import pytest

from vit_jax.config import base_config
from vit_jax.models.shapes import params_shapes
from vit_jax.models.variants import create_model
from vit_jax.training.activations import residuals
from vit_jax.training.step import make_loss_sum

pytestmark = pytest.mark.core
D, M, H, N, L = 32, 48, 4, 17, 3  # width, MLP, heads, tokens of 16 patches and a class, blocks
SIZE = (16, 16)


def found(remat="none", dtype="bfloat16", **options):
    model = create_model(
        "B/16", num_classes=10, patch_size=4, hidden_size=D, mlp_dim=M, num_heads=H, num_layers=L,
        scan_layers=True, remat=remat, dtype=jnp.dtype(dtype), **options)
    return residuals(model, params_shapes(model, SIZE), SIZE, make_loss_sum(model, base_config()))


def per_image(arrays):
    return sum(array.bytes for array in arrays if array.per_image)


@pytest.mark.parametrize("dtype, itemsize", [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("remat, scalars", [
    ("full", N * D),  # the block's input
    ("names", 2 * N * D + N * M),  # and the attention's output, and the hidden layer
    ("dots", 5 * N * D + N * M),  # the same, and q, k, v
])
def test_remat(remat, scalars, dtype, itemsize):
    kept = found(remat, dtype)
    assert kept.blocks == L
    assert per_image(kept.block) == per_image(kept.block_fused) == scalars * itemsize


def test_without_remat():
    """Operands of products: both norms' outputs, q, k, v, attention weights, heads, the activation
    of the hidden layer. And for the rest of the backward pass: both norms' inputs, the hidden
    layer, and in float32 the sum of every row of attention weights and two statistics of every
    token and norm."""
    kept = found()
    wide = 2 * (2 + 4 + 2) * N * D + 2 * 2 * N * M + 2 * H * N * N
    assert per_image(kept.block_fused) == wide + 4 * H * N + 4 * 4 * N
    assert per_image(kept.block) > per_image(kept.block_fused)
    # Kernels in bfloat16, which all images share.
    shared = sum(array.bytes for array in kept.block_fused if not array.per_image)
    assert shared == 2 * (4 * D * D + 2 * D * M)


def test_dropout_keeps_masks():
    """One byte an entry: after the attention projection and both dense layers."""
    more = per_image(found(dropout_rate=0.1).block_fused) - per_image(found().block_fused)
    assert more == 2 * N * D + N * M


def test_outside_of_the_blocks():
    """The flattened patches, what the last norm and the head read, and the logits."""
    shapes = collections.Counter(array.shape for array in found().outside)
    assert shapes[None, N - 1, 4 * 4 * 3] == 1 and shapes[None, N, D] == 1
    assert shapes[None, 10] >= 1 and shapes[D, 10] == 1


def test_a_model_without_blocks():
    """Of a ResNet all is outside; a unit keeps at least the input of each of its convolutions."""
    model = create_model("R50x1", num_classes=10, stages=(1,), dtype=jnp.dtype("float32"))
    loss_sum = make_loss_sum(model, base_config())
    kept = residuals(model, params_shapes(model, (32, 32)), (32, 32), loss_sum)
    assert kept.blocks == 0 and not kept.block
    inputs = 32 * 32 * 3 + 8 * 8 * 64 * 3  # the root; two 1x1 and one 3x3 of the only unit
    assert per_image(kept.outside) >= 4 * inputs


def test_nothing_but_elementwise_work_keeps_only_its_input():
    """A compiler computes additions and casts again where they are read."""
    import flax.linen as nn

    class Elementwise(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            x = images.mean((1, 2)) + self.param("shift", nn.initializers.zeros, (3,))
            return (x * 2.0 + 1.0) ** 2 * x

    model = Elementwise()
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *SIZE, 3)), train=False)["params"])
    kept = residuals(model, params, SIZE, make_loss_sum(model, base_config()))
    # The mean, a sum over the image, and the loss's log-sum-exp; neither power nor product.
    assert per_image(kept.outside) <= 4 * (3 + 3 + 3 + 2)

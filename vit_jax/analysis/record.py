"""A forward pass that also returns what it computed: attention weights and tokens of every layer.

    logits, recording = record(model, params, images)

Nothing about the model has to change for it: with fused attention, scanned or rematerialised blocks
the recording is the same. Attention weights are large (22 MB an image for B/16 at 224 pixels,
511 MB for L/16 at 384), so take small batches, and let one jitted function call `record` and return
only what is made of it.
"""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.scan import unstack_blocks
from vit_jax.models.vit import VisionTransformer


def attention_bytes(model: VisionTransformer, image_size: tuple[int, int]) -> int:
    """Size of one image's attention weights in a recording."""
    tokens = math.prod(model.patch_grid(image_size)) + 1 + model.register_tokens
    return 4 * model.num_layers * model.num_heads * tokens**2


@flax.struct.dataclass
class Recording:
    """What happened to B images in L layers of H heads.

    Attributes:
      attention: float32 [L, B, H, N, N]. Row q of a head holds the weights with which token q
        averages the values of all tokens, and adds up to 1.
      tokens: float32 [L + 1, B, N, D], what goes into the first block, then what comes out of each.
      grid: (height, width) of the patches. They are the last height * width tokens, row by row.
      stride: pixels per side of a patch, of the stride of a hybrid's ResNet times its patch size.
      class_token: whether token 0 is the class token. Registers stand between it and the patches.
    """

    attention: jax.Array
    tokens: jax.Array
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    stride: int = flax.struct.field(pytree_node=False)
    class_token: bool = flax.struct.field(pytree_node=False)

    @property
    def num_patches(self) -> int:
        """Tokens that are patches; what stands before them is the class token and registers."""
        return self.grid[0] * self.grid[1]


def record(
    model: nn.Module, params: dict[str, Any], images: jax.Array
) -> tuple[jax.Array, Recording]:
    """Runs the model without dropout.

    Args:
      model: of `create_model` or `load_model`.
      params: its parameters.
      images: float [B, H, W, C], normalised.

    Returns:
      What `model.apply` returns, in float32 to 1e-5, and the recording.

    Raises:
      UserError: the model has no Transformer.
    """
    if not isinstance(model, VisionTransformer) or not model.num_layers:
        raise UserError(f"A {type(model).__name__} without Transformer blocks has no attention.")
    outputs, state = model.apply({"params": params}, images, train=False, mutable=["intermediates"])
    encoder = unstack_blocks(state["intermediates"])["Transformer"]
    blocks = [encoder[f"encoderblock_{i}"] for i in range(model.num_layers)]
    attention = [block["MultiHeadDotProductAttention_0"]["attention"][0] for block in blocks]
    tokens = [*encoder["tokens"], *(block["tokens"][0] for block in blocks)]
    return outputs, Recording(
        attention=jnp.stack(attention),
        tokens=jnp.stack(tokens).astype(jnp.float32),
        grid=model.patch_grid(images.shape[1:3]),
        stride=model.patch_pixels,
        class_token=model.classifier in ("token", "token_unpooled"),
    )

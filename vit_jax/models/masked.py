"""Masked patch prediction, the paper's self-supervision (arXiv 2010.11929, appendix B.1.2): a
Vision Transformer that sees some patches replaced and predicts what they looked like."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.resnet import make_head
from vit_jax.models.vit import VisionTransformer

TARGETS = ("mean_color", "downsized_colors", "pixels")
COLORS = 512  # 3 bits for each of red, green and blue
CELLS = 16  # of a patch that is downsized to 4x4
MASK = -1  # in `sources`: replaced by the mask token


def corrupted_count(patches: int, rate: float) -> int:
    """How many of an image's patches are corrupted: `round(rate * patches)`.

    Raises:
      ValueError: none would be, or there is no other patch.
    """
    count = round(rate * patches)
    if not count or patches < 2:
        raise ValueError(
            f"masked patch prediction at a rate of {rate} corrupts none of {patches} patches; use "
            "a larger rate, smaller patches or a larger image."
        )
    return count


def corrupt(patches: jax.Array, mask_token: jax.Array, sources: jax.Array) -> jax.Array:
    """Replaces patch embeddings.

    Args:
      patches: [B, N, D].
      mask_token: [1, 1, D].
      sources: int [B, N], for every position the patch of the same image whose embedding it gets
        (its own, where nothing changes), or MASK.

    Returns:
      [B, N, D].
    """
    taken = jnp.take_along_axis(patches, jnp.maximum(sources, 0)[..., None], axis=1)
    return jnp.where((sources == MASK)[..., None], mask_token.astype(patches.dtype), taken)


class MaskedPatchModel(VisionTransformer):
    """A `VisionTransformer` with a mask token, and a linear layer on every patch in place of the
    head. The rest of the parameter tree is that of `backbone`, so it fine-tunes as any other.

    Attributes are those of `VisionTransformer`, and
      target: what is predicted of every patch: 'mean_color' (its mean in 3 bits a channel, one of
        512 classes; the paper's results), 'downsized_colors' (the same for each cell of its 4x4
        downsized version) or 'pixels' (all of them).
    """

    target: str = "mean_color"

    @nn.compact
    def __call__(
        self, images: jax.Array, sources: jax.Array | None = None, *, train: bool
    ) -> jax.Array:
        """Maps images [B, H, W, C] in [-1, 1] to float32 predictions for every patch.

        Args:
          images: whole; it is their patch embeddings that are corrupted.
          sources: int [B, N], see `corrupt`; None leaves all as it is.
          train: whether dropout and stochastic depth are on.

        Returns:
          Logits [B, N, 512] for 'mean_color' and [B, N, 16, 512] for 'downsized_colors'; values
          [B, N, P * P * C] in the scale of the images for 'pixels', with P = `patch_pixels`.
          Patches and the cells in them are in row-major order.

        Raises:
          ValueError: as `VisionTransformer`; unknown target, or patches that have no 4x4 cells.
        """
        channels = images.shape[-1]
        patches, grid = self.embed_patches(images)
        mask_token = self.param(
            "mask_token", nn.initializers.normal(stddev=0.02), (1, 1, self.hidden_size))
        if sources is not None:
            patches = corrupt(patches, mask_token, sources)
        x = self.encode_patches(patches, grid, train=train)[:, -patches.shape[1] :]

        side = self.patch_pixels
        if self.target == "mean_color":
            width = COLORS
        elif self.target == "downsized_colors":
            if side % 4:
                raise ValueError(
                    f"the target 'downsized_colors' needs patches whose side is divisible by 4, "
                    f"not {side}; use 'mean_color'."
                )
            width = CELLS * COLORS
        elif self.target == "pixels":
            width = side * side * channels
        else:
            raise ValueError(f"target={self.target!r} is not one of {', '.join(TARGETS)}.")
        x = make_head(width, 0.0, self.dtype, name="patch_head")(x)
        return x.reshape(*x.shape[:2], CELLS, COLORS) if self.target == "downsized_colors" else x

    @property
    def leaves_out_tokens(self) -> bool:
        """Never: every patch is predicted."""
        return False

    @nn.nowrap
    def num_patches(self, image_size: tuple[int, int]) -> int:
        """Of an image of (height, width) pixels."""
        return math.prod(self.patch_grid(image_size))

    @property
    def backbone(self) -> VisionTransformer:
        """The same model without mask token and predictions; it returns features."""
        return VisionTransformer(**_fields(self))


def masked_patch_model(model: VisionTransformer, target: str) -> MaskedPatchModel:
    """The model for pretraining `model`, without its head and representation layer."""
    without = {"num_classes": 0, "representation_size": None}
    return MaskedPatchModel(**(_fields(model) | without), target=target)


def _fields(model):
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(VisionTransformer)
            if f.name not in ("parent", "name")}

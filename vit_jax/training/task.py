"""What a run learns (`config.task`), as the loss that its train step differentiates."""

import flax.linen as nn
import ml_collections

from vit_jax.models.masked import MaskedPatchModel
from vit_jax.training import masked_patches
from vit_jax.training.step import LossSum, Pixels, make_loss_sum


def make_task_loss(
    model: nn.Module, config: ml_collections.ConfigDict, pixels: Pixels = Pixels()  # noqa: B008
) -> LossSum:
    """The loss of the model that `state.build_model` made of the same config."""
    if isinstance(model, MaskedPatchModel):
        return masked_patches.make_loss_sum(model, config.masked.rate, pixels)
    return make_loss_sum(model, config, pixels)

"""What a run starts from: the model of its config, and the initial train state."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from vit_jax.errors import UserError
from vit_jax.models.variants import create_model


@flax.struct.dataclass
class TrainState:
    """All that a run carries from one step to the next. Randomness is folded from `step`."""

    step: jax.Array  # int32: updates done
    params: Any
    opt_state: optax.OptState


def build_model(
    config: ml_collections.ConfigDict, num_classes: int, size: tuple[int, int]
) -> nn.Module:
    """The config's variant with its overrides, checked against the image size.

    Raises:
      UserError: an option that the variant does not have, or an image size it cannot take.
    """
    overrides = {k: v for k, v in config.model.items() if k != "variant" and v is not None}
    try:
        model = create_model(
            config.model.variant, num_classes=num_classes, dtype=config.dtype, **overrides)
        jax.eval_shape(lambda: _init_params(model, size, seed=0))
    except ValueError as error:
        raise UserError(f"config.model: {error}") from None
    return model


def params_shapes(model: nn.Module, size: tuple[int, int]) -> Any:
    """Shapes and types of the model's parameters for images of (height, width)."""
    return jax.eval_shape(lambda: _init_params(model, size, seed=0))


def make_init(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    size: tuple[int, int],
    seed: int,
) -> Callable[[], TrainState]:
    """A function, to be compiled, that returns the state before the first step."""

    def init():
        params = _init_params(model, size, seed)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return init


def _init_params(model, size, seed):
    return model.init(jax.random.key(seed), jnp.zeros((1, *size, 3)), train=False)["params"]

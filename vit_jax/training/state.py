"""What a run starts from: the model of its config, and the initial train state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from vit_jax.errors import UserError
from vit_jax.models.masked import corrupted_count, masked_patch_model
from vit_jax.models.resnet import ResNet
from vit_jax.models.scan import stack_blocks
from vit_jax.models.shapes import params_shapes
from vit_jax.models.variants import create_model, model_options
from vit_jax.models.vit import VisionTransformer

# Fields of a checkpoint's model that must agree with the run's, and fields that the run inherits
# unless its config sets them. The rest (patch size, classes, representation layer) can be adapted.
_MUST_AGREE = ("hidden_size", "mlp_dim", "num_heads", "num_layers", "resnet_stages", "stages",
               "width_factor")
_TAKEN_OVER = ("classifier", "activation", "layer_scale", "register_tokens", "position_embedding",
               "position_embedding_at")


@flax.struct.dataclass
class TrainState:
    """All that a run carries from one step to the next. Randomness is folded from `step`."""

    step: jax.Array  # int32: updates done
    params: Any
    opt_state: optax.OptState
    ema_params: Any = None  # moving average of params; None without config.ema_decay


def build_model(
    config: ml_collections.ConfigDict,
    num_classes: int,
    size: tuple[int, int],
    start: dict[str, Any] | None = None,
) -> nn.Module:
    """The config's variant with its overrides, checked against the image size; for
    config.task='masked_patches' with predictions for patches in place of classes.

    Args:
      config: the run's config.
      num_classes: of the head.
      size: (height, width) of the images.
      start: fields of the model whose checkpoint the run starts from. Its activation, classifier
        and the like are used unless the config sets them.

    Raises:
      UserError: an option that the variant does not have, an image size it cannot take, or a
        variant that the checkpoint is not of.
    """
    start = start or {}
    overrides = {key: start[key] for key in _TAKEN_OVER if key in start}
    given = {k: v for k, v in config.model.items() if k != "variant" and v is not None}
    try:
        options = model_options(config.model.variant) & set(config.model)
        if foreign := [key for key in given if key not in options]:
            raise ValueError(
                f"{config.model.variant} has no option {foreign[0]!r}; set config.model."
                f"{foreign[0]}=none. Its options are {', '.join(sorted(options))}.")
        model = create_model(
            config.model.variant, num_classes=num_classes, dtype=config.dtype,
            **overrides | given)
        if config.task == "masked_patches":
            if not isinstance(model, VisionTransformer):
                raise ValueError(f"{config.model.variant} has no patches to mask")
            model = masked_patch_model(model, config.masked.target)
            corrupted_count(model.num_patches(size), config.masked.rate)
        _trace(model, size)
    except ValueError as error:
        raise UserError(f"config.model: {error}") from None
    except RuntimeError as error:  # what JAX says where a kernel does not exist
        raise UserError(
            f"config.model.attention_implementation={model.attention_implementation!r} does not "
            f"work here ({str(error).splitlines()[0]}); use 'xla'."
        ) from None
    for key in _MUST_AGREE:
        ours = getattr(model, key, None)
        if key in start and ours != start[key]:
            raise UserError(
                f"config.init is a model with {key} {start[key]}, but config.model.variant="
                f"{config.model.variant!r} has {ours}; choose the variant of the checkpoint."
            )
    return model


def group_blocks(
    model: nn.Module, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> nn.Module:
    """The same model for a run on GPUs: without a loop over the blocks, but with the parameters of
    all blocks stacked. (Dropout and stochastic depth draw different random numbers then.)

    Every parameter array needs a few tiny kernels for its cast and its update, on which a small
    model would spend a good part of a step. The model is returned unchanged if the config sets
    `model.scan_layers`, or freezes parameters by the names that they have in single blocks. Saving
    or restoring a checkpoint briefly needs a second copy of the state on the devices.
    """
    if (not isinstance(model, VisionTransformer) or config.model.scan_layers is not None
            or config.optimizer.frozen or mesh.devices.flat[0].platform != "gpu"):
        return model
    return model.clone(scan_layers=True, scan_unroll=True)


def model_to_json(model: nn.Module) -> dict[str, Any]:
    """All fields of a model, to build the same one again with `model_from_json`."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)
              if f.name not in ("parent", "name")}
    return {"kind": type(model).__name__} | fields | {"dtype": jnp.dtype(model.dtype).name}


def fields_from_json(fields: dict[str, Any]) -> dict[str, Any]:
    """What `model_to_json` returned, after it was JSON, with the tuples that it held."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def model_from_json(fields: dict[str, Any]) -> nn.Module:
    """The inverse of `model_to_json`."""
    fields = fields_from_json(fields)
    kind = {"VisionTransformer": VisionTransformer, "ResNet": ResNet}[fields.pop("kind")]
    return kind(**(fields | {"dtype": jnp.dtype(fields["dtype"])}))


def make_init(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    size: tuple[int, int],
    seed: int,
    *,
    ema: bool = False,
) -> Callable[[], TrainState]:
    """A function, to be compiled, that returns the state before the first step; with `ema` its
    moving average starts at the initial parameters."""

    def init():
        params = _init_params(model, size, seed)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params),
                          params if ema else None)

    return init


def state_shapes(
    model: nn.Module, optimizer: optax.GradientTransformation, size: tuple[int, int], *,
    ema: bool = False,
) -> TrainState:
    """What the function of `make_init` returns, as `jax.ShapeDtypeStruct`."""
    params = params_shapes(model, size)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params,
                      jax.eval_shape(optimizer.init, params), params if ema else None)


def _trace(model, size):
    """Traces the model without computing, so that invalid configurations are rejected early."""
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    jax.eval_shape(
        lambda params, images: model.apply(
            {"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)}),
        params_shapes(model, size), images)


def _init_params(model, size, seed):
    grouped = getattr(model, "scan_layers", False) and model.scan_unroll
    if grouped:  # the numbers of a model without scan_layers
        model = model.clone(scan_layers=False)
    params = model.init(jax.random.key(seed), jnp.zeros((1, *size, 3)), train=False)["params"]
    return stack_blocks(params) if grouped else params

"""Shapes of a model's parameters, cached: start-up needs them many times, and tracing is slow."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.scan import stack_blocks


def params_shapes(model: nn.Module, image_size: tuple[int, int], channels: int = 3) -> Any:
    """The model's parameter tree, of `jax.ShapeDtypeStruct`, for images of (height, width). The
    result is cached and shared between callers: do not modify it.

    Raises:
      ValueError: the model cannot take such images, or its sizes contradict each other.
    """
    if not getattr(model, "scan_layers", False):
        return _unstacked(model, tuple(image_size), channels)
    model = model.clone(scan_layers=False, scan_unroll=False)
    return jax.eval_shape(stack_blocks, _unstacked(model, tuple(image_size), channels))


@functools.lru_cache(maxsize=16)
def _unstacked(model, image_size, channels):
    images = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
    return jax.eval_shape(
        lambda images: model.init(jax.random.key(0), images, train=False), images
    ).get("params", {})

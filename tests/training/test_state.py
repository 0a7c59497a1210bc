"""In which arrays a run holds its parameters."""

import types

import jax
import numpy as np
import pytest

from vit_jax.config import base_config, set_value, validate
from vit_jax.models.shapes import params_shapes
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.state import build_model, group_blocks, make_init, state_shapes

pytestmark = pytest.mark.core


@pytest.mark.parametrize("settings, platform, grouped", [
    ({}, "gpu", True),
    ({}, "cpu", False),
    ({}, "tpu", False),
    ({"model.scan_layers": False}, "gpu", False),
    ({"optimizer.frozen": ("encoderblock_0",)}, "gpu", False),
    ({"model.variant": "R50x1"}, "gpu", False),
], ids=str)
def test_whose_blocks_are_grouped(settings, platform, grouped):
    config = base_config()
    for key, value in {"total_steps": 10, "model.variant": "Ti/16", **settings}.items():
        set_value(config, key, value)
    model = build_model(validate(config), 10, (224, 224))
    mesh = types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(platform=platform)], object))
    assert (group_blocks(model, config, mesh) != model) == grouped


@pytest.mark.parametrize("settings", [
    {}, {"optimizer.name": "adafactor"}, {"model.scan_layers": True, "optimizer.name": "adamw"},
    {"model.scan_layers": True, "model.scan_unroll": True},
    {"model.variant": "R50x1"}, {"optimizer.frozen": ("embedding",), "ema_decay": 0.9},
], ids=str)
def test_shapes_of_the_state_are_those_of_the_state(settings):
    config = base_config()
    for key, value in {"total_steps": 10, "model.variant": "Ti/16", **settings}.items():
        set_value(config, key, value)
    config, size, ema = validate(config), (32, 32), config.ema_decay is not None
    model = build_model(config, 10, size)
    optimizer = make_optimizer(config, make_schedule(config, 10), params_shapes(model, size))
    made = jax.eval_shape(make_init(model, optimizer, size, 0, ema=ema))
    shapes = state_shapes(model, optimizer, size, ema=ema)
    assert jax.tree.structure(shapes) == jax.tree.structure(made)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(made)]

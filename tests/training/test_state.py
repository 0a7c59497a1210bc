"""In which arrays a run holds its parameters."""

import types

import numpy as np
import pytest

from vit_jax.config import base_config, set_value, validate
from vit_jax.training.state import build_model, group_blocks

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

"""Models to export, as `load_model` returns them."""

import jax
import numpy as np
import pytest
from checkpoint_makers import random_params

from vit_jax.checkpoints.load import Loaded
from vit_jax.checkpoints.report import LoadReport
from vit_jax.errors import UserError
from vit_jax.models.scan import stack_blocks
from vit_jax.models.variants import create_model

TINY = dict(num_classes=5, hidden_size=64, mlp_dim=96, num_heads=4, num_layers=2, patch_size=8)
R26 = dict(num_classes=5, hidden_size=64, mlp_dim=128, num_heads=4, num_layers=1)
PREPROCESSING = dict(image_size=[32, 32], crop="squash", resize=None, interpolation="bilinear",
                     antialias=True, mean=0.5, std=0.5)
REGISTERS = dict(register_tokens=3, layer_scale=0.1)


def make(size=(32, 32), variant="B/16", *, seed=0, class_names=None, preprocessing=None, **fields):
    """A model as `load_model` returns it, with random parameters."""
    fields = (dict(num_classes=5) if variant.startswith("R+") else
              R26 if variant.startswith("R26") else TINY) | fields
    model = create_model(variant, **fields)
    params = random_params(model.clone(scan_layers=False), *size, seed=seed)
    if model.scan_layers:
        params = jax.tree.map(np.asarray, stack_blocks(params))
    metadata = {
        "preprocessing": PREPROCESSING | {"image_size": list(size)} | (preprocessing or {}),
        "class_names": class_names, "position_resize": None, "dialect": "vit_jax"}
    return Loaded(model, params, metadata, LoadReport("runs/made up", "vit_jax"))


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    return str(error.value)

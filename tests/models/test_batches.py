"""Batches of any number of images: none at all, and a number that is left open for serving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from tiny_models import abstract_params, pixels, random_params, tiny

from vit_jax.models.variants import create_model

pytestmark = pytest.mark.core

MODELS = [
    (lambda: tiny(), 8),
    (lambda: tiny(register_tokens=2, scan_layers=True, dtype="bfloat16"), 8),
    (lambda: tiny(classifier="gap", position_embedding="relative"), 8),
    (lambda: create_model("R+Ti/16", num_classes=5, num_layers=1), 32),
    (lambda: create_model("R50x1", num_classes=5), 32),
]


@pytest.mark.parametrize("make, side", MODELS, ids=[
    "token", "registers", "gap", "hybrid", "ResNet"])
def test_no_images_and_an_open_number(make, side):
    model = make()
    params = abstract_params(model, side, side)

    def logits(params, images):
        return model.apply({"params": params}, images, train=False)

    none = jax.ShapeDtypeStruct((0, side, side, 3), jnp.float32)
    assert jax.eval_shape(logits, params, none).shape == (0, 5)
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    exported = export.export(jax.jit(logits))(params, images)
    assert exported.out_avals[0].shape == (batch, 5)


def test_what_is_exported_computes_the_same():
    model = tiny()
    params = random_params(model, 8, 8)
    forward = jax.jit(lambda images: model.apply({"params": params}, images, train=False))
    (batch,) = export.symbolic_shape("b")
    exported = export.export(forward)(jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32))
    for number in (1, 3):
        images = pixels(number)
        np.testing.assert_allclose(exported.call(images), forward(images), rtol=1e-6, atol=1e-6)

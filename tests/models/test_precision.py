"""bfloat16 where it is fast, float32 where it matters."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jaxprs import equations, input_types, named
from tiny_models import abstract_params, apply, pixels, random_params, tiny

from vit_jax.models.variants import create_model

pytestmark = pytest.mark.core


MIXED = [
    tiny(),
    tiny(position_embedding="relative", classifier="gap"),
    tiny(position_embedding="sincos_2d", register_tokens=2, layer_scale=0.1, activation="gelu",
         representation_size=8),
    tiny(position_embedding="learned_2d", stochastic_depth_rate=0.1, dropout_rate=0.1,
         attention_dropout_rate=0.1),
    tiny(scan_layers=True, remat="dots", stochastic_depth_rate=0.1),
    tiny(remat="names"),
    create_model("R26+S/32", num_classes=5, num_layers=1, resnet_stages=(1, 1)),
    create_model("R50x1", num_classes=5, stages=(1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("model", MIXED, ids=range(len(MIXED)))
def test_bfloat16_where_it_is_fast_and_float32_where_it_matters(model):
    model = model.clone(dtype=jnp.bfloat16)
    size = 8 if getattr(model, "patch_size", 1) == 4 else 32
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    key = jax.random.key(0)
    params = abstract_params(model, size, size)

    def logits(params, images):
        return model.apply({"params": params}, images, train=True, rngs={"dropout": key})

    def loss(params, images):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, images), jnp.zeros(2, int)
        ).mean()

    types = {leaf.dtype for leaf in jax.tree.leaves(params)}
    types |= {
        leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(jax.grad(loss), params, images))
    }
    assert types == {jnp.dtype("float32")}
    assert jax.eval_shape(logits, params, images).dtype == jnp.float32

    forward = equations(logits, params, images)
    backward = equations(jax.grad(loss), params, images)
    for program in (forward, backward):
        products = named(program, "dot_general", "conv_general_dilated")
        assert products
        assert input_types(products) == {"bfloat16"}
    reductions = named(forward, "rsqrt", "reduce_sum", "reduce_max", "exp")
    assert {"rsqrt", "reduce_sum"} <= {equation.primitive.name for equation in reductions}
    assert input_types(reductions) == {"float32"}  # of normalisations, softmax, pooling


def test_bfloat16_is_close_to_float32():
    images = pixels()
    params = random_params(tiny(), 8, 8)
    exact, rounded = (apply(tiny(dtype=t), params, images) for t in ("float32", "bfloat16"))
    assert 0 < abs(exact - rounded).max() < 0.05 * exact.std()

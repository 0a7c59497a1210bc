"""The last block computes the class token alone, where nothing reads the others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import apply, pixels, random_params, tiny

from vit_jax.models.masked import masked_patch_model
from vit_jax.models.scan import stack_blocks
from vit_jax.models.vit import Encoder1DBlock

pytestmark = pytest.mark.core

GROUPED = dict(scan_layers=True, scan_unroll=True)


def all_tokens(model, params, images):
    """The same numbers by the blocks as they are where somebody records what they return."""
    return model.apply({"params": params}, images, train=False, mutable=["intermediates"])[0]


def tokens_of_last_block(model, params, images):
    """How many it returns."""
    shapes = []

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if isinstance(context.module, Encoder1DBlock) and context.method_name == "__call__":
            shapes.append(output.shape)
        return output

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: model.apply({"params": params}, images, train=False))
    return shapes[-1][1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        GROUPED | dict(num_layers=1),
        GROUPED | dict(remat="full", position_embedding_at="every_layer"),
        dict(remat="names", position_embedding_at="every_layer_shared"),
        dict(register_tokens=3, layer_scale=0.1, representation_size=7),
        dict(position_embedding="relative", resnet_stages=(), num_classes=0),
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_all_tokens(options):
    """The same sums, by products of other shapes: a few roundings of float32."""
    model = tiny(**options)
    size = 8 * model.stem_stride
    images = pixels(3, size, size)
    params = random_params(model, size, size)
    assert tokens_of_last_block(model, params, images) == 1

    def both(function):
        def loss(params):
            logits = function(model, params, images)
            return jnp.sum(jnp.sin(3 * logits)), logits

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (gradient, logits), (expected_gradient, expected) = both(apply), both(all_tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_gradient))
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected_gradient):
        found = gradient
        for key in path:
            found = found[key.key]
        np.testing.assert_allclose(found, leaf, rtol=1e-4, atol=1e-5 * largest, err_msg=str(path))


@pytest.mark.parametrize(
    "options",
    [dict(scan_layers=True), dict(classifier="gap"), dict(classifier="unpooled"),
     dict(classifier="token_unpooled")],
    ids=str,
)
def test_all_tokens_are_computed_where_they_are_read_or_the_blocks_are_a_loop(options):
    model = tiny(**options)
    assert tokens_of_last_block(model, random_params(model, 8, 8), pixels(1, 8, 8)) > 1
    assert not model.leaves_out_tokens


def test_all_tokens_are_computed_where_patches_are_predicted():
    model = masked_patch_model(tiny(), "pixels")
    assert tokens_of_last_block(model, random_params(model, 8, 8), pixels(1, 8, 8)) == 5


def test_stochastic_depth_reaches_the_last_block():
    """With everything dropped there, what is left are the class tokens that entered it."""
    model = tiny(num_layers=2, stochastic_depth_rate=0.999999)
    params, images = random_params(model, 8, 8), pixels(2, 8, 8)
    dropped = apply(model, params, images, train=True)
    without = params | {"Transformer": {k: v for k, v in params["Transformer"].items()
                                        if k != "encoderblock_1"}}
    one = apply(tiny(num_layers=1), without, images)
    np.testing.assert_allclose(dropped, one, rtol=1e-5, atol=1e-5)


def test_stacked_parameters_compute_the_same():
    params, images = random_params(tiny(), 8, 8), pixels(2, 8, 8)
    np.testing.assert_allclose(
        apply(tiny(**GROUPED), stack_blocks(params), images), apply(tiny(), params, images),
        rtol=1e-5, atol=1e-5)

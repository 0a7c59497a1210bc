"""Models, parameters and images for tests, without the slow part: compiling initialisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.variants import create_model

TINY = dict(num_classes=5, patch_size=4, hidden_size=16, mlp_dim=24, num_heads=2, num_layers=2)


def tiny(**overrides):
    """A ViT of two narrow blocks for images of a few patches of 4 pixels."""
    return create_model("B/16", **(TINY | overrides))


def pixels(batch=2, height=8, width=8, seed=0):
    generator = np.random.default_rng(seed)
    return generator.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def abstract_params(model, height, width):
    """Shapes and dtypes of the parameters for images of height x width."""
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    return jax.eval_shape(
        lambda key, images: model.init(key, images, train=False), jax.random.key(0), images
    )["params"]


def random_params(model, height, width, seed=0):
    """Parameters of natural size in which nothing is zero or one.

    A fresh model would hide mistakes: its biases, class token, head and last GroupNorm scales are
    zero, its other scales one.
    """
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        value = generator.standard_normal(leaf.shape, np.float32)
        if name == "kernel":
            fan_out = (
                leaf.shape[-1]
                if path[-2].key not in ("query", "key", "value")
                else (leaf.shape[-2] * leaf.shape[-1])
            )
            return value * np.float32((fan_out / leaf.size) ** 0.5)
        if name in ("scale", "gamma"):
            return 1 + 0.2 * value
        return value * np.float32(0.1 if name == "bias" else 0.5)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model, height, width))


@functools.partial(jax.jit, static_argnames=("model", "train"))
def run(params, images, key, model, train):
    return model.apply({"params": params}, images, train=train, rngs={"dropout": key})


def apply(model, params, images, train=False, seed=0):
    """The model's output, compiled once per model and shape."""
    return run(params, images, jax.random.key(seed), model=model, train=train)

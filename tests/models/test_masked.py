"""The masked patch model: its parameter tree, what corruption does, what a prediction sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import abstract_params, apply, pixels, random_params, tiny

from vit_jax.models.masked import MASK, TARGETS, MaskedPatchModel, corrupt, masked_patch_model
from vit_jax.models.vit import VisionTransformer


def masked(target="mean_color", **overrides):
    return masked_patch_model(tiny(**overrides), target)


def forward(model, params, images, sources=None):
    return jax.jit(lambda params: model.apply({"params": params}, images, sources, train=False))(
        params)


@pytest.mark.parametrize("overrides", [
    {}, {"classifier": "gap"}, {"scan_layers": True}, {"register_tokens": 2},
    {"representation_size": 12}, {"resnet_stages": (1,), "patch_size": 1},
], ids=str)
def test_parameter_tree(overrides):
    """The backbone's, with a mask token and a layer of predictions, and without a head."""
    size = (8, 12) if "resnet_stages" not in overrides else (16, 16)
    model = masked(**overrides)
    tree = abstract_params(model, *size)
    features = tiny(**(overrides | {"num_classes": 0, "representation_size": None}))
    assert model.backbone == features
    backbone = abstract_params(features, *size)
    assert set(tree) == set(backbone) | {"mask_token", "patch_head"}
    assert {name: tree[name] for name in backbone} == backbone
    assert tree["mask_token"].shape == (1, 1, 16)
    assert tree["patch_head"]["kernel"].shape == (16, 512)


@pytest.mark.parametrize("target, shape", [
    ("mean_color", (2, 6, 512)), ("downsized_colors", (2, 6, 16, 512)), ("pixels", (2, 6, 48))])
def test_predictions_of_every_target(target, shape):
    model = masked(target)
    params = random_params(model, 8, 12)
    out = forward(model, params, pixels(2, 8, 12))
    assert out.shape == shape and out.dtype == jnp.float32
    half = forward(model.clone(dtype=jnp.bfloat16), params, pixels(2, 8, 12))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, out, atol=0.1 * np.abs(out).max())  # 8 bits of mantissa


def test_a_patch_is_predicted_from_its_own_token():
    """Equal to the head on the tokens of the model that does no pooling; prefix tokens left out."""
    model = masked(register_tokens=2)
    params = random_params(model, 8, 12)
    images = pixels(2, 8, 12)
    body = {name: tree for name, tree in params.items() if name not in ("mask_token", "patch_head")}
    unpooled = tiny(num_classes=0, register_tokens=2, classifier="token_unpooled")
    tokens = apply(unpooled, body, images)[:, 1:]
    expected = tokens @ params["patch_head"]["kernel"] + params["patch_head"]["bias"]
    np.testing.assert_allclose(forward(model, params, images), expected, atol=1e-5)


def test_patch_pixels():
    assert masked().patch_pixels == 4
    hybrid = masked(resnet_stages=(1, 1), patch_size=2)
    assert hybrid.patch_pixels == 16 and hybrid.patch_grid((32, 64)) == (2, 4)
    assert {f.name for f in dataclasses.fields(MaskedPatchModel)} - {
        f.name for f in dataclasses.fields(VisionTransformer)} == {"target"}


def test_corrupt():
    patches = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    token = np.full((1, 1, 3), -7, np.float32)
    sources = np.array([[0, MASK, 0, 3], [MASK, 2, 2, 1]])
    out = corrupt(jnp.asarray(patches), jnp.asarray(token), jnp.asarray(sources))
    expected = [[patches[0, 0], token[0, 0], patches[0, 0], patches[0, 3]],
                [token[0, 0], patches[1, 2], patches[1, 2], patches[1, 1]]]
    np.testing.assert_array_equal(out, expected)


def test_masked_and_swapped_patches_are_not_seen():
    """Predictions do not change with the pixels of a patch that stands nowhere in the sequence,
    and do with those of one that stands in for another."""
    model = masked()
    params = random_params(model, 8, 12)
    images = pixels(1, 8, 12)
    sources = np.array([[0, MASK, 5, 3, 4, 5]])  # 1 is masked, 2 has the embedding of 5
    before = forward(model, params, images, sources)

    def repaint(patch):
        other = images.copy()
        row, column = divmod(patch, 3)
        other[:, 4 * row:4 * row + 4, 4 * column:4 * column + 4] += 0.5
        return forward(model, params, other, sources)

    for unseen in (1, 2):
        np.testing.assert_array_equal(repaint(unseen), before)
    for seen in (0, 5):
        assert np.abs(repaint(seen) - before).max() > 1e-3
    # Without corruption the same parameters see everything.
    assert np.abs(forward(model, params, images) - before).max() > 1e-3


def test_positions_are_added_after_the_corruption():
    """Two masked patches hold the same token, and differ by their position alone."""
    model = masked(position_embedding="none")
    params = random_params(model, 8, 8)
    sources = np.array([[0, MASK, MASK, 3]])
    out = forward(model, params, pixels(1, 8, 8), sources)
    np.testing.assert_allclose(out[0, 1], out[0, 2], atol=1e-5)
    model = masked()
    out = forward(model, random_params(model, 8, 8), pixels(1, 8, 8), sources)
    assert np.abs(out[0, 1] - out[0, 2]).max() > 1e-2


def test_what_cannot_be_predicted():
    with pytest.raises(ValueError, match="side is divisible by 4, not 6"):
        abstract_params(masked("downsized_colors", patch_size=6), 12, 12)
    with pytest.raises(ValueError, match=f"'colour' is not one of {', '.join(TARGETS)}"):
        abstract_params(masked("colour"), 8, 8)

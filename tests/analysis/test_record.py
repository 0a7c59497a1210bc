"""The recording of a forward pass: complete, the same however the model is run, and harmless."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import apply, pixels, random_params, tiny

from vit_jax.analysis.record import attention_bytes, record
from vit_jax.errors import UserError
from vit_jax.models.scan import stack_blocks
from vit_jax.models.variants import create_model

pytestmark = pytest.mark.core
SIZE = (8, 12)  # 2 x 3 patches
TOLERANCE = 1e-5


def recorded(model, params, images):
    return jax.jit(lambda params: record(model, params, images))(params)


def layer_norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


@pytest.mark.parametrize("options, prefix", [
    (dict(), 1),
    (dict(classifier="gap"), 0),
    (dict(classifier="unpooled", position_embedding="none"), 0),
    (dict(classifier="token_unpooled"), 1),
    (dict(register_tokens=3), 4),
    (dict(classifier="gap", register_tokens=3, layer_scale=0.1), 3),
    (dict(representation_size=7, position_embedding="learned_2d"), 1),
], ids=str)
def test_recording_against_a_calculation_of_its_own(options, prefix):
    """Attention from the recorded tokens, and from the last tokens the output."""
    model, images = tiny(**options), pixels(height=SIZE[0], width=SIZE[1])
    params = random_params(model, *SIZE)
    outputs, recording = recorded(model, params, images)
    length = prefix + 6
    assert recording.attention.shape == (2, 2, 2, length, length)
    assert recording.tokens.shape == (3, 2, length, 16)
    assert recording.attention.dtype == recording.tokens.dtype == jnp.float32
    assert (recording.grid, recording.num_patches, recording.stride) == ((2, 3), 6, 4)
    assert recording.class_token == ("token" in model.classifier)

    for i in range(2):
        block = params["Transformer"][f"encoderblock_{i}"]
        x = layer_norm(np.float64(recording.tokens[i]), block["LayerNorm_0"])
        parts = block["MultiHeadDotProductAttention_0"]
        query, key = (np.einsum("bnd,dhk->bhnk", x, parts[name]["kernel"])
                      + parts[name]["bias"][:, None] for name in ("query", "key"))
        weights = np.exp(query @ key.swapaxes(-1, -2) / np.sqrt(8))
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(recording.attention[i], weights, atol=TOLERANCE)

    x = layer_norm(np.float64(recording.tokens[-1]), params["Transformer"]["encoder_norm"])
    x = {"token": x[:, 0], "gap": x[:, prefix:].mean(1), "unpooled": x[:, prefix:],
         "token_unpooled": x}[model.classifier]
    if "pre_logits" in params:
        x = np.tanh(x @ params["pre_logits"]["kernel"] + params["pre_logits"]["bias"])
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(outputs, expected, atol=TOLERANCE)


@pytest.mark.parametrize("options", [
    dict(scan_layers=True),
    dict(remat="full"),
    dict(scan_layers=True, remat="dots"),
    dict(attention_implementation="auto"),
    dict(attention_implementation="cudnn"),
    dict(dropout_rate=0.5, attention_dropout_rate=0.5, stochastic_depth_rate=0.5),
], ids=str)
def test_it_does_not_matter_how_the_model_runs(options):
    images = pixels(height=SIZE[0], width=SIZE[1])
    params = random_params(tiny(), *SIZE)
    outputs = apply(tiny(), params, images)
    _, recording = recorded(tiny(attention_implementation="xla"), params, images)
    model = tiny(**options)
    others, other = recorded(
        model, stack_blocks(params) if model.scan_layers else params, images)
    np.testing.assert_allclose(others, outputs, atol=TOLERANCE)
    np.testing.assert_allclose(other.attention, recording.attention, atol=TOLERANCE)
    np.testing.assert_allclose(other.tokens, recording.tokens, atol=TOLERANCE)


def test_only_recording_leaves_the_fused_kernel():
    """Which does not exist on a CPU, so running it is an error and recording is none."""
    model, images = tiny(attention_implementation="cudnn", dtype=jnp.bfloat16), pixels()
    params = random_params(tiny(), 8, 8)
    with pytest.raises(ValueError, match="cudnn"):
        jax.eval_shape(lambda: model.apply({"params": params}, images, train=False))
    with pytest.raises(ValueError, match="cudnn"):
        jax.eval_shape(lambda: model.apply(
            {"params": params}, images, train=False, mutable=["batch_stats"]))
    _, recording = jax.eval_shape(lambda: record(model, params, images))
    assert recording.attention.dtype == recording.tokens.dtype == jnp.float32


def test_a_hybrid():
    model = tiny(patch_size=2, resnet_stages=())
    images = pixels(height=16, width=32)
    params = random_params(model, 16, 32)
    outputs, recording = recorded(model, params, images)
    np.testing.assert_allclose(outputs, apply(model, params, images), atol=TOLERANCE)
    assert (recording.grid, recording.stride) == ((2, 4), 8)
    assert recording.attention.shape == (2, 2, 2, 9, 9)


def test_nothing_is_recorded_unasked():
    model, images = tiny(), pixels()
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert set(variables) == {"params"}
    output = jax.eval_shape(
        lambda variables: model.apply(variables, images, train=False), variables)
    assert output.shape == (2, 5)  # and no state beside it


def test_attention_bytes():
    model = tiny(register_tokens=2, num_heads=4)
    _, recording = jax.eval_shape(
        lambda params: record(model, params, pixels(1, *SIZE)), random_params(model, *SIZE))
    assert attention_bytes(model, SIZE) == 4 * recording.attention.size


def test_models_without_attention_are_refused():
    resnet = create_model("R50x1", num_classes=3, stages=(1,))
    with pytest.raises(UserError, match="ResNet .* has no attention"):
        record(resnet, {}, pixels())
    with pytest.raises(UserError, match="without Transformer blocks"):
        record(tiny(num_layers=0), {}, pixels())

"""Attention weights and tokens of the same random parameters in timm."""

import jax
import numpy as np
import pytest
from timm_mapping import to_timm
from tiny_models import pixels, random_params
from torch_shim import timm, torch

from vit_jax.analysis.attention import rollout
from vit_jax.analysis.record import record
from vit_jax.models.variants import create_model

TOLERANCE = 1e-5


def timm_pass(reference, images):
    """(attention [L, B, H, N, N], tokens [L, B, N, D]) of timm without its fused attention."""
    attention = []
    for block in reference.blocks:
        block.attn.fused_attn = False  # which never holds the weights
        block.attn.attn_drop.register_forward_hook(
            lambda module, args, output: attention.append(args[0].numpy()))
    tokens = []
    for block in reference.blocks:
        block.register_forward_hook(lambda module, args, output: tokens.append(output.numpy()))
    with torch.no_grad():
        reference.eval()(torch.tensor(images.transpose(0, 3, 1, 2).copy()))
    return np.stack(attention), np.stack(tokens)


@pytest.mark.parametrize("options, timm_name, timm_options, size", [
    (dict(), "vit_tiny_patch16_224", {}, (64, 96)),
    (dict(classifier="gap"), "vit_tiny_patch16_224",
     dict(class_token=False, global_pool="avg", fc_norm=False), (64, 64)),
    (dict(patch_size=14, layer_scale=1e-5, register_tokens=4, activation="gelu"),
     "vit_small_patch14_reg4_dinov2",
     dict(embed_dim=192, num_heads=3, act_layer="gelu"), (56, 70)),
], ids=["rectangle", "gap", "registers"])
def test_timm(options, timm_name, timm_options, size):
    model = create_model("Ti/16", num_classes=10, num_layers=3, **options)
    params, images = random_params(model, *size), pixels(height=size[0], width=size[1])
    options = dict(num_classes=10, img_size=size, act_layer="gelu_tanh", depth=3) | timm_options
    reference = timm.create_model(timm_name, **options)
    state = {name: torch.tensor(np.ascontiguousarray(value))
             for name, value in to_timm(params).items()}
    reference.load_state_dict(state, strict=True)
    attention, tokens = timm_pass(reference, images)
    _, recording = jax.jit(lambda params: record(model, params, images))(params)
    assert attention.max() > 3 / attention.shape[-1]  # else anything would be near it
    np.testing.assert_allclose(recording.attention, attention, atol=TOLERANCE)
    np.testing.assert_allclose(recording.tokens[1:], tokens, atol=TOLERANCE * tokens.std() * 10)

    weights = torch.tensor(attention).mean(2) + torch.eye(attention.shape[-1])
    weights /= weights.sum(-1, keepdim=True)
    flow = torch.linalg.multi_dot(list(weights.flip(0)[:, 0]))
    np.testing.assert_allclose(rollout(recording.attention)[0], flow, atol=TOLERANCE)

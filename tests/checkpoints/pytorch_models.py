"""Small models of PyTorch's libraries with random parameters, their files, and their outputs."""

import numpy as np
import pytest
from checkpoint_makers import apply, write_json
from torch_shim import timm, torch

safetensors = pytest.importorskip("safetensors.torch")

PLAIN = 2e-5  # times the spread of the logits: float32 rounding
HYBRID = 2e-4  # the rounding of normalised convolutions
TINY = dict(img_size=(8, 8), patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1.5,
            num_classes=5)


def randomise(module, seed=0):
    """Parameters of natural size in which nothing is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith(("token", "tokens", "pos_embed", "pos_embedding", "embeddings")):
                value.copy_(0.5 * noise)
            elif value.ndim > 1:
                value.copy_(noise * value[0].numel() ** -0.5)
            elif name.endswith(("weight", "gamma")):
                value.copy_(1 + 0.2 * noise)
            else:
                value.copy_(0.1 * noise)
    return module.eval()


def tiny_timm(**options):
    return randomise(timm.models.VisionTransformer(**(TINY | options)))


def reference(module, images):
    with torch.no_grad():
        return module(torch.tensor(images.transpose(0, 3, 1, 2).copy()))


def assert_equal_output(loaded, module, size=(8, 8), tolerance=PLAIN, channels=3, output=None):
    images = np.random.default_rng(1).uniform(-1, 1, (2, *size, channels)).astype(np.float32)
    expected = reference(module, images)
    expected = (output(expected) if output else expected).numpy()
    actual = np.asarray(apply(loaded.model, loaded.params, images))
    assert actual.shape == expected.shape and expected.std() > 0.1
    assert abs(actual - expected).max() < tolerance * max(1, expected.std())


def save(path, module):
    safetensors.save_file(module.state_dict(), path, metadata={"format": "pt"})
    return path


def save_directory(folder, module, model_args=None, **config):
    """As timm's `save_for_hf` writes it."""
    save(folder / "model.safetensors", module)
    model_args = dict(num_heads=2) | (model_args or {})
    cfg = dict(input_size=[3, 8, 8], mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic",
               crop_pct=0.9, crop_mode="center")
    write_json(folder / "config.json", dict(
        architecture="vit_tiny_patch16_224", num_classes=5, global_pool="token",
        model_args=model_args, pretrained_cfg=cfg) | config)
    return folder

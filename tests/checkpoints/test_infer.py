"""What the shapes of a PyTorch file do not tell: by its config, architecture, or library."""

import json
import sys

import numpy as np
import pytest
from checkpoint_makers import write_json
from pytorch_models import assert_equal_output, randomise, save, save_directory, tiny_timm
from torch_shim import timm, torch

import vit_jax
from vit_jax.errors import UserError


def test_heads_by_width(tmp_path):
    module = randomise(timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32,
                                         num_classes=5))
    loaded = vit_jax.load_model(save(tmp_path / "a.safetensors", module))
    assert_equal_output(loaded, module, (32, 32))
    assert "3 attention heads, usual for width 192" in loaded.report.assumptions
    save(tmp_path / "a.safetensors", tiny_timm())
    with pytest.raises(UserError, match="no convention exists for width 16; pass num_heads="):
        vit_jax.load_model(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="width 16 is not divisible by 3 heads"):
        vit_jax.load_model(tmp_path / "a.safetensors", num_heads=3)


def test_directory_of_a_rectangle(tmp_path):
    """6 x 6 patches could be 4 x 9: the config tells."""
    module = tiny_timm(img_size=(16, 36))
    save_directory(tmp_path, module, dict(img_size=[16, 36]), label_names=list("abcde"))
    loaded = vit_jax.load_model(tmp_path)
    assert_equal_output(loaded, module, (16, 36))
    assert loaded.report.assumptions == []
    assert loaded.metadata["class_names"] == tuple("abcde")
    assert loaded.metadata["preprocessing"] == dict(
        image_size=[16, 36], crop="center_crop", resize=17, interpolation="bicubic",
        antialias=True, mean=[0.5] * 3, std=[0.5] * 3)
    # Another size: the same share of the image is cropped.
    assert vit_jax.load_model(tmp_path, image_size=160).metadata["preprocessing"]["resize"] == 170


def test_file_of_a_rectangle(tmp_path):
    module = tiny_timm(img_size=(12, 20), no_embed_class=True)
    save(tmp_path / "a.safetensors", module)
    loaded = vit_jax.load_model(tmp_path / "a.safetensors", num_heads=2, image_size=(12, 20))
    assert_equal_output(loaded, module, (12, 20))


@pytest.mark.parametrize("model_args", [dict(act_layer="gelu_tanh"), dict(act_layer="gelu"), {}])
def test_activation_of_the_config(tmp_path, model_args):
    module = tiny_timm(**model_args)
    loaded = vit_jax.load_model(save_directory(tmp_path, module, model_args))
    assert loaded.model.activation == model_args.get("act_layer", "gelu")
    assert_equal_output(loaded, module)


@pytest.mark.parametrize("architecture, heads, activation", [
    ("vit_small_patch16_224", 6, "gelu"),  # a name of ours
    ("vit_base_patch16_gap_224", 16, "gelu"),  # timm's alone
    ("vit_giantopt_patch16_siglip_gap_256.v2_webli", 16, "gelu_tanh"),
])
def test_heads_and_activation_of_the_architecture(tmp_path, architecture, heads, activation):
    module = tiny_timm(embed_dim=48 * heads // 6, num_heads=heads, act_layer=activation, depth=1)
    save_directory(tmp_path, module, architecture=architecture)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"model_args": {}})
    loaded = vit_jax.load_model(tmp_path)
    assert (loaded.model.num_heads, loaded.model.activation) == (heads, activation)
    assert_equal_output(loaded, module)
    assert not any("activation" in text for text in loaded.report.assumptions)


@pytest.mark.parametrize("architecture", ["vit_of_my_own", None, 3])
def test_architectures_that_tell_nothing(tmp_path, architecture):
    save_directory(tmp_path, tiny_timm(), architecture=architecture)
    loaded = vit_jax.load_model(tmp_path)
    assert "activation gelu, as PyTorch has it" in loaded.report.assumptions
    assert "no rotary position embedding beside the table" in loaded.report.assumptions


@pytest.mark.parametrize("architecture, installed", [
    ("vit_small_patch16_rope_224.naver_in1k", True), ("vit_small_patch16_rope_ape_224", False),
    ("vit_base_patch16_dinov3", False), ("resnet18", True),
])
def test_architectures_that_are_something_else(tmp_path, monkeypatch, architecture, installed):
    """With rotary position embeddings a model has the same tensors, and other numbers."""
    save_directory(tmp_path, tiny_timm(init_values=1e-5, pos_embed="none"),
                   dict(act_layer="gelu"), architecture=architecture)
    if not installed:
        monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=f"names '{architecture}', timm's (Eva|ResNet), which comp"):
        vit_jax.load_model(tmp_path)


def test_no_position_embedding(tmp_path):
    """A config tells that there is none; where there is no config it is assumed."""
    module = tiny_timm(pos_embed="none")
    save_directory(tmp_path, module, dict(pos_embed="none"))
    told = vit_jax.load_model(tmp_path)
    assert told.model.position_embedding == "none"
    assert told.report.assumptions == []
    loaded = vit_jax.load_model(save(tmp_path / "a", module), num_heads=2, image_size=8)
    assert_equal_output(loaded, module)
    assert "position_embedding='none', as the file has no table" in loaded.report.assumptions[0]
    assert "timm's rotary one, which is not supported here" in loaded.report.assumptions[0]


def test_timms_older_config(tmp_path):
    """The keys of pretrained_cfg beside the others, `labels` for `label_names`."""
    save(tmp_path / "model.safetensors", tiny_timm())
    config = dict(architecture="vit_tiny_patch16_224", num_classes=5, input_size=[3, 8, 8],
                  mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation="bicubic", crop_pct=0.8)
    write_json(tmp_path / "config.json", config | {"labels": list("abcde")})
    loaded = vit_jax.load_model(tmp_path, num_heads=2)
    assert loaded.metadata["class_names"] == tuple("abcde")
    assert loaded.metadata["preprocessing"] == dict(
        image_size=[8, 8], crop="center_crop", resize=10, interpolation="bicubic", antialias=True,
        mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert loaded.report.assumptions == []


@pytest.mark.parametrize("preprocessor, expected", [
    (dict(size=8), dict(crop="squash", resize=None)),  # ViTFeatureExtractor's
    (dict(size=10, crop_size=8, do_center_crop=True), dict(crop="center_crop", resize=10)),
    (dict(size=dict(height=10, width=10), crop_size=dict(height=8, width=8), do_center_crop=True),
     dict(crop="center_crop", resize=10)),  # DeiT's
    (dict(crop_size=8, do_center_crop=True), dict(crop="center_crop", resize=8)),
    (dict(size=8, do_normalize=False, image_mean=[0.1] * 3), dict(mean=[0.0] * 3, std=[1.0] * 3)),
    (dict(size=8, do_normalize=False, image_mean=None), dict(mean=[0.0] * 3, std=[1.0] * 3)),
    (dict(size=8, do_rescale=False, image_mean=[51, 102, 153], image_std=[255, 51, 102]),
     dict(mean=[0.2, 0.4, 0.6], std=[1.0, 0.2, 0.4])),
    (dict(size=8, rescale_factor=1 / 127.5, image_mean=[1] * 3, image_std=[1] * 3),
     dict(mean=[0.5] * 3, std=[0.5] * 3)),
], ids=json.dumps)
def test_hf_preprocessors(tmp_path, preprocessor, expected):
    """Also beside other weights than Hugging Face's."""
    save(tmp_path / "model.safetensors", tiny_timm())
    write_json(tmp_path / "preprocessor_config.json", preprocessor)
    loaded = vit_jax.load_model(tmp_path, num_heads=2)
    found = loaded.metadata["preprocessing"]
    assert {key: found[key] for key in expected} == expected
    assert not any("resizing in place" in text for text in loaded.report.assumptions)
    squashes = isinstance(preprocessor.get("size"), dict)
    assert squashes == any("in place of both sides to 10x10" in text
                           for text in loaded.report.assumptions)


def test_filters_that_are_not_known_here(tmp_path):
    said = "bicubic resizing in place of the config's lanczos"
    save(tmp_path / "model.safetensors", tiny_timm())
    write_json(tmp_path / "preprocessor_config.json", dict(size=8, resample=1))
    loaded = vit_jax.load_model(tmp_path, num_heads=2)
    assert loaded.metadata["preprocessing"]["interpolation"] == "bicubic"
    assert said in loaded.report.assumptions
    write_json(tmp_path / "preprocessor_config.json", dict(size=8, resample=9))
    loaded = vit_jax.load_model(tmp_path, num_heads=2)
    assert said.replace("lanczos", "filter 9") in loaded.report.assumptions
    write_json(tmp_path / "config.json", dict(pretrained_cfg=dict(interpolation="lanczos")))
    assert said in vit_jax.load_model(tmp_path, num_heads=2).report.assumptions


@pytest.mark.parametrize("where", ["label_names", "pretrained_cfg"])
def test_class_names_of_timm(tmp_path, where):
    """As a list or by number; where `save_for_hf` moves them when it saves a loaded model."""
    save_directory(tmp_path, tiny_timm())
    config = json.loads((tmp_path / "config.json").read_text())
    for names in (list("edcba"), {"4": "a", "0": "e", "2": "c", "1": "d", "3": "b"}):
        told = {"label_names": names} if where == "label_names" else {
            where: config["pretrained_cfg"] | {"label_names": names}}
        write_json(tmp_path / "config.json", config | told)
        loaded = vit_jax.load_model(tmp_path, num_heads=2)
        assert loaded.metadata["class_names"] == tuple("edcba")
    write_json(tmp_path / "config.json", config | {"label_names": {"a": "e"}})
    assert vit_jax.load_model(tmp_path, num_heads=2).metadata["class_names"] is None


def test_an_architecture_named_in_the_file(tmp_path):
    """As timm's training script does."""
    checkpoint = {"arch": "vit_small_patch16_rope_ape_224", "state_dict": tiny_timm().state_dict()}
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(UserError, match="names 'vit_small_patch16_rope_ape_224', timm's Eva"):
        vit_jax.load_model(tmp_path / "a.pth", num_heads=2)
    torch.save(checkpoint | {"arch": "vit_tiny_patch16_224"}, tmp_path / "a.pth")
    assert vit_jax.load_model(tmp_path / "a.pth", num_heads=2).report.assumptions == [
        "a square grid of 2x2 patches", "mean 0.5 and std 0.5"]


def test_a_trained_size_that_the_config_does_not_know(tmp_path):
    """As of timm's older configs, which name the architecture's own size."""
    module = tiny_timm(img_size=(8, 24))
    save_directory(tmp_path, module)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"].pop("img_size", None)
    config["pretrained_cfg"]["input_size"] = [3, 224, 224]
    write_json(tmp_path / "config.json", config)
    loaded = vit_jax.load_model(tmp_path, num_heads=2, trained_size=(8, 24))
    assert_equal_output(loaded, module, (8, 24))


@pytest.mark.parametrize("name, weights", [
    ("vit_b_16", "IMAGENET1K_V1"), ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),
    ("vit_l_16", "IMAGENET1K_SWAG_E2E_V1"), ("vit_h_14", "IMAGENET1K_SWAG_E2E_V1"),
])
def test_torchvisions_own_weights_see_images_as_there(tmp_path, name, weights):
    """Against the transforms that torchvision names beside them; of a narrow model of that size."""
    import torchvision

    theirs = torchvision.models.get_weight(
        f"ViT_{name[4:].upper()}_Weights.{weights}").transforms()
    side, patch = theirs.crop_size[0], int(name[-2:])
    module = torchvision.models.VisionTransformer(
        image_size=side, patch_size=patch, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)
    torch.save(module.state_dict(), tmp_path / "a.pth")
    found = vit_jax.load_model(tmp_path / "a.pth", num_heads=1).metadata["preprocessing"]
    assert found["image_size"] == [side, side] and found["crop"] == "center_crop"
    assert found["resize"] == theirs.resize_size[0]
    assert found["interpolation"] == theirs.interpolation.value
    assert found["antialias"] is theirs.antialias
    np.testing.assert_allclose((found["mean"], found["std"]), (theirs.mean, theirs.std))

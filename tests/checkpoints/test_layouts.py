"""`load_model` on PyTorch's checkpoints, against the logits of the libraries themselves."""

import functools
import json

import numpy as np
import pytest
from checkpoint_makers import flat, write_json
from pytorch_models import (
    HYBRID,
    TINY,
    assert_equal_output,
    randomise,
    save,
    save_directory,
    tiny_timm,
)
from torch_shim import timm, torch

import vit_jax
from vit_jax.checkpoints.export import export_model
from vit_jax.checkpoints.resize import resize_position_embedding
from vit_jax.errors import UserError

POSITIONS = "Transformer/posembed_input/pos_embedding"


def account(loaded, names):
    """Every tensor of the file and of the model appears in the report."""
    renamed, dropped = ({entry[0] for entry in entries}
                        for entries in (loaded.report.renamed, loaded.report.dropped))
    assert renamed | dropped == set(names) and not renamed & dropped
    ours = [entry[1] for entry in loaded.report.renamed]
    ours += [entry[0] for entry in loaded.report.reset]
    assert sorted(ours) == sorted(flat(loaded.params))


# ---- timm ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"model": state, "epoch": 3},
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
], ids=["plain", "model", "module", "both"])
def test_state_dicts(tmp_path, wrap):
    module = tiny_timm()
    torch.save(wrap(module.state_dict()), tmp_path / "a.pth")
    loaded = vit_jax.load_model(tmp_path / "a.pth", num_heads=2)
    assert_equal_output(loaded, module)
    account(loaded, module.state_dict())
    assert loaded.model.activation == "gelu"
    assert loaded.report.assumptions == [
        "a square grid of 2x2 patches", "no rotary position embedding beside the table",
        "activation gelu, as PyTorch has it",
        "the head reads the class token, not a mean of the patches", "mean 0.5 and std 0.5"]


def test_averaged_weights_are_taken_with_a_word(tmp_path):
    module = tiny_timm()
    torch.save({"model": tiny_timm().state_dict(), "model_ema": module.state_dict()},
               tmp_path / "a.pth")
    loaded = vit_jax.load_model(tmp_path / "a.pth", num_heads=2)
    assert_equal_output(loaded, module)
    assert ("the weights under 'model_ema', where the file also has some under 'model'"
            in loaded.report.assumptions)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(12, 12), (8, 20)], ids=str)
def test_registers_with_positions(tmp_path, class_token, size):
    """timm's models with registers that do not say no_embed_class."""
    options = dict(reg_tokens=3, img_size=size, class_token=class_token, fc_norm=False,
                   global_pool="token" if class_token else "avg")
    path = save(tmp_path / "a", module := tiny_timm(**options))
    loaded = vit_jax.load_model(path, num_heads=2, image_size=size)
    assert_equal_output(loaded, module, size)
    assert loaded.report.resized[0][3] == "the registers' positions added to the registers"


def test_means_that_include_registers(tmp_path):
    options = dict(class_token=False, reg_tokens=3, no_embed_class=True, fc_norm=False)
    module = tiny_timm(global_pool="avg", pool_include_prefix=True, **options)
    save_directory(tmp_path, module, options | dict(pool_include_prefix=True), global_pool="avg")
    with pytest.raises(UserError, match="pool_include_prefix, a mean that includes the registers"):
        vit_jax.load_model(tmp_path)


def test_layer_norm_after_the_class_token_is_picked(tmp_path):
    module = tiny_timm(fc_norm=True)
    loaded = vit_jax.load_model(
        save_directory(tmp_path, module, dict(fc_norm=True), global_pool="token"))
    assert_equal_output(loaded, module)


def test_patches_that_are_not_square(tmp_path):
    path = save(tmp_path / "a", tiny_timm(patch_size=(8, 2), img_size=16))
    with pytest.raises(UserError, match="has patches of 8x2 pixels; .* has square ones"):
        vit_jax.load_model(path, num_heads=2)


def test_pooling(tmp_path):
    def module_of(**options):
        return tiny_timm(global_pool="avg", **options)

    module = module_of(class_token=False, fc_norm=False)
    save_directory(tmp_path, module, dict(class_token=False, fc_norm=False), global_pool="avg")
    loaded = vit_jax.load_model(tmp_path)
    assert_equal_output(loaded, module)
    assert loaded.model.classifier == "gap"
    # The file alone: without a class token only the patches can be meant.
    assert vit_jax.load_model(save(tmp_path / "a", module), num_heads=2).model.classifier == "gap"

    save_directory(tmp_path, module_of(class_token=False), global_pool="avg")  # timm's default
    with pytest.raises(UserError, match=r"normalises after pooling \(timm's fc_norm\)"):
        vit_jax.load_model(tmp_path)
    save_directory(tmp_path, module_of(fc_norm=False), global_pool="avg")
    with pytest.raises(UserError, match="global_pool='avg' and it has class token|has class token"):
        vit_jax.load_model(tmp_path)
    save_directory(tmp_path, module_of(fc_norm=False), dict(global_pool="avg"))
    with pytest.raises(UserError, match="global_pool='avg' and it has class token|has class token"):
        vit_jax.load_model(tmp_path)
    save_directory(tmp_path, tiny_timm(), global_pool="max")
    with pytest.raises(UserError, match="global_pool='max'"):
        vit_jax.load_model(tmp_path)


@pytest.mark.parametrize("options", [
    dict(),  # DINO
    dict(init_values=1e-5),  # DINOv2
    dict(init_values=1e-5, reg_tokens=3, no_embed_class=True),
    dict(no_embed_class=True),  # DeiT III
], ids=["dino", "dinov2", "registers", "no-embed-class"])
def test_self_supervised(tmp_path, options):
    """Files without a head; their own mean and std."""
    module = tiny_timm(num_classes=0, **options)
    path = save(tmp_path / "a.safetensors", module)
    loaded = vit_jax.load_model(path, num_heads=2)
    assert_equal_output(loaded, module)
    account(loaded, module.state_dict())
    assert loaded.model.num_classes == 0
    assert loaded.metadata["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert any("ImageNet's mean" in text for text in loaded.report.assumptions)
    loaded = vit_jax.load_model(path, num_heads=2, num_classes=3, mean=0.5, std=0.25)
    assert loaded.metadata["preprocessing"]["std"] == 0.25
    assert not loaded.params["head"]["kernel"].any()
    assert "(the file has no head)" in str(loaded.report)


@pytest.mark.parametrize("chunked", [True, False])
def test_dinov2s_own_names(tmp_path, chunked):
    """Its position embedding has a slot for the class token beside registers, timm's has not."""
    module = tiny_timm(num_classes=0, init_values=1e-5, reg_tokens=3, no_embed_class=True)
    state = module.state_dict()
    slot = torch.randn(1, 1, 16)
    state["cls_token"] = state["cls_token"] - slot
    state["pos_embed"] = torch.cat([slot, state["pos_embed"]], 1)
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.ones(1, 16)
    if chunked:
        state = {name.replace("blocks.", "blocks.0."): value for name, value in state.items()}
    torch.save(state, tmp_path / "a.pth")
    loaded = vit_jax.load_model(tmp_path / "a.pth", num_heads=2)
    assert_equal_output(loaded, module)
    assert loaded.report.dropped == [("mask_token", (1, 16), "of masked pretraining")]


@pytest.mark.parametrize("prefix, heads", [
    ("", ["head.mlp.0.weight", "head.last_layer.weight_g"]),  # DINO
    ("module.", ["head.mlp.0.weight"]),
    ("", ["dino_head.mlp.0.weight", "ibot_head.mlp.0.weight"]),  # DINOv2
])
def test_checkpoints_of_self_supervised_training(tmp_path, prefix, heads):
    """The teacher's backbone, of all that it consists of."""
    module = tiny_timm(num_classes=0)
    state = {f"{prefix}backbone.{name}": value for name, value in module.state_dict().items()}
    state |= {prefix + name: torch.ones(8, 16) for name in heads}
    torch.save({"student": state, "teacher": state, "epoch": 1}, tmp_path / "a.pth")
    loaded = vit_jax.load_model(tmp_path / "a.pth", num_heads=2)
    assert_equal_output(loaded, module)
    account(loaded, [*module.state_dict(), *heads])
    assert loaded.report.dropped == [
        (name, (8, 16), "beside the backbone, as of self-supervised training") for name in heads]


def test_a_classifier_on_a_backbone(tmp_path):
    """Of one's own, as a training script for it may write."""
    module = tiny_timm(num_classes=3)
    state = {name if name.startswith("head.") else f"backbone.{name}": value
             for name, value in module.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    loaded = vit_jax.load_model(tmp_path / "a.pth", num_heads=2)
    assert_equal_output(loaded, module)
    assert loaded.model.num_classes == 3 and not loaded.report.dropped


@pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTForMaskedImageModeling"])
def test_hf_masked_pretraining(tmp_path, transformers, kind):
    config = (transformers.ViTMAEConfig if "MAE" in kind else transformers.ViTConfig)(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, encoder_stride=4, mask_ratio=0.0)
    pretraining = randomise(getattr(transformers, kind)(config))
    pretraining.save_pretrained(tmp_path)
    encoder = pretraining.vit
    dropped = [name for name, *_ in vit_jax.load_model(tmp_path).report.dropped]
    assert dropped and all("decoder" in name or "mask_token" in name for name in dropped)
    if "MAE" not in kind:  # whose patches come in random order
        assert_equal_output(vit_jax.load_model(tmp_path), encoder,
                            output=lambda out: out.last_hidden_state[:, 0])


def test_mae(tmp_path):
    """The encoder, alone and in a file with the decoder."""
    module = tiny_timm(num_classes=0)
    state = module.state_dict()
    torch.save({"model": state}, tmp_path / "a.pth")
    assert_equal_output(vit_jax.load_model(tmp_path / "a.pth", num_heads=2), module)
    state |= {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 16),
              "decoder_blocks.0.norm1.weight": torch.ones(8)}
    torch.save({"model": state}, tmp_path / "a.pth")
    loaded = vit_jax.load_model(tmp_path / "a.pth", num_heads=2)
    assert_equal_output(loaded, module)
    account(loaded, state)
    assert len(loaded.report.dropped) == 3


class GooglesConv(timm.layers.StdConv2dSame):
    """(w - mean) / (std + 1e-5), as Google divides."""

    def forward(self, x):
        x = timm.layers.pad_same(x, self.kernel_size, self.stride, self.dilation)
        weight = self.weight
        std, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (weight - mean) / (std + 1e-5)
        return torch.nn.functional.conv2d(x, weight, None, self.stride)


def small_hybrid(**options):
    """The kind of R26+S/32, with fewer bottlenecks and narrower."""
    hybrid = timm.models.vision_transformer_hybrid
    embed = functools.partial(hybrid.HybridEmbed, backbone=hybrid._resnetv2((1, 2)))
    return timm.models.VisionTransformer(
        **(TINY | dict(patch_size=1, embed_layer=embed) | options))


@pytest.mark.parametrize("make, size, options", [
    (functools.partial(timm.create_model, "vit_tiny_r_s16_p8_224", num_classes=5, depth=1),
     (64, 96), {}),
    (small_hybrid, (32, 48), dict(num_heads=2)),
], ids=["R", "R26"])
def test_hybrids(tmp_path, make, size, options):
    module = randomise(make(img_size=size))
    save(tmp_path / "a.safetensors", module)
    loaded = vit_jax.load_model(tmp_path / "a.safetensors", image_size=size, **options)
    account(loaded, module.state_dict())
    assert "convolutions standardised by std" in str(loaded.report)
    assert_equal_output(loaded, module, size, tolerance=2e-3)  # timm as it is
    for part in module.modules():
        if isinstance(part, timm.layers.StdConv2dSame):
            part.__class__ = GooglesConv
        if isinstance(part, torch.nn.GroupNorm):
            part.eps = 1e-6
    assert_equal_output(loaded, module, size, tolerance=HYBRID)


# ---- Hugging Face --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def hf_config(transformers, **options):
    return transformers.ViTConfig(**(dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4) | options))


@pytest.mark.parametrize("options", [
    {}, dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, num_labels=3,
             id2label={0: "cat", 1: "dog", 2: "owl"}),
    dict(image_size=(8, 12), num_channels=1),
], ids=["defaults", "ours", "rectangle"])
def test_hf_classifier(tmp_path, transformers, options):
    module = randomise(transformers.ViTForImageClassification(
        hf_config(transformers, **options)))
    module.save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", dict(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3,
        size=dict(height=8, width=8)))
    loaded = vit_jax.load_model(tmp_path)
    size = options.get("image_size", (8, 8))
    assert_equal_output(loaded, module, size, channels=options.get("num_channels", 3),
                        output=lambda out: out.logits)
    assert loaded.metadata["class_names"] == (
        ("cat", "dog", "owl") if "id2label" in options else None)
    grey = "num_channels" in options
    assert loaded.metadata["preprocessing"] == dict(
        image_size=list(size), crop="squash", resize=None, interpolation="bicubic", antialias=True,
        mean=pytest.approx([0.2] if grey else [0.1, 0.2, 0.3]),
        std=pytest.approx([0.5] if grey else [0.4, 0.5, 0.6]))
    epsilon = [] if "layer_norm_eps" in options else [
        "LayerNorm epsilon 1e-06 in place of the config's 1e-12"]
    assert loaded.report.assumptions == epsilon + grey * [
        "mean 0.2, the average over [0.1, 0.2, 0.3]", "std 0.5, the average over [0.4, 0.5, 0.6]"]
    # transformers 5 has other names in memory than on disk.
    torch.save(module.state_dict(), tmp_path / "a.pth")
    memory = vit_jax.load_model(tmp_path / "a.pth", num_heads=2, image_size=size,
                                activation=loaded.model.activation)
    assert memory.model == loaded.model
    for name, tensor in flat(loaded.params).items():
        np.testing.assert_array_equal(flat(memory.params)[name], tensor)


@pytest.mark.parametrize("pooler", [True, False])
def test_hf_features(tmp_path, transformers, pooler):
    """ViTModel's pooler is a representation layer."""
    module = randomise(transformers.ViTModel(hf_config(transformers), add_pooling_layer=pooler))
    module.save_pretrained(tmp_path)
    loaded = vit_jax.load_model(tmp_path)
    assert loaded.model.representation_size == (16 if pooler else None)
    assert_equal_output(loaded, module, output=lambda out: (
        out.pooler_output if pooler else out.last_hidden_state[:, 0]))
    if pooler:
        plain = vit_jax.load_model(tmp_path, representation_size=None)
        assert_equal_output(plain, module, output=lambda out: out.last_hidden_state[:, 0])
        assert [name for name, *_ in plain.report.dropped] == [
            "vit.pooler.dense.weight", "vit.pooler.dense.bias"]
        config = json.loads((tmp_path / "config.json").read_text())
        write_json(tmp_path / "config.json", config | {"pooler_act": "relu"})
        with pytest.raises(UserError, match="activation 'relu'"):
            vit_jax.load_model(tmp_path)


def test_hf_classes_that_do_not_exclude_each_other(tmp_path, transformers):
    config = hf_config(transformers, problem_type="multi_label_classification")
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "theirs")
    loaded = vit_jax.load_model(tmp_path / "theirs")
    assert loaded.metadata["loss"] == "sigmoid"
    report = export_model(loaded, "hf", tmp_path / "ours", check=False)
    assert not any("sigmoid" in text for text in report.warnings)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours")
    assert again.config.problem_type == "multi_label_classification"


def test_hf_models_of_another_kind(tmp_path, transformers):
    config = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                  image_size=8, patch_size=4)
    model = transformers.IJepaModel(transformers.IJepaConfig(**config), add_pooling_layer=True)
    model.save_pretrained(tmp_path / "pooled")
    with pytest.raises(UserError, match="I-JEPA's pooler reads the first patch"):
        vit_jax.load_model(tmp_path / "pooled")
    model = randomise(transformers.IJepaModel(
        transformers.IJepaConfig(**config), add_pooling_layer=False))
    model.save_pretrained(tmp_path / "plain")
    assert_equal_output(vit_jax.load_model(tmp_path / "plain"), model,
                        output=lambda out: out.last_hidden_state.mean(1))
    told = json.loads((tmp_path / "plain" / "config.json").read_text())
    transformers.Dinov2Model(transformers.Dinov2Config(**config)).save_pretrained(tmp_path / "v2")
    with pytest.raises(UserError, match="model_type='dinov2', which may compute"):
        vit_jax.load_model(tmp_path / "v2")
    write_json(tmp_path / "plain" / "config.json", told | {"model_type": "vitpose_backbone"})
    with pytest.raises(UserError, match="model_type='vitpose_backbone', which may compute"):
        vit_jax.load_model(tmp_path / "plain")


def test_hf_center_crop(tmp_path, transformers):
    module = randomise(transformers.ViTForImageClassification(hf_config(transformers)))
    module.save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", dict(
        do_center_crop=True, size=dict(shortest_edge=10), crop_size=dict(height=8, width=8)))
    loaded = vit_jax.load_model(tmp_path)
    assert loaded.metadata["preprocessing"]["crop"] == "center_crop"
    assert loaded.metadata["preprocessing"]["resize"] == 10


# ---- torchvision ---------------------------------------------------------------------------------

@pytest.mark.parametrize("representation_size", [None, 12])
@pytest.mark.parametrize("old_names", [False, True])
def test_torchvision(tmp_path, representation_size, old_names):
    import torchvision

    module = randomise(torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24,
        num_classes=5, representation_size=representation_size,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6)))
    state = module.state_dict()
    if old_names:
        state = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
                 for name, value in state.items()}
    torch.save(state, tmp_path / "a.pth")
    loaded = vit_jax.load_model(tmp_path / "a.pth", num_heads=2)
    assert_equal_output(loaded, module)
    assert loaded.model.representation_size == representation_size
    assert loaded.metadata["dialect"] == "torchvision"


# ---- Other resolutions ---------------------------------------------------------------------------

@pytest.mark.parametrize("new", [(12, 12), (8, 8), (12, 20), (36, 12)], ids=str)
def test_resize_as_timm_does(tmp_path, new):
    """timm resamples its own checkpoint when the model is built for another size."""
    options = TINY | dict(img_size=(16, 16))
    module = randomise(timm.models.VisionTransformer(**options))
    path = save(tmp_path / "a.safetensors", module)
    other = timm.models.VisionTransformer(**(options | dict(img_size=new)))
    other.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(
        module.state_dict(), other))
    loaded = vit_jax.load_model(
        path, num_heads=2, image_size=new, position_resize="bicubic_antialias")
    assert loaded.metadata["position_resize"] == "bicubic_antialias"
    assert_equal_output(loaded, other.eval(), new)
    for mode in ("corner_aligned", "bilinear", "bicubic"):
        loaded = vit_jax.load_model(path, num_heads=2, image_size=new, position_resize=mode)
        expected = resize_position_embedding(
            module.pos_embed.detach().numpy(), old_grid=(4, 4),
            new_grid=(new[0] // 4, new[1] // 4), prefix=1, mode=mode)
        np.testing.assert_array_equal(flat(loaded.params)[POSITIONS], expected)


def test_resize_to_as_many_patches(tmp_path):
    """Which timm's loader leaves as they are, row after row of another length."""
    options = TINY | dict(img_size=(16, 16))
    module = randomise(timm.models.VisionTransformer(**options))
    path = save(tmp_path / "a.safetensors", module)
    other = timm.models.VisionTransformer(**(options | dict(img_size=(8, 32))))
    cls, grid = module.pos_embed[:, :1], module.pos_embed[:, 1:]
    grid = torch.nn.functional.interpolate(
        grid.reshape(1, 4, 4, 16).permute(0, 3, 1, 2), (2, 8), mode="bicubic", antialias=True)
    resized = torch.cat([cls, grid.flatten(2).transpose(1, 2)], 1)
    other.load_state_dict(module.state_dict() | {"pos_embed": resized})
    loaded = vit_jax.load_model(
        path, num_heads=2, image_size=(8, 32), position_resize="bicubic_antialias")
    assert_equal_output(loaded, other.eval(), (8, 32))


def test_patch_size_as_timm_does(tmp_path):
    module = tiny_timm()
    path = save(tmp_path / "a.safetensors", module)
    other = timm.models.VisionTransformer(**(TINY | dict(patch_size=8, img_size=(16, 16))))
    other.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(
        module.state_dict(), other, interpolation="bilinear", antialias=False))
    loaded = vit_jax.load_model(path, num_heads=2, patch_size=8, image_size=16)
    assert_equal_output(loaded, other.eval(), (16, 16))
    assert [entry[3] for entry in loaded.report.resized] == ["patch kernel, pseudo-inverse"]


# ---- Files that are something else ---------------------------------------------------------------

def test_other_networks(tmp_path):
    others = {
        "resnet": timm.create_model("resnet18", num_classes=3),
        "swin": timm.create_model("swin_tiny_patch4_window7_224", num_classes=3),
        "beit": timm.create_model("beit_base_patch16_224", num_classes=3, depth=1),
        "distilled": timm.create_model("deit_tiny_distilled_patch16_224", depth=1),
    }
    messages = {"resnet": "does not contain a supported Vision Transformer",
                "swin": "no Transformer blocks", "beit": "fc_norm",
                "distilled": "unexpected dist_token"}
    for name, module in others.items():
        torch.save(module.state_dict(), tmp_path / f"{name}.pth")
        with pytest.raises(UserError) as error:
            vit_jax.load_model(tmp_path / f"{name}.pth")
        assert messages[name] in str(error.value), name


def test_missing_and_surplus(tmp_path):
    state = tiny_timm().state_dict()
    state["blocks.1.attn.qkw.weight"] = state.pop("blocks.1.attn.qkv.weight")
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        vit_jax.load_model(tmp_path / "a.pth", num_heads=2)
    assert ("missing blocks.1.attn.qkv.weight, nearest: blocks.1.attn.qkw.weight\n"
            in str(error.value))
    assert "unexpected blocks.1.attn.qkw.weight [48, 16], nearest: " in str(error.value)
    state = tiny_timm().state_dict()
    torch.save(state | {"blocks.0.0.norm1.bias": state["blocks.0.norm1.bias"]}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds some tensors twice"):
        vit_jax.load_model(tmp_path / "a.pth", num_heads=2)


@pytest.mark.parametrize("name, value", [
    ("blocks.0.attn.qkv.weight", torch.ones(47, 16)), ("patch_embed.proj.weight", torch.ones(3)),
    ("patch_embed.proj.weight", torch.tensor(1.0)), ("pos_embed", torch.ones(3)),
    ("cls_token", torch.ones(1, 1, 3)), ("head.weight", torch.ones(2, 3, 4)),
    ("blocks.1.mlp.fc1.weight", torch.ones(7, 16)),
], ids=str)
def test_shapes_that_cannot_be(tmp_path, name, value):
    torch.save(tiny_timm().state_dict() | {name: value}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth"):
        vit_jax.load_model(tmp_path / "a.pth", num_heads=2)


@pytest.mark.parametrize("config", [
    dict(pretrained_cfg=3), dict(pretrained_cfg=dict(input_size="x")), dict(model_args="x"),
    dict(model_args=dict(num_heads="many")), dict(model_args=dict(act_layer="swish")),
    dict(id2label=[1, 2]), dict(id2label=dict(a="b")), dict(image_size=[]),
    dict(pretrained_cfg=dict(crop_pct=0)), dict(pretrained_cfg=dict(mean=3)),
], ids=json.dumps)
def test_configs_that_are_something_else(tmp_path, config):
    """Refused in a sentence, or not needed."""
    save_directory(tmp_path, tiny_timm())
    write_json(tmp_path / "config.json", config)
    try:
        vit_jax.load_model(tmp_path, num_heads=2)
    except UserError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)



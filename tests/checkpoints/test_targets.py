"""What PyTorch's libraries call our models, and what they cannot express."""

import json

import numpy as np
import pytest
from checkpoint_makers import apply, pixels
from exports import make, refusal

from vit_jax.checkpoints import targets
from vit_jax.checkpoints.export import export_model
from vit_jax.checkpoints.load import load_model
from vit_jax.models.variants import VARIANTS, create_model


@pytest.mark.core
def test_timms_names():
    names = {v: targets.timm_architecture(create_model(v, num_classes=3), (224, 224))
             for v, (module, fields) in VARIANTS.items() if "patch_size" in fields}
    assert names["B/16"] == ("vit_base_patch16_224", {
        "img_size": [224, 224], "num_heads": 12, "act_layer": "gelu_tanh"})
    assert names["G/14"][0] == "vit_gigantic_patch14_224"
    assert names["R50+L/32"][0] == "vit_large_r50_s32_224"
    overridden = {v for v, (_, args) in names.items() if len(args) > 3}
    assert overridden == {"R26+B/32", "R50+B/32", "R50+L/16"}
    at_384 = targets.timm_architecture(create_model("L/16", num_classes=3), (384, 384))
    assert at_384[0] == "vit_large_patch16_384"


def test_timm_has_these_names(torch):
    from torch_shim import timm

    for name in targets._TIMM:
        assert timm.is_model(f"{name}_224"), name
    for name in targets._TIMM_AT_384:
        assert timm.is_model(f"{name}_384"), name


@pytest.mark.core
@pytest.mark.parametrize("variant, size, heads", [("B/16", (16, 16), 12), ("R+Ti/16", (32, 32), 3)])
def test_timm_is_told_what_shapes_do_not_tell(tmp_path, variant, size, heads):
    """Of width 192, where 12 heads are those of timm's base, and 3 what the width suggests."""
    fields = dict(hidden_size=192, num_heads=heads, num_layers=1, activation="gelu")
    loaded = make(size, variant, **fields)
    report = export_model(loaded, "timm", tmp_path / "out")
    assert report.verification.status != "FAIL"
    args = json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
    assert (args["num_heads"], args["act_layer"]) == (heads, "gelu")
    back = load_model(tmp_path / "out")
    assert (back.model.num_heads, back.model.activation) == (heads, "gelu")
    images = pixels(2, *size)
    np.testing.assert_allclose(apply(back.model, back.params, images),
                               apply(loaded.model, loaded.params, images), atol=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("target, fields, reason", [
    ("timm", dict(representation_size=8), "representation layer"),
    ("hf", dict(representation_size=8), "representation layer"),
    ("timm", dict(position_embedding="relative"), "position embeddings are relative"),
    ("npz", dict(position_embedding="relative"), "position embeddings are relative"),
    *((target, dict(position_embedding_at=place), "adds position embeddings in every layer")
      for target, place in (("npz", "every_layer_shared"), ("timm", "every_layer"))),
    ("timm", dict(classifier="unpooled"), "logits of every patch"),
    ("npz", dict(classifier="token_unpooled"), "logits of every patch"),
    ("hf", dict(classifier="gap"), "no class token"),
    ("torchvision", dict(classifier="gap"), "no class token"),
    ("hf", dict(register_tokens=2), "register tokens"),
    ("torchvision", dict(layer_scale=0.1), "LayerScale"),
    ("torchvision", {}, "supports only the exact GELU"),
    ("torchvision", dict(size=(32, 48), activation="gelu"), "square images"),
    ("hf", dict(variant="R+Ti/16", size=(32, 32), num_layers=1), "hybrid"),
    ("torchvision", dict(variant="R+Ti/16", size=(32, 32), num_layers=1), "hybrid"),
    ("keras", {}, "--to=keras is not one of"),
])
def test_what_a_target_cannot_express(tmp_path, target, fields, reason):
    message = refusal(export_model, make(**fields), target, tmp_path / "out", check=False)
    assert reason in message and "\n" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.core
@pytest.mark.parametrize("target", ["timm", "hf"])
def test_a_mean_of_other_channels(tmp_path, target):
    loaded = make(preprocessing=dict(mean=[0.1, 0.2]))
    message = refusal(export_model, loaded, target, tmp_path / "out", check=False)
    assert "images have 3 channels, and their mean or std 2 ([0.1, 0.2]); give" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.core
def test_resnets_and_strange_hybrids_are_refused():
    resnet = create_model("R50x1", num_classes=3)
    for target in ("timm", "hf", "torchvision"):
        assert "convolutional baseline" in refusal(targets.check, target, resnet, (64, 64), 3)
    strange = create_model("R26+S/32", num_classes=3, resnet_stages=(1, 1))
    assert "no hybrid whose ResNet" in refusal(targets.check, "timm", strange, (64, 64), 3)
    targets.check("npz", strange, (64, 64), 3)

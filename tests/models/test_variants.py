"""Names of models, their exact sizes, and what `create_model` refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import abstract_params, apply, pixels, random_params

from vit_jax.models.resnet import ResNet
from vit_jax.models.variants import VARIANTS, canonical_name, create_model
from vit_jax.models.vit import VisionTransformer

# Parameters with 1000 classes at 224 and at 384 (378 with patches of 14), from the authors' own
# tests where they have the variant. R50+B/32 and R50+L/16 are sums of parts of their neighbours
# in this table; g/14 and G/14 follow from the sizes in arXiv 2106.04560.
TRANSFORMERS = {
    "Ti/16": (5_717_416, 5_790_376),
    "S/16": (22_050_664, 22_196_584),
    "S/32": (22_878_952, 22_915_432),
    "B/8": (86_576_872, 87_744_232),
    "B/16": (86_567_656, 86_859_496),
    "B/32": (88_224_232, 88_297_192),
    "L/16": (304_326_632, 304_715_752),
    "L/32": (306_535_400, 306_632_680),
    "H/14": (632_045_800, 632_651_240),
    "g/14": (1_012_611_432, 1_012_611_432 + (27**2 - 16**2) * 1408),
    "G/14": (1_844_440_680, 1_844_440_680 + (27**2 - 16**2) * 1664),
    "R+Ti/16": (6_337_704, 6_355_944),
    "R26+S/32": (36_431_912, 36_468_392),
    "R26+B/32": (101_383_976, 101_456_936),
    "R50+B/16": (98_659_112, 98_950_952),
    "R50+B/32": (110_945_832, 111_018_792),
    "R50+L/16": (316_483_624, 316_872_744),
    "R50+L/32": (328_994_856, 329_092_136),
}
# x1: torchvision's resnet50, resnet101, resnet152 (BatchNorm has as many parameters as GroupNorm).
RESNETS = {"R50x1": 25_557_032, "R101x1": 44_549_160, "R152x1": 60_192_808}


def count(name, size, **overrides):
    model = create_model(name, num_classes=1000, **overrides)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model, size, size)))


def test_every_variant_is_counted_here():
    assert set(VARIANTS) == {*TRANSFORMERS, *RESNETS, "R50x2", "R152x2", "R200x3"}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_parameters_of_transformers(name):
    at_224, at_384 = TRANSFORMERS[name]
    big = any(size in name for size in "LHgG")
    assert count(name, 224, scan_layers=big) == at_224
    large = 378 if name.endswith("/14") else 384
    assert count(name, large, scan_layers=True) == at_384  # cheaper to trace


@pytest.mark.parametrize("name", [name for name in VARIANTS if "x" in name])
def test_parameters_of_resnets(name):
    stages = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3), "200": (3, 24, 36, 3)}
    depth, factor = name[1:].split("x")
    width = 64 * int(factor)
    expected = 7 * 7 * 3 * width + 2 * width
    channels = width
    for stage, units in enumerate(stages[depth]):
        inner, outer = width * 2**stage, 4 * width * 2**stage
        expected += channels * outer + 2 * outer  # projection of the first unit
        for _ in range(units):
            expected += channels * inner + 9 * inner * inner + inner * outer
            expected += 2 * (inner + inner + outer)
            channels = outer
    expected += channels * 1000 + 1000
    assert RESNETS.get(name, expected) == expected
    assert count(name, 224) == expected


@pytest.mark.parametrize(
    "alias, name",
    [
        ("ViT-B_16", "B/16"),
        ("ViT-H_14", "H/14"),
        ("R50+ViT-B_16", "R50+B/16"),
        ("R+ViT-Ti_16", "R+Ti/16"),
        ("R26+ViT-S_32", "R26+S/32"),
        ("vit_tiny_patch16_224", "Ti/16"),
        ("vit_base_patch16_224", "B/16"),
        ("vit_base_patch16_384.augreg_in21k_ft_in1k", "B/16"),
        ("vit_base_patch8_224", "B/8"),
        ("vit_small_patch32_384", "S/32"),
        ("vit_large_patch32_384", "L/32"),
        ("vit_huge_patch14_224", "H/14"),
        ("vit_giant_patch14_224", "g/14"),
        ("vit_gigantic_patch14_224", "G/14"),
        ("vit_tiny_r_s16_p8_224", "R+Ti/16"),
        ("vit_small_r26_s32_384", "R26+S/32"),
        ("vit_base_r50_s16_384.orig_in21k_ft_in1k", "R50+B/16"),
        ("vit_large_r50_s32_224", "R50+L/32"),
    ],
)
def test_names_of_others(alias, name):
    assert canonical_name(alias) == name


@pytest.mark.parametrize("name", VARIANTS)
def test_canonical_names_are_kept(name):
    assert canonical_name(name) == name


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("B/17", "B/16"),
        ("b/16", "B/16"),
        ("h/14", "H/14"),
        ("ViT-L_15", "L/16"),
        ("vit_base_patch15_224", "B/16"),
        ("R50-B/16", "R50+B/16"),
        ("R50x11", "R50x1"),
    ],
)
def test_unknown_variant_names_the_nearest(wrong, nearest):
    with pytest.raises(ValueError) as error:
        create_model(wrong, num_classes=10)
    assert f"Unknown model variant {wrong!r}; did you mean {nearest!r}?" in str(error.value)


def test_unknown_variant_without_a_neighbour_lists_all():
    with pytest.raises(ValueError, match="Unknown model variant 'zzz'. The variants are: Ti/16, "):
        create_model("zzz", num_classes=10)


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("B/16", {"dropout": 0.1}, "no option 'dropout'; did you mean 'dropout_rate'"),
        ("R50x1", {"classifier": "gap"}, "R50x1 has no option 'classifier'"),
        ("B/16", {"parent": None}, "no option 'parent'"),
        ("B/16", {"classifier": "tokens"}, "classifier='tokens' .* did you mean 'token'"),
        ("B/16", {"position_embedding": "sincos"}, "did you mean 'sincos_2d'"),
        ("B/16", {"remat": "everything"}, "'none', 'full', 'dots', 'names'"),
        ("B/16", {"attention_implementation": "flash"}, "'auto', 'xla', 'cudnn'"),
        ("B/16", {"activation": "relu"}, "'gelu_tanh', 'gelu'"),
        ("B/16", {"dtype": "bf16"}, "dtype='bf16' .*'bfloat16'"),
        ("R50x1", {"dtype": "float31"}, "did you mean 'float32'"),
        ("B/16", {"dtype": "int8"}, "dtype='int8' is not one of"),
    ],
)
def test_unknown_options_and_values(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, num_classes=10, **overrides)


def test_options_reach_the_model():
    model = create_model(
        "R50+B/16", num_classes=7, num_layers=3, mlp_dim=5, dtype="bfloat16", remat=True
    )
    assert isinstance(model, VisionTransformer)
    assert (model.num_classes, model.num_layers, model.mlp_dim) == (7, 3, 5)
    assert (model.hidden_size, model.resnet_stages) == (768, (3, 4, 9))
    assert model.dtype == jnp.bfloat16
    assert model.remat == "full"
    assert create_model("B/16", num_classes=7, remat=False).remat == "none"
    assert isinstance(create_model("R50x2", num_classes=7), ResNet)


@pytest.mark.slow  # because tests/models/test_parity_timm.py compares them with timm's
@pytest.mark.parametrize("name", ["H/14", "g/14", "G/14"])
def test_the_largest_run_for_real(name):
    """Two blocks at full width: head dimensions of 80, 88 and 104 are no power of two."""
    model = create_model(name, num_classes=3, num_layers=2)
    params = random_params(model, 28, 28)
    params["head"] = {"kernel": np.ones((model.hidden_size, 3), np.float32), "bias": np.zeros(3)}
    params["Transformer"]["encoder_norm"] = {
        "scale": np.ones(model.hidden_size),
        "bias": np.full(model.hidden_size, 1 / model.hidden_size),
    }
    logits = apply(model, params, pixels(height=28, width=28))
    # A LayerNorm has zero mean: summed over its width, only the bias that was added is left.
    np.testing.assert_allclose(logits, np.ones((2, 3)), atol=1e-3)

"""The Vision Transformer: parameter tree, initialisation, options, precision, layouts."""

import functools
import math
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY, abstract_params, apply, pixels, random_params, tiny

from vit_jax.models.variants import create_model
from vit_jax.models.vit import CLASSIFIERS, Encoder1DBlock, PatchEmbedding

pytestmark = pytest.mark.core


def shapes(model, height, width):
    """{'path/of/parameter': shape}"""
    return {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(model, height, width))
    }


def initialise(model, height, width):
    init = jax.jit(functools.partial(model.init, train=False))
    return init(jax.random.key(0), np.zeros((1, height, width, 3), np.float32))["params"]


# --- The parameter tree ----------------------------------------------------------------------


def block_tree(prefix, width, mlp, heads):
    attention = f"{prefix}/MultiHeadDotProductAttention_0"
    tree = {
        f"{attention}/out/kernel": (heads, width // heads, width),
        f"{attention}/out/bias": (width,),
        f"{prefix}/MlpBlock_0/Dense_0/kernel": (width, mlp),
        f"{prefix}/MlpBlock_0/Dense_0/bias": (mlp,),
        f"{prefix}/MlpBlock_0/Dense_1/kernel": (mlp, width),
        f"{prefix}/MlpBlock_0/Dense_1/bias": (width,),
    }
    for name in ("query", "key", "value"):
        tree[f"{attention}/{name}/kernel"] = (width, heads, width // heads)
        tree[f"{attention}/{name}/bias"] = (heads, width // heads)
    for name in ("LayerNorm_0", "LayerNorm_1"):
        tree[f"{prefix}/{name}/scale"] = tree[f"{prefix}/{name}/bias"] = (width,)
    return tree


def transformer_tree(width, mlp, heads, layers, tokens):
    tree = {
        "cls": (1, 1, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, tokens, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, 1000),
        "head/bias": (1000,),
    }
    for i in range(layers):
        tree |= block_tree(f"Transformer/encoderblock_{i}", width, mlp, heads)
    return tree


def test_parameter_tree_of_b16_is_googles():
    expected = transformer_tree(768, 3072, 12, 12, 197) | {"embedding/kernel": (16, 16, 3, 768)}
    assert len(expected) == 200
    assert shapes(create_model("B/16", num_classes=1000), 224, 224) == expected


@pytest.mark.parametrize(
    "name, stages, sizes, kernel, leaves",
    [
        ("R+Ti/16", (), (192, 768, 3, 12, 50), (8, 8, 64, 192), 203),
        ("R26+S/32", (2, 2, 2, 2), (384, 1536, 6, 12, 50), (1, 1, 2048, 384), 287),
        ("R50+B/16", (3, 4, 9), (768, 3072, 12, 12, 197), (1, 1, 1024, 768), 356),
    ],
)
def test_parameter_tree_of_hybrids_is_googles(name, stages, sizes, kernel, leaves):
    expected = transformer_tree(*sizes) | {
        "embedding/kernel": kernel,
        "conv_root/kernel": (7, 7, 3, 64),
        "gn_root/scale": (64,),
        "gn_root/bias": (64,),
    }
    channels = 64
    for i, units in enumerate(stages, start=1):
        inner, outer = 32 * 2**i, 128 * 2**i
        for j in range(1, units + 1):
            unit = f"block{i}/unit{j}"
            convs = {
                "1": (1, 1, channels, inner),
                "2": (3, 3, inner, inner),
                "3": (1, 1, inner, outer),
            }
            if j == 1:
                convs["_proj"] = (1, 1, channels, outer)
            for suffix, shape in convs.items():
                expected[f"{unit}/conv{suffix}/kernel"] = shape
                expected[f"{unit}/gn{suffix}/scale"] = shape[-1:]
                expected[f"{unit}/gn{suffix}/bias"] = shape[-1:]
            channels = outer
    assert len(expected) == leaves
    assert shapes(create_model(name, num_classes=1000), 224, 224) == expected


@pytest.mark.parametrize(
    "options, added, removed",
    [
        (
            dict(representation_size=9),
            {"pre_logits/kernel": (16, 9), "pre_logits/bias": (9,), "head/kernel": (9, 5)},
            ["head/kernel"],
        ),
        (dict(num_classes=0), {}, ["head/kernel", "head/bias"]),
        (dict(register_tokens=3), {"register_tokens": (1, 3, 16)}, []),
        (
            dict(layer_scale=0.1),
            {f"Transformer/encoderblock_{i}/LayerScale_{j}/gamma": (16,)
             for i in range(2) for j in range(2)},
            [],
        ),
        (
            dict(classifier="gap"),
            {"Transformer/posembed_input/pos_embedding": (1, 6, 16)},
            ["cls", "Transformer/posembed_input/pos_embedding"],
        ),
        (
            dict(position_embedding="learned_2d"),
            {"Transformer/posembed_input/row_embedding": (1, 2, 8),
             "Transformer/posembed_input/column_embedding": (1, 3, 8)},
            ["Transformer/posembed_input/pos_embedding"],
        ),
        (
            dict(position_embedding="relative"),
            {f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/relative_embedding":
             (13, 2, 8) for i in range(2)},
            ["Transformer/posembed_input/pos_embedding"],
        ),
        (
            dict(position_embedding="sincos_2d"), {}, ["Transformer/posembed_input/pos_embedding"],
        ),
        (dict(position_embedding="none"), {}, ["Transformer/posembed_input/pos_embedding"]),
        (
            dict(position_embedding_at="every_layer"),
            {f"Transformer/encoderblock_{i}/posembed_input/pos_embedding": (1, 7, 16)
             for i in range(2)},
            ["Transformer/posembed_input/pos_embedding"],
        ),
        (dict(position_embedding_at="every_layer_shared"), {}, []),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_parameters_of_options(options, added, removed):
    """An image of 8x12 has 2x3 patches of 4 pixels; with the class token 7 tokens."""
    plain = shapes(tiny(), 8, 12)
    kept = {path: shape for path, shape in plain.items() if path not in removed}
    assert len(kept) == len(plain) - len(removed)
    assert shapes(tiny(**options), 8, 12) == kept | added


def test_scanned_tree_has_a_leading_layer_axis():
    loop, scan = shapes(tiny(), 8, 8), shapes(tiny(scan_layers=True), 8, 8)
    for path, shape in block_tree("", 16, 24, 2).items():
        assert scan.pop(f"Transformer/encoderblock{path}") == (2, *shape)
        for i in range(2):
            assert loop.pop(f"Transformer/encoderblock_{i}{path}") == shape
    assert loop == scan


# --- Initialisation --------------------------------------------------------------------------


def test_initialisation_is_that_of_the_paper():
    """One block of B/16, with the ranges observed in the authors' code."""
    model = create_model(
        "B/16", num_classes=10, num_layers=1, representation_size=768, head_bias_init=-10.0
    )
    params = initialise(model, 224, 224)
    block = params["Transformer"]["encoderblock_0"]
    attention, mlp = block["MultiHeadDotProductAttention_0"], block["MlpBlock_0"]

    def check(x, std, largest):
        assert abs(float(x.mean())) < 0.02 * std
        assert float(x.std()) == pytest.approx(std, rel=0.01)
        assert float(abs(x).max()) == pytest.approx(largest, rel=0.01)

    # lecun_normal is a normal cut at two of *its* standard deviations, 2.27 of the result's.
    check(params["embedding"]["kernel"], 768**-0.5, 0.0820)
    check(params["pre_logits"]["kernel"], 768**-0.5, 0.0820)
    for name in ("query", "key", "value", "out"):
        check(attention[name]["kernel"], 0.0361, 0.0625)  # xavier_uniform of 768 x 768
    for name in ("Dense_0", "Dense_1"):
        check(mlp[name]["kernel"], 0.0228, 0.0395)
        assert 0.9e-6 < float(mlp[name]["bias"].std()) < 1.1e-6
    positions = params["Transformer"]["posembed_input"]["pos_embedding"]
    assert float(positions.std()) == pytest.approx(0.02, rel=0.01)
    assert float(positions.max()) > 0.07  # not truncated

    for norm in (block["LayerNorm_0"], block["LayerNorm_1"], params["Transformer"]["encoder_norm"]):
        assert (norm["scale"] == 1).all()
        assert not norm["bias"].any()
    for name in ("query", "key", "value", "out"):
        assert not attention[name]["bias"].any()
    assert not params["cls"].any()
    assert not params["embedding"]["bias"].any()
    assert not params["head"]["kernel"].any()
    assert (params["head"]["bias"] == -10).all()


def test_initial_values_of_options():
    params = initialise(
        tiny(hidden_size=256, num_layers=1, layer_scale=1e-4, register_tokens=8), 8, 8
    )
    gamma = params["Transformer"]["encoderblock_0"]["LayerScale_1"]["gamma"]
    assert (gamma == np.float32(1e-4)).all()
    assert float(params["register_tokens"].std()) == pytest.approx(0.02, rel=0.1)


def test_scanned_layers_start_different():
    params = initialise(tiny(scan_layers=True), 8, 8)
    kernels = params["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert abs(kernels[0] - kernels[1]).max() > 0.1
    assert abs(kernels).max() <= math.sqrt(6 / (16 + 24))  # the fan does not count the layers


# --- Outputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes, last", [(5, 5), (0, 16)])
@pytest.mark.parametrize(
    "classifier, tokens",
    [("token", ()), ("gap", ()), ("unpooled", (6,)), ("token_unpooled", (7,))],
)
def test_output_shapes(classifier, tokens, num_classes, last):
    model = tiny(classifier=classifier, num_classes=num_classes, register_tokens=2)
    images = pixels(height=8, width=12)
    output = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
    assert output[0].shape == (2, *tokens, last)
    assert output[0].dtype == jnp.float32


def test_classifiers_are_views_of_the_same_tokens():
    images = pixels()
    params = random_params(tiny(num_classes=0), 8, 8)
    output = {
        kind: apply(tiny(num_classes=0, classifier=kind), params, images)
        for kind in CLASSIFIERS
        if kind.startswith("token")
    }
    # The last block's products are of another shape for one token: roundings of 6e-8 each.
    np.testing.assert_allclose(output["token"], output["token_unpooled"][:, 0], atol=1e-6)

    params = random_params(tiny(num_classes=0, classifier="gap"), 8, 8)
    pooled = apply(tiny(num_classes=0, classifier="gap"), params, images)
    tokens = apply(tiny(num_classes=0, classifier="unpooled"), params, images)
    np.testing.assert_allclose(pooled, np.mean(tokens, axis=1), atol=1e-6)


def test_representation_layer_and_head():
    """`num_classes=0` gives what the head sees; with a representation layer that is its tanh."""
    images = pixels()
    model = tiny(representation_size=9)
    params = random_params(model, 8, 8)
    logits = apply(model, params, images)
    without_head = {name: tree for name, tree in params.items() if name != "head"}
    represented = apply(tiny(representation_size=9, num_classes=0), without_head, images)
    np.testing.assert_allclose(
        logits, represented @ params["head"]["kernel"] + params["head"]["bias"], atol=1e-5
    )
    without_pre_logits = {n: tree for n, tree in without_head.items() if n != "pre_logits"}
    features = apply(tiny(num_classes=0), without_pre_logits, images)
    dense = params["pre_logits"]
    np.testing.assert_allclose(
        represented, np.tanh(features @ dense["kernel"] + dense["bias"]), atol=1e-5
    )


def test_epsilon_of_layer_norm():
    """1e-6 (PyTorch's default is 1e-5), seen where the variance is of that size."""
    model = tiny(num_layers=0, num_classes=0, classifier="unpooled", position_embedding="none")
    images = pixels()
    kernel = 1e-4 * np.random.default_rng(0).standard_normal((4, 4, 3, 16), np.float32)
    norm = {"scale": np.ones(16), "bias": np.zeros(16)}
    params = {
        "embedding": {"kernel": kernel, "bias": np.zeros(16)},
        "Transformer": {"encoder_norm": norm},
    }
    patches = images.reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 48)
    tokens = patches @ kernel.reshape(48, 16)
    centred = tokens - tokens.mean(-1, keepdims=True)
    expected = centred / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(apply(model, params, images), expected, rtol=1e-3, atol=1e-4)


def test_gap_leaves_registers_out():
    """Without any block the registers touch nothing, so gap must not change at all."""
    images = pixels()
    options = dict(classifier="gap", num_classes=0, num_layers=0)
    params = random_params(tiny(**options, register_tokens=2), 8, 8)
    with_registers = apply(tiny(**options, register_tokens=2), params, images)
    del params["register_tokens"]
    np.testing.assert_array_equal(with_registers, apply(tiny(**options), params, images))


def test_registers_follow_the_class_token_without_position():
    images = pixels()
    model = tiny(register_tokens=2, num_layers=0, num_classes=0)
    params = random_params(model, 8, 8)
    _, state = jax.jit(
        lambda params: model.apply(
            {"params": params}, images, train=False, capture_intermediates=True,
            mutable=["intermediates"],
        )
    )(params)  # fmt: skip
    inside = state["intermediates"]["Transformer"]
    positioned = inside["posembed_input"]["__call__"][0]  # [2, 5, 16]
    tokens = inside["Dropout_0"]["__call__"][0]  # [2, 7, 16], what the blocks see
    np.testing.assert_array_equal(tokens[:, :1], positioned[:, :1])
    np.testing.assert_array_equal(tokens[1, 1:3], params["register_tokens"][0])
    np.testing.assert_array_equal(tokens[:, 3:], positioned[:, 1:])


def test_patch_embedding_is_a_convolution():
    """With its gradient, for patches and images that are not square."""
    generator = np.random.default_rng(0)
    images, cotangent = (generator.standard_normal(shape).astype(np.float32)
                         for shape in ((2, 8, 12, 3), (2, 2, 3, 5)))
    embedding = PatchEmbedding(features=5, patch_size=4)
    convolution = nn.Conv(5, (4, 4), strides=(4, 4), padding="VALID")
    params = embedding.init(jax.random.key(0), images)
    jax.tree.map(np.testing.assert_array_equal, params, convolution.init(
        jax.random.key(0), images))
    params["params"]["bias"] += 0.5
    (got, pull_back), (expected, expected_pull_back) = (
        jax.vjp(module.apply, params, images) for module in (embedding, convolution))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
                 pull_back(cotangent), expected_pull_back(cotangent))


# --- Refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("H/14", (384, 384), "384x384 is not divisible into patches of 14x14.*: 378x378"),
        ("B/16", (224, 225), "224x225 is not divisible into patches of 16x16.*: 224x224"),
        ("B/16", (7, 16), "nearest size that is: 16x16"),
        ("R+Ti/16", (48, 64), "patches of 32x32.*: 64x64"),
        ("R26+S/32", (224, 240), "patches of 32x32.*: 224x2(24|56)"),
        ("R50+B/16", (56, 64), "patches of 16x16"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        shapes(create_model(name, num_classes=1), *size)


@pytest.mark.parametrize(
    "options",
    [
        dict(position_embedding="learned_1d"),
        dict(position_embedding="learned_2d"),
        dict(position_embedding="relative"),
        dict(position_embedding_at="every_layer"),
        dict(position_embedding_at="every_layer_shared"),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_parameters_of_another_image_size_are_refused(options):
    model = tiny(**options)
    params = {"params": abstract_params(model, 8, 8)}
    with pytest.raises(ValueError, match=r"_embedding of these .*for another image size"):
        jax.eval_shape(lambda params: model.apply(params, pixels(height=12), train=False), params)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((8, 8, 3), np.float32), r"shape \[B, H, W, C\], not \[8, 8, 3\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"not uint8; scale uint8 pixels with x / 127.5 - 1"),
    ],
)
@pytest.mark.parametrize("name", ["B/16", "R50x1"])
def test_wrong_images_are_refused(name, images, message):
    model = create_model(name, num_classes=1)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))


# --- Dropout and stochastic depth ------------------------------------------------------------


def test_without_rates_training_is_evaluation():
    images = pixels()
    params = random_params(tiny(), 8, 8)
    np.testing.assert_array_equal(
        apply(tiny(), params, images, train=True), apply(tiny(), params, images, train=False)
    )


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    "rate", ["dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"]
)
def test_rates_act_in_training_only(rate, scan_layers):
    images = pixels(batch=8)
    model = tiny(**{rate: 0.5}, scan_layers=scan_layers)
    params = random_params(model, 8, 8)
    plain = apply(tiny(scan_layers=scan_layers), params, images)
    np.testing.assert_array_equal(apply(model, params, images), plain)
    first, again, other = (apply(model, params, images, train=True, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert abs(first - other).max() > 1e-2
    assert abs(first - plain).max() > 1e-2


ENCODER_PARTS = (Encoder1DBlock, nn.Dropout)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_stochastic_depth_grows_linearly(scan_layers):
    """The same image 4000 times: a block leaves it as it was where both branches are dropped."""
    model = tiny(num_layers=3, stochastic_depth_rate=0.6, scan_layers=scan_layers, num_classes=0)
    images = np.tile(pixels(batch=1, height=4, width=4), (4000, 1, 1, 1))
    params = random_params(model, 4, 4)

    @jax.jit
    def blocks(params, images):
        _, state = model.apply(
            {"params": params},
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            capture_intermediates=lambda module, _: isinstance(module, ENCODER_PARTS),
            mutable=["intermediates"],
        )
        inside = state["intermediates"]["Transformer"]
        tokens = inside["Dropout_0"]["__call__"][0]
        if scan_layers:
            return [tokens, *inside["encoderblock"]["__call__"][0]]
        return [tokens, *(inside[f"encoderblock_{i}"]["__call__"][0] for i in range(3))]

    tokens = blocks(params, images)
    untouched = [
        np.asarray((before == after).all(axis=(1, 2)))
        for before, after in zip(tokens[:-1], tokens[1:], strict=True)
    ]
    dropped = [block.mean() for block in untouched]
    # Five standard deviations of a binomial with 4000 draws.
    assert dropped[0] == 0.0
    assert dropped[1] == pytest.approx(0.3**2, abs=0.023)
    assert dropped[2] == pytest.approx(0.6**2, abs=0.038)
    assert (untouched[1] & untouched[2]).mean() == pytest.approx(
        0.18**2, abs=0.014
    )  # blocks draw for themselves


def test_stochastic_depth_keeps_the_expectation():
    """Kept branches are divided by the probability of being kept."""
    block = Encoder1DBlock(mlp_dim=24, num_heads=2)
    params = random_params(tiny(), 8, 8)["Transformer"]["encoderblock_0"]
    params["MlpBlock_0"]["Dense_1"] = jax.tree.map(np.zeros_like, params["MlpBlock_0"]["Dense_1"])
    x = np.random.default_rng(0).standard_normal((1, 3, 16), np.float32)
    x = np.tile(x, (4000, 1, 1))

    @jax.jit
    def both(x):
        in_training = block.apply(
            {"params": params}, x, drop_branch_rate=0.25, train=True,
            rngs={"dropout": jax.random.key(0)},
        )  # fmt: skip
        return in_training, block.apply({"params": params}, x, train=False)

    y, complete = map(np.asarray, both(x))
    branch = complete - x  # the attention's alone: the MLP's is zero
    kept = (y != x).any(axis=(1, 2))
    assert kept.mean() == pytest.approx(0.75, abs=0.035)
    np.testing.assert_allclose(y[kept], (x + branch / 0.75)[kept], atol=1e-5)


# --- Silence ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options",
    [
        ("B/16", TINY | dict(dtype="bfloat16", scan_layers=True, remat="dots", dropout_rate=0.1)),
        ("B/16", TINY | dict(register_tokens=1, layer_scale=1.0, stochastic_depth_rate=0.1)),
        ("R26+S/32", dict(num_classes=3, num_layers=1, resnet_stages=(1, 1))),
        ("R50x1", dict(num_classes=3, stages=(1,))),
    ],
)
def test_nothing_warns(name, options):
    key = jax.random.key(0)
    images = np.zeros((1, 32, 32, 3), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_model(name, **options)
        params = jax.eval_shape(lambda: model.init(key, images, train=False))
        jax.eval_shape(lambda p: model.apply(p, images, train=True, rngs={"dropout": key}), params)

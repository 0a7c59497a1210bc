"""The ResNet of hybrids and baselines."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny_models import abstract_params, apply, pixels, random_params

from vit_jax.models.resnet import (
    GroupNorm,
    StdConv,
    add_relu,
    resnet_features,
    standardize,
    total_stride,
)
from vit_jax.models.variants import create_model

pytestmark = pytest.mark.core


def test_standardisation_in_closed_form():
    """(w - mean) / (std + 1e-5), with the population's std, for every output channel."""
    kernel = np.random.default_rng(0).normal(3, 2, (3, 3, 4, 5)).astype(np.float32)
    kernel[..., 0] *= 1e-5  # where the epsilon matters
    expected = np.empty_like(kernel)
    for channel in range(5):
        w = kernel[..., channel].astype(np.float64)
        expected[..., channel] = (w - w.mean()) / (np.sqrt(((w - w.mean()) ** 2).mean()) + 1e-5)
    np.testing.assert_allclose(standardize(kernel), expected, rtol=1e-4, atol=1e-5)


def test_constant_kernels_become_zero():
    assert not standardize(np.ones((1, 1, 8, 2), np.float32)).any()


@pytest.mark.parametrize("size, kernel, stride", [(7, 3, 2), (8, 3, 2), (8, 7, 2), (5, 1, 2)])
def test_same_padding_is_right_and_bottom_first(size, kernel, stride):
    """Against a loop: of an odd total padding the smaller half lies left and on top."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1, size, size, 2), np.float32)
    w = generator.standard_normal((kernel, kernel, 2, 3), np.float32)
    out = -(-size // stride)
    padding = max(0, (out - 1) * stride + kernel - size)
    before, after = padding // 2, padding - padding // 2
    padded = np.pad(x[0], ((before, after), (before, after), (0, 0)))
    standard = (w - w.mean((0, 1, 2))) / (w.std((0, 1, 2)) + 1e-5)
    expected = np.empty((out, out, 3))
    for i in range(out):
        for j in range(out):
            window = padded[i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            expected[i, j] = np.einsum("hwc,hwco->o", window, standard)
    conv = StdConv(3, (kernel, kernel), (stride, stride))
    got = jax.jit(conv.apply)({"params": {"kernel": w}}, x)
    np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-4)


def test_epsilon_of_group_norm():
    """1e-6 (PyTorch's default is 1e-5), seen where the variance is of that size."""
    x = np.random.default_rng(0).normal(0, 1e-3, (1, 4, 4, 32)).astype(np.float32)
    got, _ = GroupNorm().init_with_output(jax.random.key(0), x)
    expected = (x - x.mean((1, 2))) / np.sqrt(x.var((1, 2)) + 1e-6)  # a channel a group
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_add_relu_is_relu_of_the_sum(dtype):
    """To the bit, gradients at 0 included."""
    values = np.linspace(-1, 1, 9, dtype=dtype)
    a, b = (grid.ravel() for grid in np.meshgrid(values, values))
    cotangent = np.linspace(1, 2, a.size, dtype=dtype)
    assert (a + b == 0).sum() == 9
    (out, pull), (expected, pull_expected) = (
        jax.vjp(function, a, b) for function in (add_relu, lambda a, b: nn.relu(a + b)))
    np.testing.assert_array_equal(out, expected)
    for got, wanted in zip(pull(cotangent), pull_expected(cotangent), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_units_start_as_the_identity():
    """gn3's scale starts at zero, every other scale at one."""
    model = create_model("R50x1", num_classes=2, stages=(2,))
    init = jax.jit(lambda key, images: model.init(key, images, train=False))
    params = init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    scales = {
        "/".join(key.key for key in path[:-1]): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "scale"
    }
    assert sum(name.endswith("gn3") for name in scales) == 2
    for name, scale in scales.items():
        assert (scale == (0 if name.endswith("gn3") else 1)).all(), name


class Features(nn.Module):
    stages: tuple[int, ...]

    @nn.compact
    def __call__(self, images):
        return resnet_features(images, self.stages)


@pytest.mark.parametrize(
    "stages, stride, channels",
    [((), 4, 64), ((1,), 4, 256), ((1, 1), 8, 512), ((1, 2, 1), 16, 1024), ((1,) * 4, 32, 2048)],
)
def test_feature_map_has_the_total_stride(stages, stride, channels):
    assert total_stride(stages) == stride
    images = np.zeros((1, 64, 96, 3), np.float32)
    features, _ = jax.eval_shape(
        lambda: Features(stages).init_with_output(jax.random.key(0), images)
    )
    assert features.shape == (1, 64 // stride, 96 // stride, channels)


@pytest.mark.parametrize(
    "name, size, tokens",
    [
        ("R+Ti/16", 224, 50),  # not 197: the root has stride 4, the patches 8 of its positions
        ("R+Ti/16", 384, 145),
        ("R26+S/32", 224, 50),
        ("R50+B/16", 224, 197),
        ("R50+L/32", 384, 145),
    ],
)
def test_tokens_of_hybrids(name, size, tokens):
    params = abstract_params(create_model(name, num_classes=1, num_layers=1), size, size)
    assert params["Transformer"]["posembed_input"]["pos_embedding"].shape[1] == tokens


def test_baseline_is_features_mean_and_head():
    """Convolutional networks take any size; their features are positive after the last ReLU."""
    images = pixels(height=33, width=32)
    options = dict(stages=(1,))
    params = random_params(create_model("R50x1", num_classes=3, **options), 33, 32)
    logits = apply(create_model("R50x1", num_classes=3, **options), params, images)
    head = params.pop("head")
    features = apply(create_model("R50x1", num_classes=0, **options), params, images)
    assert features.shape == (2, 256)
    assert features.min() >= 0 < features.std()
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"], atol=1e-4)


@pytest.mark.parametrize("name, features", [("R50x1", 2048), ("R50x2", 4096)])
def test_features_of_baselines(name, features):
    model = create_model(name, num_classes=4, head_bias_init=-2.0)
    assert abstract_params(model, 32, 32)["head"]["kernel"].shape == (features, 4)

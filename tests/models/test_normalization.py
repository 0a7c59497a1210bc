"""LayerNorm against Flax's, forward and backward, and what its backward pass keeps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.normalization import EPSILON, LayerNorm, layer_norm

pytestmark = pytest.mark.core


def arrays(shape, dtype=jnp.float32):
    generator = np.random.default_rng(0)
    x = jnp.asarray(3 * generator.standard_normal(shape) + 1, dtype)
    scale, bias = (jnp.asarray(generator.standard_normal(shape[-1]), jnp.float32) for _ in "ab")
    cotangent = jnp.asarray(generator.standard_normal(shape), jnp.float32)
    return x, scale, bias, cotangent


@pytest.mark.parametrize("shape", [(2, 5, 48), (7, 32)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_flax(shape, dtype):
    x, scale, bias, cotangent = arrays(shape, dtype)
    flax_norm = nn.LayerNorm(epsilon=EPSILON, dtype=jnp.float32)

    def reference(x, scale, bias):
        return flax_norm.apply({"params": {"scale": scale, "bias": bias}}, x)

    (got, pull_back), (expected, reference_pull_back) = (
        jax.vjp(function, x, scale, bias) for function in (layer_norm, reference))
    assert got.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-6)
    d_x, *rest = pull_back(cotangent)
    expected_d_x, *expected_rest = reference_pull_back(cotangent)
    assert d_x.dtype == dtype
    # One rounding to bfloat16 is half of 2 ** -7 relative.
    near = dict(rtol=1e-5, atol=1e-5) if dtype == jnp.float32 else dict(rtol=2**-7, atol=1e-3)
    np.testing.assert_allclose(
        d_x.astype(jnp.float32), expected_d_x.astype(jnp.float32), **near)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
                 rest, expected_rest)


def test_a_constant_token_becomes_the_bias():
    _, scale, bias, _ = arrays((3, 16))
    np.testing.assert_allclose(
        layer_norm(jnp.full((3, 16), 2.0), scale, bias), jnp.broadcast_to(bias, (3, 16)))


def test_rounding_does_not_make_a_variance_negative():
    _, scale, bias, _ = arrays((64, 16))
    x = jnp.repeat(1000 + jnp.linspace(0, 1, 64)[:, None], 16, axis=1)
    value, slopes = jax.value_and_grad(lambda x: layer_norm(x, scale, bias).sum())(x)
    assert np.isfinite(value) and np.isfinite(slopes).all()


def test_the_module_begins_as_flaxs():
    x = jnp.ones((1, 2, 8))
    ours, theirs = (m.init(jax.random.key(0), x) for m in (LayerNorm(), nn.LayerNorm()))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_backward_pass_keeps_bfloat16_tokens_as_they_are():
    x, scale, bias, _ = arrays((2, 5, 48), jnp.bfloat16)
    _, pull_back = jax.vjp(layer_norm, x, scale, bias)
    kept = sorted((leaf.size, str(leaf.dtype)) for leaf in jax.tree.leaves(pull_back))
    assert kept == [(10, "float32"), (10, "float32"), (48, "float32"), (480, "bfloat16")]

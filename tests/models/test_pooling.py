"""Max-pooling against Flax's, to the bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.pooling import max_pool

pytestmark = pytest.mark.core


def plain(x):
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")


@pytest.mark.parametrize("shape", [(8, 8), (7, 6), (2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("values", [2, 1_000_000], ids="{} values".format)
def test_it_is_flax_max_pool(shape, dtype, values):
    """Few values are many ties. Sums of whole numbers are exact in any order."""
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.integers(values, size=(3, *shape, 4)), dtype)
    expected, pull_expected = jax.vjp(plain, x)
    got, pull = jax.vjp(max_pool, x)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == dtype
    cotangent = jnp.asarray(generator.integers(-9, 9, size=got.shape), dtype)
    (gradient,), (expected_gradient,) = pull(cotangent), pull_expected(cotangent)
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert gradient.dtype == dtype


def test_no_number_stays_no_number():
    x = jnp.ones((1, 6, 6, 1)).at[0, 3, 3, 0].set(jnp.nan)
    np.testing.assert_array_equal(max_pool(x), plain(x))

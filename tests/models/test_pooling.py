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
    x = generator.integers(values, size=(3, *shape, 4)).astype(dtype)
    pooled = jax.eval_shape(plain, x)
    cotangent = generator.integers(-9, 9, size=pooled.shape).astype(dtype)

    @jax.jit
    def both(x, cotangent):
        return [(value, *pull(cotangent)) for value, pull in (
            jax.vjp(function, x) for function in (max_pool, plain))]

    (got, gradient), (expected, expected_gradient) = both(x, cotangent)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == dtype
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert gradient.dtype == dtype


def test_no_number_stays_no_number():
    x = jnp.ones((1, 6, 6, 1)).at[0, 3, 3, 0].set(jnp.nan)
    np.testing.assert_array_equal(max_pool(x), plain(x))

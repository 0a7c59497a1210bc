"""GELU against its formulas, forward and backward, and what its backward pass keeps."""

import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations, named

from vit_jax.models.gelu import as_xla_knows_it, gelu

pytestmark = pytest.mark.core
POINTS = np.concatenate([np.linspace(-12, 12, 481), [0.0, -100.0, 100.0]]).astype(np.float32)


def gelu_in_float64(x, approximate):
    if approximate:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


@pytest.mark.parametrize("approximate", [True, False])
def test_values_and_slopes(approximate):
    """Against the formulas in float64, and near Flax's, which rounds more in the tails."""
    x, step = POINTS.astype(np.float64), 1e-5
    expected = gelu_in_float64(x, approximate)
    np.testing.assert_allclose(gelu(POINTS, approximate), expected, rtol=1e-6, atol=1e-6)
    slope = jax.vmap(jax.grad(lambda x: gelu(x, approximate)))(POINTS)
    difference = gelu_in_float64(x + step, approximate) - gelu_in_float64(x - step, approximate)
    np.testing.assert_allclose(slope, difference / (2 * step), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        gelu(POINTS, approximate), nn.gelu(POINTS, approximate=approximate), rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("approximate", [True, False])
def test_bfloat16_is_rounded_once(approximate):
    x = jnp.asarray(POINTS, jnp.bfloat16)
    got = gelu(x, approximate)
    assert got.dtype == jnp.bfloat16
    exact = gelu(x.astype(jnp.float32), approximate)
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
    slope = jax.grad(lambda x: gelu(x, approximate).astype(jnp.float32).sum())(x)
    assert slope.dtype == jnp.bfloat16


@pytest.mark.parametrize("approximate", [True, False])
def test_the_backward_pass_keeps_the_argument_alone(approximate):
    x = jnp.asarray(POINTS, jnp.bfloat16)
    _, pull_back = jax.vjp(lambda x: gelu(x, approximate), x)
    kept = jax.tree.leaves(pull_back)
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(x.shape, x.dtype)]


def test_the_form_for_cublas():
    """Against the formula in float64, where nothing is rounded to 16 bits."""
    np.testing.assert_allclose(
        as_xla_knows_it(POINTS), gelu_in_float64(POINTS.astype(np.float64), True), rtol=1e-6,
        atol=3e-6)


@pytest.mark.parametrize("attributes, dtype, taken", [
    (dict(compute_capability="9.0"), "bfloat16", True),
    (dict(compute_capability="10.3"), "bfloat16", True),
    (dict(compute_capability="9.0"), "float32", False),
    (dict(compute_capability="8.9"), "bfloat16", False),
    (dict(compute_capability="12.0"), "bfloat16", False),
    (dict(compute_capability="gfx942"), "bfloat16", False),  # AMD
    (dict(), "bfloat16", False),
], ids=str)
def test_which_gpus_take_it(monkeypatch, attributes, dtype, taken):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**attributes)])
    x = jnp.zeros((2, 3), dtype)
    traced = equations(lambda x: jax.vjp(lambda x: gelu(x, True), x)[0], x)
    assert bool(named(traced, "tanh")) == taken
    assert named(equations(lambda x: gelu(x, False), x), "erfc")

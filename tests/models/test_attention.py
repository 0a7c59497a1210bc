"""Multi-head attention: relative positions, and what it refuses."""

import math

import jax
import numpy as np
import pytest
from tiny_models import abstract_params, pixels, tiny

from vit_jax.models.attention import MultiHeadDotProductAttention

pytestmark = pytest.mark.core


def test_relative_attention_against_a_loop():
    length, heads, head_dim = 5, 2, 3
    width = heads * head_dim
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, length, width)).astype(np.float32)
    module = MultiHeadDotProductAttention(heads, relative_positions=True)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))["params"]
    params = jax.tree.map(lambda p: generator.standard_normal(p.shape, np.float32), params)
    assert params["relative_embedding"].shape == (2 * length - 1, heads, head_dim)

    project = {n: np.einsum("bnd,dhk->bnhk", x, params[n]["kernel"]) + params[n]["bias"]
               for n in ("query", "key", "value")}  # fmt: skip
    expected = np.zeros_like(x)
    for b in range(2):
        for h in range(heads):
            for i in range(length):
                query = project["query"][b, i, h]
                logits = np.array([
                    query @ project["key"][b, j, h]
                    + query @ params["relative_embedding"][i - j + length - 1, h]
                    for j in range(length)
                ])  # fmt: skip
                weights = np.exp(logits / math.sqrt(head_dim))
                weights /= weights.sum()
                expected[b, i] += weights @ project["value"][b, :, h] @ params["out"]["kernel"][h]
    expected += params["out"]["bias"]
    got = jax.jit(lambda x: module.apply({"params": params}, x, train=False))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="hidden_size 16 is not divisible by num_heads 3"):
        abstract_params(tiny(num_heads=3), 8, 8)


@pytest.mark.parametrize(
    "options, train, message",
    [
        (dict(), False, "needs dtype='bfloat16'"),
        (dict(dtype="bfloat16", position_embedding="relative"), False, "relative"),
        (dict(dtype="bfloat16", attention_dropout_rate=0.1), True, "attention dropout"),
    ],
)
def test_fused_attention_says_what_it_lacks(options, train, message):
    model = tiny(attention_implementation="cudnn", **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), pixels(), train=train))

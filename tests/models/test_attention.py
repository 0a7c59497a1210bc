"""Multi-head attention: relative positions, what it refuses, and which kernel computes it.

cuDNN's kernel itself has not run here: there is no GPU. What is tested is when it is asked for.
"""

import functools
import math
import os
import shutil
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations, named
from tiny_models import abstract_params, apply, pixels, random_params, tiny

from vit_jax.models import attention, vit
from vit_jax.models.attention import (
    MultiHeadDotProductAttention,
    attend,
    choose_implementation,
    fused_attend,
    fused_length,
    product_apart,
)

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


def plain_attention(query, key, value):
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision="highest")
    weights = jax.nn.softmax(logits / math.sqrt(query.shape[-1]), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision="highest")


@pytest.mark.parametrize("size", [1, 30], ids=["mild", "one weight is nearly 1"])
def test_attend_is_softmax_attention(size):
    generator = np.random.default_rng(0)
    query, key, value, cotangent = (
        jnp.asarray(generator.standard_normal((2, 7, 3, 20)), jnp.float32) for _ in range(4))
    (got, pull_back), (expected, plain_pull_back) = (
        jax.vjp(function, size * query, key, value) for function in (attend, plain_attention))
    # Logits grow with `size`, and their last bits with them.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6 * size)
    for ours, theirs in zip(pull_back(cotangent), plain_pull_back(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6 * size)


def test_attend_in_bfloat16_is_near_float32():
    """Operands are rounded to 8 bits, sums are not: within a few roundings (2 ** -8 each)."""
    generator = np.random.default_rng(0)
    exact = [jnp.asarray(generator.standard_normal((2, 50, 2, 64)), jnp.bfloat16).astype(
        jnp.float32) for _ in range(4)]
    rounded = [x.astype(jnp.bfloat16) for x in exact]
    (got, pull_back), (expected, plain_pull_back) = (
        jax.vjp(function, *operands[:3])
        for function, operands in ((attend, rounded), (plain_attention, exact)))
    assert got.dtype == jnp.bfloat16
    for ours, theirs in zip([got, *pull_back(rounded[3])],
                            [expected, *plain_pull_back(exact[3])], strict=True):
        assert ours.dtype == jnp.bfloat16
        assert jnp.abs(ours - theirs).max() < 4 * 2**-8 * jnp.abs(theirs).max()


def test_recorded_attention_gives_the_same_features():
    """The path that holds the weights, against the one that need not."""
    model = tiny()
    params, images = random_params(model, 8, 8), pixels()
    recorded, _ = jax.jit(lambda params: model.apply(
        {"params": params}, images, train=False, mutable=["intermediates"]))(params)
    np.testing.assert_allclose(recorded, apply(model, params, images), rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="hidden_size 16 is not divisible by num_heads 3"):
        abstract_params(tiny(num_heads=3), 8, 8)


@pytest.fixture
def device(monkeypatch):
    """Pretends that JAX's first device is one with the given attributes."""
    def pretend(**attributes):
        monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**attributes)])
    attention._cudnn_refusal.cache_clear()
    yield pretend
    attention._cudnn_refusal.cache_clear()


@pytest.fixture
def hopper(device, monkeypatch):
    """An H100 with a cuDNN, as far as tracing can tell."""
    device(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91002)
    monkeypatch.setattr(attention, "_compile", jax.eval_shape)


@pytest.mark.parametrize("attributes", [
    dict(platform="cpu"),
    dict(platform="tpu"),
    dict(platform="gpu", compute_capability="gfx942"),  # AMD
    dict(platform="gpu", compute_capability="7.5"),
], ids=str)
def test_other_devices_take_xla(device, attributes):
    device(**attributes)
    assert choose_implementation("auto", dtype="bfloat16", length=196, head_dim=64) == (
        "xla", "cuDNN's kernel needs an NVIDIA GPU of compute capability 8.0 or later")


@pytest.mark.parametrize("options, reason", [
    (dict(dtype="float32"), "needs dtype bfloat16, not float32"),
    (dict(dropout_rate=0.1), "no attention dropout"),
    (dict(relative_positions=True), "no learned relative positions"),
    (dict(head_dim=12), "multiple of 8 and at most 128, not 12"),
    (dict(head_dim=136), "multiple of 8 and at most 128, not 136"),
], ids=str)
def test_what_rules_cudnn_out(hopper, options, reason):
    arguments = dict(dtype=jnp.bfloat16, length=196, head_dim=64)
    assert choose_implementation("auto", **arguments) == ("cudnn", "")
    assert choose_implementation("cudnn", **arguments) == ("cudnn", "")
    assert choose_implementation("xla", **arguments) == ("xla", "")
    name, said = choose_implementation("auto", **arguments | options)
    assert name == "xla" and reason in said
    with pytest.raises(ValueError, match=f"='cudnn' cannot be used here: .*{reason}.*; use 'auto'"):
        choose_implementation("cudnn", **arguments | options)


@pytest.mark.parametrize("head_dim", [4, 8, 12, 64, 80, 88, 104, 128, 136, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_agrees_with_jax(hopper, dtype, head_dim):
    """Whether a gradient can be traced. (On Hopper JAX takes wider heads; this CPU is none.)"""
    heads = jax.ShapeDtypeStruct((2, 196, 3, head_dim), dtype)

    def loss(x):
        return jnp.sum(jax.nn.dot_product_attention(x, x, x, implementation="cudnn"))

    try:
        jax.eval_shape(jax.grad(loss), heads)
        accepted = "cudnn"
    except NotImplementedError:
        accepted = "xla"
    name, reason = choose_implementation("auto", dtype=dtype, length=196, head_dim=head_dim)
    assert name == accepted
    assert "JAX refuses" not in reason  # our own words, where we know the rule


def test_odd_lengths_are_padded_to_be_trained_by_cudnn(hopper):
    """JAX refuses their gradient, as this test would notice if it did not any more."""
    arguments = dict(dtype="bfloat16", length=197, head_dim=64)
    assert choose_implementation("auto", **arguments) == ("cudnn", "")
    with pytest.raises(NotImplementedError, match="Unsupported sequence length"):
        jax.eval_shape(jax.grad(lambda x: jnp.sum(jax.nn.dot_product_attention(
            x, x, x, implementation="cudnn"))), jax.ShapeDtypeStruct((2, 197, 3, 64), "bfloat16"))


@pytest.mark.parametrize("length", [6, 7])
def test_the_fused_kernel_changes_nothing(monkeypatch, length):
    """Padded or not. With JAX's plain kernel in the place of cuDNN's, which is asked the same."""
    module = MultiHeadDotProductAttention(num_heads=2)
    generator = np.random.default_rng(0)
    x, cotangent = (generator.standard_normal((3, length, 16), np.float32) for _ in range(2))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=True))["params"]
    params = jax.tree.map(lambda p: generator.normal(0, 0.3, p.shape).astype(p.dtype), params)

    def run():
        @jax.jit  # anew, so that it is traced again
        def compute(params, x):
            output, pull = jax.vjp(
                lambda params, x: module.apply({"params": params}, x, train=True), params, x)
            return output, pull(cotangent)

        return compute(params, x)

    expected, lengths = run(), fused(monkeypatch)
    # Float32 sums of a few dozen numbers near 1, in another order: roundings of 6e-8 each.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6),
                 run(), expected)
    assert lengths == [fused_length(length)] and not lengths[0] % 2


def fused(monkeypatch):
    """Lets models take JAX's plain kernel as if it were cuDNN's; a list of the lengths it gets."""
    lengths = []

    def kernel(query, key, value, length):
        lengths.append(query.shape[1])
        return fused_attend(query, key, value, length, implementation="xla")

    for module in (attention, vit):
        monkeypatch.setattr(module, "choose_implementation", lambda *_, **__: ("cudnn", ""))
    monkeypatch.setattr(attention, "fused_attend", kernel)
    return lengths


@pytest.mark.parametrize("options", [
    dict(),
    dict(register_tokens=1),
    dict(position_embedding_at="every_layer"),
    dict(position_embedding_at="every_layer_shared", scan_layers=True, remat="full"),
    dict(scan_layers=True, scan_unroll=True, stochastic_depth_rate=0.5),
], ids=str)
def test_a_model_is_filled_up_once(monkeypatch, options):
    """For the kernel, which is asked for even numbers of tokens, and changes nothing."""
    def run(model):
        params, key = random_params(model, 8, 8), jax.random.key(0)

        def loss(params):
            logits = model.apply({"params": params}, pixels(), train=True, rngs={"dropout": key})
            return jnp.sum(jnp.sin(logits)), logits

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    model = tiny(classifier="token", **options)
    expected, lengths = run(model), fused(monkeypatch)
    # Float32 sums of a few dozen numbers near 1, in another order: roundings of 6e-8 each.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
                 run(model), expected)
    assert set(lengths) == {6}

    def fillings(layers):
        deep = model.clone(num_layers=layers)
        found = named(equations(lambda params: deep.apply(
            {"params": params}, pixels(), train=False), abstract_params(deep, 8, 8)), "pad")
        shapes = [(e.invars[0].aval.shape, e.outvars[0].aval.shape) for e in found]
        return sum(before[:2] == (len(pixels()), 5) != after[:2] for before, after in shapes)

    assert fillings(2) == fillings(3) == ("register_tokens" not in options)


@pytest.mark.parametrize("apart", [False, True])
def test_projections_begin_as_flax_has_them(apart):
    """Google's: `nn.DenseGeneral`'s parameters of the same key, and its numbers."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 16))
    flax = nn.DenseGeneral((2, 8), kernel_init=nn.initializers.xavier_uniform(), name="query")
    ours = attention._Projection(2, 8, jnp.float32, apart, name="query")
    params, expected = (module.init(jax.random.key(1), x) for module in (ours, flax))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape), params)
    np.testing.assert_allclose(ours.apply(params, x), flax.apply(params, x), rtol=1e-6, atol=1e-6)


def test_products_apart_are_products():
    """With their gradients, and each behind a barrier that holds something of its own, without
    which XLA would see that they share x."""
    x, cotangent = (jax.random.normal(jax.random.key(i), (7, 16)) for i in range(2))
    kernel = jax.random.normal(jax.random.key(2), (16, 16))

    def run(product):
        output, pull = jax.vjp(product, x, kernel)
        return output, pull(cotangent)

    # Sums of 16 numbers near 1 in another order: roundings of 6e-8 each.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6),
                 run(product_apart), run(jnp.matmul))
    barriers = named(equations(lambda: run(product_apart)), "optimization_barrier")
    assert [[v.aval.shape for v in e.invars] for e in barriers] == [[(7, 16), (16, 16)]] * 2


@pytest.mark.parametrize("apart", [False, True])
def test_remat_dots_keeps_projections(apart):
    """Its policy finds the product inside of the function with a gradient of its own."""
    module = attention._Projection(2, 8, jnp.float32, apart)
    x = jnp.ones((2, 3, 16))
    params = module.init(jax.random.key(0), x)

    @functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    def run(params, x):
        return jnp.tanh(module.apply(params, x)).sum()

    products = named(equations(jax.grad(run, argnums=(0, 1)), params, x), "dot_general")
    assert len(products) == 3  # forward, of the kernel, of x; not a fourth to repeat the first


ON_A_GPU = """
import sys
import jax, jax.numpy as jnp
from vit_jax.models.attention import (
    attend, choose_implementation, fused_attend, fused_length)

length, kernel = int(sys.argv[1]), sys.argv[2]
chosen = choose_implementation("auto", dtype="bfloat16", length=length, head_dim=64)
assert kernel != "cudnn" or chosen == ("cudnn", ""), chosen
*heads, cotangent = (jax.random.normal(jax.random.key(i), (4, length, 6, 64), "bfloat16")
                     for i in range(4))
more = ((0, 0), (0, fused_length(length) - length), (0, 0), (0, 0))
found, pull = jax.vjp(
    lambda *x: fused_attend(*(jnp.pad(y, more) for y in x), length, kernel)[:, :length], *heads)
expected, pull_expected = jax.vjp(attend, *(x.astype("float32") for x in heads))
for a, b in zip((found, *pull(cotangent)),
                (expected, *pull_expected(cotangent.astype("float32"))), strict=True):
    print(float(jnp.abs(a - b).max() / jnp.abs(b).max()))
"""


@pytest.mark.parametrize("length", [196, 197])
@pytest.mark.parametrize("platform, kernel", [
    ("cpu", "xla"),
    pytest.param("cuda", "cudnn", marks=[pytest.mark.slow, pytest.mark.skipif(
        not shutil.which("nvidia-smi"), reason="there is no NVIDIA GPU")]),
])
def test_fused_kernels_against_float32(platform, kernel, length, monkeypatch, capsys):
    """To bfloat16's 8 bits: outputs, and gradients of queries, keys and values."""
    if platform == "cpu":
        monkeypatch.setattr(sys, "argv", ["", str(length), kernel])
        exec(ON_A_GPU, {})
        said = capsys.readouterr().out
    else:  # this process has a CPU alone
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        run = subprocess.run([sys.executable, "-c", ON_A_GPU, str(length), kernel], text=True,
                             env=environment | {"JAX_PLATFORMS": platform}, capture_output=True,
                             check=False)
        assert run.returncode == 0, run.stderr
        said = run.stdout
    errors = [float(line) for line in said.splitlines()]
    assert len(errors) == 4 and max(errors) < 0.02, errors


def test_what_only_jax_knows_is_said_in_its_words(hopper, monkeypatch):
    def refuse(*_):
        raise RuntimeError("cuDNN is too old.\nAnd a page more.")
    monkeypatch.setattr(attention, "_compile", refuse)
    assert choose_implementation("auto", dtype="bfloat16", length=196, head_dim=64) == (
        "xla", "JAX refuses cuDNN's kernel: cuDNN is too old")


@pytest.mark.parametrize("options, train, fused", [
    (dict(), True, True),
    (dict(classifier="token"), False, True),  # 5 tokens
    (dict(classifier="token"), True, True),
    (dict(classifier="token", register_tokens=1), True, True),
    (dict(scan_layers=True, remat="full"), True, True),
    (dict(dtype="float32"), True, False),
    (dict(attention_dropout_rate=0.1), True, False),
    (dict(attention_dropout_rate=0.1), False, True),
    (dict(position_embedding="relative"), False, False),
    (dict(num_heads=4), False, False),  # of width 4
    (dict(attention_implementation="xla"), True, False),
], ids=str)
def test_the_model_asks_for_it(hopper, options, train, fused):
    """In the traced program, and in what a run says about itself."""
    model = tiny(**dict(dtype="bfloat16", classifier="gap") | options)
    params = abstract_params(model, 8, 8)
    found = equations(
        lambda params, key: model.apply(
            {"params": params}, pixels(), train=train, rngs={"dropout": key}),
        params, jax.random.key(0))
    assert any("dot_product_attention" in e.primitive.name for e in found) == fused
    assert model.attention_kernel((8, 8), train=train)[0] == ("cudnn" if fused else "xla")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_is_xla_on_a_cpu_bit_for_bit(dtype):
    assert tiny().attention_implementation == "auto"
    params = random_params(tiny(), 8, 8)
    auto, xla = (
        apply(tiny(dtype=dtype, attention_implementation=name), params, pixels())
        for name in ("auto", "xla"))
    np.testing.assert_array_equal(auto, xla)


def test_asking_for_cudnn_on_a_cpu_is_refused():
    model = tiny(attention_implementation="cudnn", dtype="bfloat16")
    with pytest.raises(ValueError, match="needs an NVIDIA GPU .* use 'auto' or 'xla'"):
        abstract_params(model, 8, 8)

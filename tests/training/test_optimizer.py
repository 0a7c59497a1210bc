"""Schedules and optimizers against their formulas, computed in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config import base_config, validate
from vit_jax.errors import UserError
from vit_jax.training.optimizer import make_optimizer, make_schedule

pytestmark = pytest.mark.core


def configure(**settings):
    """`optimizer_name` sets `optimizer.name`, and so on; no decay of the rate unless asked."""
    config = base_config()
    config.total_steps = 10_000
    config.optimizer.learning_rate = 0.03
    config.schedule.name = "constant"
    for key, value in settings.items():
        section, _, name = key.partition("_")
        config[section][name] = value
    return validate(config)


def rates(steps, total_steps=10_000, **settings):
    schedule = make_schedule(configure(**settings), total_steps)
    return [float(jax.jit(schedule)(jnp.int32(step))) for step in steps]


@pytest.mark.parametrize("name, end, expected", [
    ("cosine", 0.0, {0: 0, 1: 6e-5, 250: 0.015, 500: 0.03, 5250: 0.015, 10_000: 0}),
    ("linear", 1e-5, {0: 0, 1: 6e-5, 250: 0.015, 500: 0.03, 5250: 0.015005, 10_000: 1e-5}),
])
def test_the_values_of_googles_code(name, end, expected):
    """10,000 steps, 500 of warmup, peak 0.03, as in the fine-tuning recipes of the paper's code."""
    ours = rates(expected, schedule_name=name, schedule_warmup_steps=500, schedule_end_value=end)
    np.testing.assert_allclose(ours, list(expected.values()), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("name", ["cosine", "linear", "rsqrt", "constant"])
def test_schedules_against_their_formulas(name, warmup):
    total, peak, end, timescale = 100, 0.2, 0.02, 7
    steps = np.arange(total + 1)
    progress = np.clip((steps - warmup) / (total - warmup), 0, 1)
    decay = {
        "cosine": end + (peak - end) * 0.5 * (1 + np.cos(np.pi * progress)),
        "linear": end + (peak - end) * (1 - progress),
        "rsqrt": peak / np.sqrt(1 + np.maximum(steps - warmup, 0) / timescale),
        "constant": np.full(total + 1, peak),
    }[name]
    growth = np.minimum(1, steps / warmup) if warmup else 1
    ours = rates(
        steps, total, schedule_name=name, schedule_warmup_steps=warmup, schedule_end_value=end,
        schedule_timescale=timescale, optimizer_learning_rate=peak)
    np.testing.assert_allclose(ours, np.where(steps < warmup, peak, decay) * growth, rtol=1e-5)


def test_a_timescale_beyond_32_bits():
    ours = rates([0, 5], schedule_name="rsqrt", schedule_timescale=3_000_000_000)
    assert ours == pytest.approx([0.03, 0.03])


def test_a_schedule_without_warmup_starts_at_the_peak():
    """Not at zero: the first update would be lost."""
    assert rates([0], schedule_warmup_steps=0) == pytest.approx([0.03])
    assert rates([0, 1], schedule_warmup_steps=1) == pytest.approx([0.0, 0.03])


@pytest.mark.parametrize("warmup", [10, 11])
def test_a_warmup_that_leaves_no_steps(warmup):
    with pytest.raises(UserError, match=f"warmup_steps={warmup} leaves no step of the 10"):
        rates([0], total_steps=10, schedule_warmup_steps=warmup)
    rates([0], total_steps=12, schedule_warmup_steps=warmup)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("name", ["rsqrt", "constant"])
def test_cooldown(name, warmup):
    """The last 20 of 100 updates lead in a straight line from where the decay is to zero, which
    update 101 would have: the last one still moves the weights."""
    settings = dict(schedule_name=name, schedule_warmup_steps=warmup, schedule_timescale=7,
                    optimizer_learning_rate=0.2)
    without = rates(range(101), 100, **settings)
    ours = rates(range(101), 100, schedule_cooldown_steps=20, **settings)
    # Two programs, in which XLA may divide by a square root in other ways: an ulp or two (6e-8).
    np.testing.assert_allclose(ours[:81], without[:81], rtol=1e-6)
    np.testing.assert_allclose(
        ours[80:], without[80] * np.linspace(1, 0, 21), rtol=1e-5, atol=1e-8)
    reached = {"rsqrt": 0.2 / (1 + (80 - warmup) / 7) ** 0.5, "constant": 0.2}[name]
    assert ours[90] == pytest.approx(reached / 2, rel=1e-5)


@pytest.mark.parametrize("settings, message", [
    (dict(schedule_name="cosine", schedule_cooldown_steps=2),
     r"cooldown_steps=2 is for schedules without an end, .* config\.schedule\.name='cosine'"),
    (dict(schedule_name="linear", schedule_cooldown_steps=2), "schedules without an end"),
    (dict(schedule_name="rsqrt", schedule_warmup_steps=4, schedule_cooldown_steps=6),
     "warmup_steps=4 with cooldown_steps=6 leaves no step of the 10"),
    (dict(schedule_cooldown_steps=10), "cooldown_steps=10 leaves no step of the 10"),
])
def test_cooldowns_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        rates([0], total_steps=10, **settings)
    rates([0], total_steps=11, schedule_warmup_steps=4, schedule_cooldown_steps=6)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_decay_does_not_end_above_its_peak(name):
    with pytest.raises(UserError, match=r"end_value=0\.1 is above config\.optimizer\.learning_rat"):
        rates([0], schedule_name=name, schedule_end_value=0.1)
    level = rates([0, 9_999], schedule_name=name, schedule_end_value=0.03)
    assert level == pytest.approx([0.03, 0.03])
    assert rates([5], schedule_name=name, optimizer_learning_rate=0.0) == [0.0]  # not 0 / 0
    rates([0], schedule_name="constant", schedule_end_value=0.1)  # which has no end


# Two kernels, and three parameters that must not decay.
SHAPES = {
    "embedding": {"kernel": (2, 3), "bias": (3,)},
    "Transformer": {"encoder_norm": {"scale": (3,)}},
    "head": {"kernel": (3, 2), "kernel_scale": (2,)},
}
KERNELS = ("embedding/kernel", "head/kernel")


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32), SHAPES,
        is_leaf=lambda x: isinstance(x, tuple))


def by_path(params):
    return {"/".join(key.key for key in path): np.asarray(leaf, np.float64)
            for path, leaf in jax.tree.flatten_with_path(params)[0]}


def run(config, gradients):
    """Parameters after the updates, and the optimizer's state."""
    params = tree(0)
    optimizer = make_optimizer(config, make_schedule(config, 100), params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return by_path(params), state


def formula(config, gradients):
    """The same in NumPy, parameter by parameter."""
    o, result = config.optimizer, {}
    schedule = make_schedule(config, 100)
    for path, w in by_path(tree(0)).items():
        m = v = np.zeros_like(w)
        for t, gradient in enumerate(gradients):
            g = by_path(gradient)[path]
            if o.clip_norm is not None:
                norm = np.sqrt(sum((x**2).sum() for x in by_path(gradient).values()))
                g = g * min(1, o.clip_norm / norm)
            if o.name == "sgd":
                m = direction = o.momentum * m + g
            elif o.name == "adafactor":  # all too small to factor; see test_adafactor.py
                decay = min(0.999, 1 - (t + 1) ** -0.8)
                v = decay * v + (1 - decay) * (g**2 + 1e-30)
                m = direction = o.momentum * m + (1 - o.momentum) * g / np.sqrt(v)
            else:
                m = o.beta1 * m + (1 - o.beta1) * g
                v = o.beta2 * v + (1 - o.beta2) * g**2
                direction = (m / (1 - o.beta1 ** (t + 1))) / (
                    np.sqrt(v / (1 - o.beta2 ** (t + 1))) + o.epsilon)
            decay = o.weight_decay * w if path in KERNELS else 0
            w = w - float(schedule(t)) * (direction + decay)
        result[path] = w
    return result


@pytest.mark.parametrize("settings", [
    dict(optimizer_name="sgd"),
    dict(optimizer_name="sgd", optimizer_momentum=0.0),
    dict(optimizer_name="sgd", optimizer_momentum=0.5, optimizer_weight_decay=0.3),
    dict(optimizer_name="sgd", optimizer_clip_norm=1.0, optimizer_weight_decay=0.3),
    dict(optimizer_name="adam", optimizer_beta1=0.8, optimizer_beta2=0.95),
    dict(optimizer_name="adam", optimizer_epsilon=0.1),
    dict(optimizer_name="adafactor", optimizer_weight_decay=0.3, optimizer_clip_norm=1.0),
    dict(optimizer_name="adafactor", optimizer_momentum=0.0),
    dict(optimizer_name="adamw", optimizer_weight_decay=0.3),
    dict(optimizer_name="adamw", optimizer_weight_decay=0.3, optimizer_clip_norm=0.01),
    dict(optimizer_name="adamw", optimizer_weight_decay=0.3, schedule_name="linear",
         schedule_warmup_steps=3),
], ids=str)
def test_updates_against_their_formulas(settings):
    """Decay is of kernels only, is not part of the moments, and is multiplied by the rate."""
    config = configure(**settings)
    gradients = [tree(seed, scale=seed) for seed in (1, 2, 3, 4)]
    ours, theirs = run(config, gradients)[0], formula(config, gradients)
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=2e-5, atol=1e-6, err_msg=path)


def test_decay_alone():
    """Without a gradient kernels shrink by rate * decay and nothing else moves."""
    zero = jax.tree.map(jnp.zeros_like, tree(0))
    after, _ = run(configure(optimizer_weight_decay=0.5, optimizer_learning_rate=0.1), [zero])
    for path, before in by_path(tree(0)).items():
        factor = 0.95 if path in KERNELS else 1.0
        np.testing.assert_allclose(after[path], factor * before, rtol=1e-6, err_msg=path)


def test_gradients_below_the_clipping_norm_are_left_alone():
    small = [tree(1, scale=1e-3)]
    settings = dict(optimizer_name="sgd")
    clipped = run(configure(**settings, optimizer_clip_norm=1.0), small)[0]
    for path, value in run(configure(**settings), small)[0].items():
        np.testing.assert_array_equal(clipped[path], value)


@pytest.mark.parametrize("name, moment", [("sgd", "trace"), ("adamw", "mu"), ("adafactor", "ema")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stored_first_moment(name, moment, dtype):
    """bfloat16 saves memory in the state alone: the update is still made in float32."""
    gradients = [tree(1), tree(2)]
    config = configure(optimizer_name=name, optimizer_momentum_dtype=dtype)
    ours, state = run(config, gradients)
    stored = jax.tree.leaves(optax.tree.get(state, moment))
    assert len(stored) == 5 and {str(x.dtype) for x in stored} == {dtype}
    second = optax.tree.get(state, "nu")
    assert {str(x.dtype) for x in jax.tree.leaves(second)} <= {"float32"}
    exact = formula(config, gradients)
    worst = max(np.abs(ours[path] - exact[path]).max() for path in ours)
    assert worst < 1e-5 if dtype == "float32" else 1e-6 < worst < 1e-3


def test_frozen_parameters():
    """They stay, need no memory in the optimizer, and do not use up the clipping norm."""
    settings = dict(optimizer_weight_decay=0.3, optimizer_clip_norm=0.5, optimizer_name="sgd")
    config = configure(**settings, optimizer_frozen=("^embedding/", "norm"))
    gradients = [tree(1), tree(2)]
    after, state = run(config, gradients)
    frozen = [path for path in after if "embedding" in path or "norm" in path]
    assert len(frozen) == 3
    for path in frozen:
        np.testing.assert_array_equal(after[path], by_path(tree(0))[path])
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 3 * 2 + 2  # momentum of `head`

    without = [gradient | {"embedding": jax.tree.map(jnp.zeros_like, gradient["embedding"]),
                           "Transformer": jax.tree.map(jnp.zeros_like, gradient["Transformer"])}
               for gradient in gradients]
    expected = formula(configure(**settings), without)
    for path in set(after) - set(frozen):
        np.testing.assert_allclose(after[path], expected[path], rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("frozen, message", [
    (("embeding",), r"'embeding' matches no parameter; their paths look like Transformer/encoder_"),
    (("^head", "^kernel"), r"'\^kernel' matches no parameter"),
    (("head(",), r"'head\(' is not a regular expression: .*position 4"),
    (("head", "embedding", "Transformer"), "matches every parameter; nothing would train"),
    ((".",), "matches every parameter"),
])
def test_patterns_that_cannot_be_meant(frozen, message):
    config = configure(optimizer_frozen=frozen)
    with pytest.raises(UserError, match=message):
        make_optimizer(config, make_schedule(config, 100), tree(0))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("frozen", [(), ("encoderblock_?1?/",), ("encoderblock",)])
def test_layer_decay_counts_frozen_blocks(frozen, stacked):
    """The embedding has three layers behind it and the head none, whichever of them train."""
    blocks = {"encoderblock": {"kernel": jnp.ones((2, 3))}} if stacked else {
        f"encoderblock_{i}": {"kernel": jnp.ones(3)} for i in range(2)}
    params = {"embedding": {"kernel": jnp.ones(3)}, "head": {"kernel": jnp.ones(3)},
              "patch_head": {"kernel": jnp.ones(3)}, "Transformer": blocks}
    config = configure(optimizer_name="sgd", optimizer_layer_decay=0.5, optimizer_frozen=frozen,
                       optimizer_momentum=0.0, optimizer_clip_norm=None)
    optimizer = make_optimizer(config, make_schedule(config, 10), params)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params),
                                  params)
    np.testing.assert_allclose(updates["embedding"]["kernel"], -0.03 * 0.5**3, rtol=1e-6)
    for head in ("head", "patch_head"):
        np.testing.assert_allclose(updates[head]["kernel"], -0.03, rtol=1e-6)

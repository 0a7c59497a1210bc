"""The train step is the same function on one device, eight, under pmap and in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import equations, named
from tiny import make_tiny_config
from tiny_steps import SIZE, build, compile_run, follow, make_batch, random_state, run

from vit_jax.config import validate
from vit_jax.models.scan import unstack_blocks
from vit_jax.training.optimizer import make_schedule
from vit_jax.training.state import build_model, make_init
from vit_jax.training.step import (
    flip,
    make_eval_step,
    make_loss_sum,
    make_train_step,
    normalize,
)


@pytest.fixture(scope="module")
def begin():
    """What `init` returns, on the host."""
    return jax.device_get(jax.jit(build(validate(make_tiny_config()))[1])())


@pytest.fixture(scope="module")
def reference(begin):
    """One device, all defaults; the configs of the tests differ from it in single keys."""
    return run(make_tiny_config(), devices=1, state=begin)


@pytest.mark.core
@pytest.mark.parametrize("settings", [
    dict(),
    {"mesh.fsdp": 8},
    {"mesh.fsdp": 2, "mesh.tensor": 2},
    {"parallelism": "pmap"},
    {"accumulation_steps": 2},
    {"accumulation_steps": 2, "parallelism": "pmap"},
    {"model.scan_layers": True, "model.remat": "full", "mesh.fsdp": 2},
    {"model.scan_layers": True, "model.scan_unroll": True},
    {"model.scan_layers": True, "model.scan_unroll": True, "mesh.fsdp": 2, "mesh.tensor": 2},
], ids=str)
def test_same_losses_on_eight_devices(tiny_config, begin, reference, settings):
    """SGD without dropout: float32 rounding is all that may differ (four steps, losses ~2.3)."""
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (tiny_config[section] if section else tiny_config)[name] = value
    # The last one begins with its own state, made in shards and grouped: with the same numbers.
    losses, state = run(tiny_config, state=None if len(settings) == 4 else begin)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    assert state.step == 4
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5),
                 *(unstack_blocks(jax.device_get(s.params)) for s in (state, reference[1])))


@pytest.mark.parametrize("parallelism", ["jit", "pmap"])
def test_the_step_is_compiled_once(tiny_config, begin, parallelism, caplog):
    """For the state that a run begins with as for those that the step returns."""
    tiny_config.parallelism = parallelism
    step, state, _ = compile_run(tiny_config, state=begin)
    with jax.log_compiles():
        follow(step, state, steps=3)
    assert len([line for line in caplog.messages if "Finished XLA compilation" in line]) == 1


@pytest.mark.core
def test_the_losses_change(reference):
    """The comparison above would not notice a step that does nothing."""
    assert len({round(loss, 4) for loss in reference[0]}) == 4


def test_accumulation_equals_the_full_batch_with_masked_images(tiny_config):
    """The mean is over the valid images of the whole batch, not a mean of the parts' means."""
    tiny_config.model.num_layers = 1
    follow = functools.partial(
        run, tiny_config, devices=2, state=random_state(build(validate(tiny_config))[1]),
        invalid=(0, 1, 2, 4, 6, 9))  # unevenly spread over the two strided parts
    whole = follow()
    tiny_config.accumulation_steps = 2
    parts = follow()
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(parts[1].params), jax.tree.leaves(whole[1].params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.core
def test_what_only_frozen_parameters_need_is_not_computed(tiny_config):
    """With the head alone there are but its own products behind the forward pass."""
    products = []
    for frozen in ((), ("^(?!head/)",), ("encoderblock_0",)):
        tiny_config.optimizer.frozen = frozen
        make_step, init = build(validate(tiny_config))
        products.append(len(named(equations(
            make_step(axis_name=None), jax.eval_shape(init), make_batch(0)), "dot_general")))
    everything, head, part = products
    assert head < part < everything and head < 0.4 * everything


def test_what_is_frozen_has_no_part_in_the_norm(tiny_config):
    tiny_config.model.num_layers = 1
    norms = []
    for frozen in ((), ("^(?!head/)",)):
        tiny_config.optimizer.frozen = frozen
        make_step, init = build(validate(tiny_config))
        _, metrics = jax.jit(make_step(axis_name=None))(random_state(init), make_batch(0))
        norms.append(float(metrics["grad_norm"]))
    assert 0 < norms[1] < norms[0]


def test_masked_images_do_not_count(tiny_config):
    tiny_config.model.num_layers = 1
    make_step, init = build(validate(tiny_config))
    state, step = random_state(init), jax.jit(make_step(axis_name=None))
    batch = make_batch(0, invalid=(3, 7))
    garbled = batch | {"image": batch["image"].copy(), "label": batch["label"].copy()}
    garbled["image"][[3, 7]] = 255
    garbled["label"][[3, 7]] = 1
    first, second = step(state, batch), step(state, garbled)
    assert float(first[1]["loss"]) == float(second[1]["loss"])
    jax.tree.map(np.testing.assert_array_equal, first[0].params, second[0].params)
    # ... and a batch of nothing but bad images is a step without a gradient, not a NaN.
    empty = batch | {"mask": np.zeros(16, bool)}
    after, metrics = step(state, empty)
    assert float(metrics["loss"]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_dropout_differs_by_step_part_and_seed(tiny_config):
    """The reference code drew the same masks for every accumulated part."""
    tiny_config.model.num_layers = 1
    tiny_config.model.dropout_rate = 0.5
    tiny_config.optimizer.learning_rate = 0.0  # so that only the masks can change the loss
    state = random_state(build(validate(tiny_config))[1])
    one = make_batch(0, rows=2)
    twice = {k: np.concatenate([v[:1], v[:1]]) for k, v in one.items()}

    def compiled(**settings):
        tiny_config.update(settings)
        return jax.jit(build(validate(tiny_config))[0](axis_name=None))

    def losses(step):
        first, m1 = step(state, twice)
        _, m2 = step(first, twice)
        return float(m1["loss"]), float(m2["loss"])

    step = compiled()
    base = losses(step)
    assert base[0] != base[1]
    assert losses(step) == base
    assert losses(compiled(seed=1))[0] != base[0]
    # Two parts of the same image: with shared masks the loss would be that of one image alone.
    assert losses(compiled(seed=0, accumulation_steps=2))[0] != pytest.approx(base[0], rel=1e-6)


def test_learning_rate_metric_is_the_applied_one(tiny_config):
    tiny_config.model.num_layers = 1
    tiny_config.schedule.name = "linear"
    tiny_config.schedule.warmup_steps = 2
    config = validate(tiny_config)
    model = build_model(config, 10, SIZE)
    schedule = make_schedule(config, 10)
    optimizer = optax.scale_by_learning_rate(schedule)
    state = random_state(make_init(model, optimizer, SIZE, 0))
    step = jax.jit(make_train_step(make_loss_sum(model, config), optimizer, schedule, config))
    distance = jax.jit(lambda a, b: optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))
    for i in range(4):
        before = state
        state, metrics = step(state, make_batch(i))
        np.testing.assert_allclose(distance(state.params, before.params),
                                   metrics["learning_rate"] * metrics["grad_norm"], rtol=1e-3)


def test_normalize_and_flip():
    images = np.arange(2 * 1 * 3 * 1, dtype=np.uint8).reshape(2, 1, 3, 1)
    assert flip(images, np.array([False, True])).ravel().tolist() == [0, 1, 2, 5, 4, 3]
    np.testing.assert_allclose(
        normalize(jnp.array([0, 255], jnp.uint8)), [-1.0, 1.0], atol=1e-7)


@pytest.mark.core
def test_eval_step_against_numpy(tiny_config):
    tiny_config.loss.label_smoothing = 0.1  # which only training's loss contains
    config = validate(tiny_config)
    model = build_model(config, 10, SIZE)
    params = random_state(build(config)[1]).params
    batch = make_batch(0)
    logits = np.asarray(jax.jit(lambda images: model.apply(
        {"params": params}, normalize(images), train=False))(batch["image"]), np.float64)
    out = jax.jit(make_eval_step(model, config))(params, batch)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        out["loss"], -log_probabilities[np.arange(16), batch["label"]], rtol=1e-5)
    assert out["prediction"].tolist() == logits.argmax(-1).tolist()
    ranks = (logits > logits[np.arange(16), batch["label"]][:, None]).sum(-1)
    assert out["in_top5"].tolist() == (ranks < 5).tolist()

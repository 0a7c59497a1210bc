"""The train step is the same function on one device, eight, under pmap and in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import equations, named
from tiny import make_tiny_config
from tiny_steps import SIZE, build, make_batch, run

from vit_jax.config import validate
from vit_jax.models.scan import unstack_blocks
from vit_jax.models.shapes import params_shapes
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.state import build_model, make_init
from vit_jax.training.step import (
    flip,
    make_eval_step,
    make_loss_sum,
    make_train_step,
    normalize,
)


@pytest.fixture(scope="module")
def reference():
    """One device, all defaults; the configs of the tests differ from it in single keys."""
    return run(make_tiny_config(), devices=1)


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
def test_same_losses_on_eight_devices(tiny_config, reference, settings):
    """SGD without dropout: float32 rounding is all that may differ (four steps, losses ~2.3)."""
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (tiny_config[section] if section else tiny_config)[name] = value
    if "model.remat" in settings:  # a loop begins with other parameters: compare with one device
        reference = run(tiny_config, devices=2)
    losses, state = run(tiny_config)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    assert state.step == 4
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5),
                 *(unstack_blocks(jax.device_get(s.params)) for s in (state, reference[1])))


@pytest.mark.core
def test_the_losses_change(reference):
    """The comparison above would not notice a step that does nothing."""
    assert len({round(loss, 4) for loss in reference[0]}) == 4


def test_accumulation_equals_the_full_batch_with_masked_images(tiny_config):
    """The mean is over the valid images of the whole batch, not a mean of the parts' means."""
    invalid = (0, 1, 2, 4, 6, 9)  # unevenly spread over the two strided parts
    whole = run(tiny_config, devices=2, invalid=invalid)
    tiny_config.accumulation_steps = 2
    parts = run(tiny_config, devices=2, invalid=invalid)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(parts[1].params), jax.tree.leaves(whole[1].params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.core
def test_what_only_frozen_parameters_need_is_not_computed(tiny_config):
    """With the head alone there are but its own products behind the forward pass; and what is not
    trained has no part in the norm."""
    found = {}
    for frozen in ((), ("^(?!head/)",), ("encoderblock_0",)):
        tiny_config.optimizer.frozen = frozen
        make_step, init = build(validate(tiny_config))
        products = named(equations(make_step(axis_name=None), jax.eval_shape(init), make_batch(0)),
                         "dot_general")
        _, metrics = jax.jit(make_step(axis_name=None))(jax.jit(init)(), make_batch(0))
        found[frozen] = len(products), float(metrics["grad_norm"])
    (everything, norm), (head, head_norm), (part, _) = found.values()
    assert head < part < everything and head < 0.4 * everything
    assert head_norm <= norm


def test_masked_images_do_not_count(tiny_config):
    config = validate(tiny_config)
    model = build_model(config, 10, SIZE)
    schedule = make_schedule(config, 10)
    optimizer = make_optimizer(config, schedule, params_shapes(model, SIZE))
    state = jax.jit(make_init(model, optimizer, SIZE, 0))()
    step = jax.jit(make_train_step(make_loss_sum(model, config), optimizer, schedule, config))
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
    tiny_config.model.dropout_rate = 0.5
    tiny_config.optimizer.learning_rate = 0.0  # so that only the masks can change the loss
    model = build_model(validate(tiny_config), 10, SIZE)
    schedule = make_schedule(tiny_config, 10)
    optimizer = make_optimizer(tiny_config, schedule, params_shapes(model, SIZE))
    state = jax.jit(make_init(model, optimizer, SIZE, 0))()
    head = jax.random.normal(jax.random.key(1), state.params["head"]["kernel"].shape)
    state = state.replace(params=state.params | {"head": {"kernel": head, "bias": jnp.zeros(10)}})
    one = make_batch(0, rows=2)
    twice = {k: np.concatenate([v[:1], v[:1]]) for k, v in one.items()}

    def losses(**settings):
        tiny_config.update(settings)
        config = validate(tiny_config)
        step = jax.jit(make_train_step(make_loss_sum(model, config), optimizer, schedule, config))
        first, m1 = step(state, twice)
        _, m2 = step(first, twice)
        return float(m1["loss"]), float(m2["loss"])

    base = losses()
    assert base[0] != base[1]
    assert losses() == base
    assert losses(seed=1)[0] != base[0]
    # Two parts of the same image: with shared masks the loss would be that of one image alone.
    assert losses(seed=0, accumulation_steps=2)[0] != pytest.approx(base[0], rel=1e-6)


def test_learning_rate_metric_is_the_applied_one(tiny_config):
    tiny_config.schedule.name = "linear"
    tiny_config.schedule.warmup_steps = 2
    config = validate(tiny_config)
    model = build_model(config, 10, SIZE)
    schedule = make_schedule(config, 10)
    optimizer = optax.scale_by_learning_rate(schedule)
    state = jax.jit(make_init(model, optimizer, SIZE, 0))()
    step = jax.jit(make_train_step(make_loss_sum(model, config), optimizer, schedule, config))
    for i in range(4):
        before = state
        state, metrics = step(state, make_batch(i))
        moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before.params))
        np.testing.assert_allclose(
            moved, metrics["learning_rate"] * metrics["grad_norm"], rtol=1e-3)


def test_normalize_and_flip():
    images = np.arange(2 * 1 * 3 * 1, dtype=np.uint8).reshape(2, 1, 3, 1)
    assert flip(images, np.array([False, True])).ravel().tolist() == [0, 1, 2, 5, 4, 3]
    np.testing.assert_allclose(
        normalize(jnp.array([0, 255], jnp.uint8)), [-1.0, 1.0], atol=1e-7)


@pytest.mark.core
def test_eval_step_against_numpy(tiny_config):
    config = validate(tiny_config)
    model = build_model(config, 10, SIZE)
    params = model.init(jax.random.key(0), jnp.zeros((1, *SIZE, 3)), train=False)["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 10))
    batch = make_batch(0)
    logits = np.asarray(
        model.apply({"params": params}, normalize(batch["image"]), train=False), np.float64)
    out = jax.jit(make_eval_step(model, config))(params, batch)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        out["loss"], -log_probabilities[np.arange(16), batch["label"]], rtol=1e-5)
    assert out["prediction"].tolist() == logits.argmax(-1).tolist()
    ranks = (logits > logits[np.arange(16), batch["label"]][:, None]).sum(-1)
    assert out["in_top5"].tolist() == (ranks < 5).tolist()

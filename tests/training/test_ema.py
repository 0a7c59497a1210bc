"""Averaged weights: their formula, on several layouts of devices and parameters, and saved."""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_tiny_config
from tiny_steps import build, compile_run, make_batch

from vit_jax.config import validate
from vit_jax.errors import UserError
from vit_jax.models.scan import unstack_blocks
from vit_jax.training import partition
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.state import TrainState
from vit_jax.training.step import moving_average


def configure(**settings):
    """decay 0.3: the first two updates use the shorter averages 2/11 and 3/12."""
    config = make_tiny_config()
    config.ema_decay = 0.3
    config.model.num_layers = 1
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    return config


def follow(step, state, first, last):
    """States after steps first + 1 to last, on the host, and the last one where it was."""
    states = []
    for i in range(first, last):
        state, _ = step(state, make_batch(i))
        states.append(jax.device_get(state))
    return states, state


def assert_averaged(start, states):
    """Every ema_params is the weighted sum of the parameters so far, in float64."""
    expected = jax.tree.map(np.float64, start)
    for update, state in enumerate(states, 1):
        decay = min(0.3, (1 + update) / (10 + update))
        expected = jax.tree.map(
            lambda e, p, d=decay: d * e + (1 - d) * p, expected, state.params)
        for ours, theirs in zip(
            jax.tree.leaves(state.ema_params), jax.tree.leaves(expected), strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("parallelism", ["jit", "pmap"])
def test_five_updates_from_given_weights(parallelism):
    """As train.py starts from a checkpoint: both trees are put in place from the same arrays."""
    config = configure(parallelism=parallelism, optimizer__frozen=("^embedding/",))
    step, state, shardings = compile_run(config, devices=8 if parallelism == "pmap" else 1)
    start = jax.tree.map(lambda x: np.array(x) + np.float32(0.01), state.params)
    kept = jax.tree.map(np.copy, start)
    state = state.replace(params=jax.device_put(start, shardings.params),
                          ema_params=jax.device_put(start, shardings.params))
    states, _ = follow(step, state, 0, 5)
    assert_averaged(kept, states)
    jax.tree.map(np.testing.assert_array_equal, start, kept)  # the step took copies
    frozen = states[-1].ema_params["embedding"]["kernel"]
    np.testing.assert_allclose(frozen, kept["embedding"]["kernel"], rtol=1e-6)
    moved = states[-1].params["head"]["bias"] - states[-1].ema_params["head"]["bias"]
    assert np.abs(moved).max() > 1e-4


def test_interrupted_and_continued(tmp_path, monkeypatch):
    """Sharded parameters, stacked blocks, Adam's moments: bit for bit as without the interruption.
    On disk the blocks are unstacked."""
    config = configure(mesh__fsdp=8, model__scan_layers=True, model__num_layers=2,
                       optimizer__name="adamw", optimizer__learning_rate=1e-3)
    step, state, shardings = compile_run(config)
    shapes = jax.eval_shape(lambda: state)
    start = jax.device_get(state.params)
    states, middle = follow(step, state, 0, 3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, middle, {})
    checkpoints.wait()
    more, _ = follow(step, middle, 3, 5)
    assert_averaged(start, states + more)

    on_disk, expected = checkpoints.restore_arrays(3), unstack_blocks(states[-1])
    jax.tree.map(np.testing.assert_array_equal, on_disk["ema_params"], expected.ema_params)
    for moments in zip(*map(jax.tree.leaves, (on_disk["opt_state"], expected.opt_state)),
                       strict=True):
        np.testing.assert_array_equal(*moments)
    assert "encoderblock_1" in on_disk["ema_params"]["Transformer"]
    read, asked = checkpoints._restore_state, []
    monkeypatch.setattr(
        checkpoints, "_restore_state", lambda step, state: asked.append(state) or read(step, state))
    again = checkpoints.restore(3, shapes, shardings)
    checkpoints.close()
    assert jax.tree.map(lambda x: x.sharding, again) == shardings
    # No device has to hold more of it while it is read than afterwards.
    block = asked[0]["params"]["Transformer"]["encoderblock_1"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert math.prod(block.sharding.shard_shape(block.shape)) * 8 == math.prod(block.shape)
    continued, _ = follow(step, again, 3, 5)
    jax.tree.map(np.testing.assert_array_equal, continued, more)


def test_they_lie_where_their_parameters_lie():
    config = validate(configure(mesh__fsdp=2, mesh__tensor=2))
    shapes = jax.eval_shape(build(config)[1])
    shardings, notes = partition.state_shardings(shapes, partition.make_mesh(config))
    assert notes == []
    assert shardings.ema_params == shardings.params
    assert any("fsdp" in s.spec for s in jax.tree.leaves(shardings.ema_params))


def test_without_averages_nothing_is_stored(tmp_path):
    """And a run from before the field existed continues."""
    init = build(validate(configure(ema_decay=None)))[1]
    shapes = jax.eval_shape(init)
    assert shapes.ema_params is None

    @flax.struct.dataclass
    class OldState:
        step: jax.Array
        params: dict
        opt_state: tuple

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for folder, make in (("new", TrainState), ("old", OldState)):
        tree = {"Transformer": {"scale": jnp.arange(3.0)}}
        checkpoints = Checkpoints(tmp_path / folder)
        checkpoints.save(1, make(step=jnp.int32(1), params=tree, opt_state=(tree,)), {})
        checkpoints.wait()
        assert set(checkpoints.restore_arrays(1)) == {"step", "params", "opt_state"}
        state = jax.eval_shape(lambda tree=tree: TrainState(jnp.int32(0), tree, (tree,)))
        restored = checkpoints.restore(1, state, jax.tree.map(lambda _: sharding, state))
        checkpoints.close()
        assert isinstance(restored, TrainState) and restored.ema_params is None
        np.testing.assert_array_equal(restored.params["Transformer"]["scale"], [0, 1, 2])


def test_a_long_average_keeps_moving():
    """In float32 the factor 0.999999 is itself rounded, and 1 minus it would be 1.3% off."""
    after = moving_average({"w": jnp.zeros(3)}, {"w": jnp.ones(3)}, 0.999999, jnp.int32(10**8))
    np.testing.assert_allclose(after["w"], 1e-6, rtol=1e-5)


def test_a_decay_of_zero_is_refused():
    with pytest.raises(UserError, match=r"config\.ema_decay=0 would average nothing; use none"):
        validate(configure(ema_decay=0.0))

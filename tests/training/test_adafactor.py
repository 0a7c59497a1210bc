"""Adafactor against its paper in float64, optax and transformers; sharded, stacked and saved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny import make_tiny_config
from tiny_steps import compile_run, follow, make_batch

from vit_jax.config import base_config, validate
from vit_jax.models.scan import stack_blocks, unstack_blocks
from vit_jax.training.adafactor import AdafactorState, Factors, scale_by_adafactor
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.optimizer import make_optimizer, make_schedule

core = pytest.mark.core
# (shape, the axes whose moments are factored)
MATRIX, WIDE, HEADS = ((40, 50), (0, 1)), ((50, 32), (0, 1)), ((40, 2, 33), (0, 2))
VECTOR, NARROW, CONV = ((50,), None), ((40, 31), None), ((4, 4, 3, 40), None)
STEPS = 6


def gradients(shape, seed=0):
    """Of very different sizes, with a row of zeros as under a head that starts at zero."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=shape))
    result = [rng.normal(size=shape) * scale for _ in range(STEPS)]
    result[0][0] = 0
    return [g.astype(np.float32) for g in result]


def paper(grads, axes, start=0):
    """Algorithm 4 of arXiv 1804.04235 with decay 1 - t^-0.8, capped at 0.999; no clipping."""
    second, directions = None, []
    for t, g in enumerate(np.float64(grads), start + 1):
        decay = min(0.999, 1 - t**-0.8)
        squares = g**2 + 1e-30
        new = [squares] if axes is None else [squares.sum(axis, keepdims=True) for axis in axes]
        second = new if second is None else [
            decay * old + (1 - decay) * x for old, x in zip(second, new, strict=True)]
        if axes is None:
            v = second[0]
        else:  # R C / (1 R), per slice over the other axes
            v = second[0] * second[1] / second[0].sum(axes[1], keepdims=True)
        directions.append(g / np.sqrt(v))
    return directions


def directions(transformation, grads, state=None):
    params = {"w": jnp.zeros(grads[0].shape)}
    state = transformation.init(params) if state is None else state
    update, result = jax.jit(transformation.update), []
    for g in grads:
        out, state = update({"w": jnp.asarray(g)}, state, params)
        result.append(out["w"])
    return result, state


@core
@pytest.mark.parametrize("shape, axes", [MATRIX, WIDE, HEADS, VECTOR, NARROW, CONV], ids=str)
def test_against_the_paper(shape, axes):
    grads = gradients(shape)
    ours, state = directions(scale_by_adafactor(), grads)
    for got, expected in zip(ours, paper(grads, axes), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
    stored = sum(x.size for x in jax.tree.leaves(state.nu))
    whole = np.prod(shape)
    assert stored == (whole if axes is None else sum(whole // shape[axis] for axis in axes))


@core
def test_against_optax_as_big_vision_calls_it():
    def decay(step, power):
        return jnp.minimum(0.999, 1 - (step + 1.0) ** -power)

    theirs = optax.scale_by_factored_rms(min_dim_size_to_factor=32, decay_rate_fn=decay)
    for shape, _ in (MATRIX, HEADS, VECTOR):
        grads = gradients(shape)
        for a, b in zip(*(directions(x, grads)[0] for x in (scale_by_adafactor(), theirs)),
                        strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@core
def test_the_decay_is_capped():
    """At update 10,001 the paper's 1 - t^-0.8 would be 0.9994."""
    grad = np.full((50,), 2.0, np.float32)
    before = AdafactorState(jnp.int32(10_000), {"w": jnp.ones(50)})
    _, after = directions(scale_by_adafactor(), [grad], before)
    np.testing.assert_allclose(after.nu["w"], 0.999 + 0.001 * 4, rtol=1e-6)
    assert after.count == 10_001


def test_against_transformers():
    """With momentum, decoupled decay and the learning rate, as a run has them."""
    torch = pytest.importorskip("torch_shim").torch
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.optimization import Adafactor

    config = base_config()
    config.total_steps = 10
    config.schedule.name = "constant"
    config.optimizer.name = "adafactor"
    config.optimizer.learning_rate = 0.03
    config.optimizer.weight_decay = 0.2
    config = validate(config)
    rng = np.random.default_rng(1)
    for shape in (MATRIX[0], VECTOR[0]):
        start = rng.normal(size=shape).astype(np.float32)
        params = {"kernel": jnp.asarray(start)}
        optimizer = make_optimizer(config, make_schedule(config, 10), params)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        weight = torch.nn.Parameter(torch.tensor(start))
        theirs = Adafactor(
            [weight], lr=0.03, weight_decay=0.2, beta1=0.9, decay_rate=-0.8, eps=(1e-30, 1e-3),
            clip_threshold=1e9, scale_parameter=False, relative_step=False)
        for g in gradients(shape):
            updates, state = update({"kernel": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
            weight.grad = torch.tensor(g)
            theirs.step()
        np.testing.assert_allclose(params["kernel"], weight.detach(), rtol=2e-5, atol=1e-6)


@core
def test_stacked_blocks_are_blocks():
    """40 layers, so that the layer axis is long enough to be mistaken for one of a matrix."""
    rng = np.random.default_rng(0)
    loop = {"Transformer": {f"encoderblock_{i}": {
        "kernel": rng.normal(size=(33, 36)).astype(np.float32),
        "scale": rng.normal(size=36).astype(np.float32)} for i in range(40)}}
    adafactor = scale_by_adafactor()
    ours, expected = {}, {}
    for tree, result in ((stack_blocks(loop), ours), (loop, expected)):
        state = adafactor.init(tree)
        for _ in range(2):
            result["direction"], state = jax.jit(adafactor.update)(tree, state)
        result["state"] = state
    assert isinstance(ours["state"].nu["Transformer"]["encoderblock"]["kernel"], Factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
                 unstack_blocks(ours), expected)
    again = stack_blocks(unstack_blocks(ours["state"]))
    jax.tree.map(np.testing.assert_array_equal, again, ours["state"])


def test_a_run_on_eight_devices(tmp_path):
    """FSDP: factors whole on every device, everything else as its parameter; the same losses as on
    one device (rounding noise of tiny gradients is magnified, as by Adam); saved and restored."""
    config = make_tiny_config()
    config.model.hidden_size = 32
    config.model.num_layers = 1
    config.model.scan_layers = True
    config.optimizer.name = "adafactor"
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum_dtype = "bfloat16"
    config.optimizer.weight_decay = 0.1
    one, _ = follow(*compile_run(config, devices=1)[:2])
    config.mesh.fsdp = 8
    step, state, shardings = compile_run(config)
    adafactor = shardings.opt_state[0].nu["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]
    assert [s.spec for s in adafactor["kernel"]] == [P(), P()]
    momentum = shardings.opt_state[1].ema["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]
    assert momentum["kernel"].spec == P(None, "fsdp", "tensor")
    head = shardings.opt_state[0].nu["head"]["kernel"]  # of 10 classes, too narrow to factor
    assert head.spec == shardings.params["head"]["kernel"].spec == P("fsdp", None)

    shapes, losses = jax.eval_shape(lambda: state), []
    for i in range(len(one)):
        state, metrics = step(state, make_batch(i))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, one, rtol=1e-4)
    assert len({round(loss, 4) for loss in losses}) == 4

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, state, {})
    checkpoints.wait()
    again = checkpoints.restore(4, shapes, shardings)
    checkpoints.close()
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(state))

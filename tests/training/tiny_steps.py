"""Train steps of the tiny run on made-up batches, for the tests of what happens inside a step."""

import functools

import jax
import numpy as np

from vit_jax.config import validate
from vit_jax.models.scan import stack_blocks
from vit_jax.models.shapes import params_shapes
from vit_jax.training import parallel, partition
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.state import build_model, make_init
from vit_jax.training.step import make_loss_sum, make_train_step

SIZE = (8, 8)


def make_batch(step, rows=16, invalid=()):
    rng = np.random.default_rng(step)
    mask = np.ones(rows, bool)
    mask[list(invalid)] = False
    return {
        "image": rng.integers(0, 256, (rows, *SIZE, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, rows, dtype=np.int32),
        "mask": mask,
        "flip": rng.random(rows) < 0.5,
    }


def build(config):
    """(make_step(axis_name=), init) of a config that `validate` returned."""
    model = build_model(config, 10, SIZE)
    schedule = make_schedule(config, 10)
    optimizer = make_optimizer(config, schedule, params_shapes(model, SIZE))
    init = make_init(model, optimizer, SIZE, config.seed, ema=config.ema_decay is not None)
    return functools.partial(
        make_train_step, make_loss_sum(model, config), optimizer, schedule, config), init


def random_state(init):
    """Without compiling `init`, and with no zeros among the parameters."""
    rng = np.random.default_rng(0)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(init))
    return zeros.replace(params=jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), zeros.params))


def compile_run(config, devices=8, state=None):
    """(compiled step, initial state, its shardings) on the first `devices` devices. A given state
    has unstacked blocks, and saves the time of compiling one."""
    config = validate(config)
    mesh = partition.make_mesh(config, jax.devices()[:devices])
    make_step, init = build(config)
    shardings, _ = partition.state_shardings(jax.eval_shape(init), mesh)
    step = parallel.compile_train_step(make_step, config, mesh, shardings)
    if state is None:
        return step, jax.jit(init, out_shardings=shardings)(), shardings
    state = stack_blocks(state) if config.model.scan_layers else state
    return step, jax.device_put(state, shardings), shardings


def follow(step, state, steps=4, invalid=()):
    """Losses of some steps, and the final state on the host."""
    losses = []
    for i in range(steps):
        state, metrics = step(state, make_batch(i, invalid=invalid))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state)


def run(config, devices=8, steps=4, invalid=(), state=None):
    """The same for a config."""
    return follow(*compile_run(config, devices, state)[:2], steps, invalid)

"""What devices send each other in a train step: the collectives of the program that XLA compiles
for eight simulated devices. (A CPU shows reduce-scatters as all-reduces.)"""

import collections
import functools
import math
import re
from unittest import mock

import jax
import pytest
from tiny import make_tiny_config
from tiny_steps import build, make_batch

from vit_jax.config import validate
from vit_jax.models import vit
from vit_jax.training import parallel, partition

pytestmark = pytest.mark.core
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def collectives(program):
    """[(kind, type of the result), ...] of an optimized HLO text."""
    found = re.findall(rf"= (\([^()]*\)|\S+) ({KINDS})(?:-start)?\(", program)
    return [(kind, result) for result, kind in found]


@functools.lru_cache
def train_step_collectives(mesh=(-1, 1, 1), **settings):
    """Those of the step exactly as a run compiles it, for one block of width 64."""
    config = make_tiny_config()
    config.model.update(hidden_size=64, mlp_dim=256, num_layers=1)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    config = validate(config)
    mesh = partition.make_mesh(config)
    make_step, init = build(config)
    shapes = jax.eval_shape(init)
    shardings, _ = partition.state_shardings(shapes, mesh)
    jit, made = jax.jit, []

    def recorded(*args, **kwargs):
        made.append(jit(*args, **kwargs))
        return made[-1]

    with mock.patch.object(jax, "jit", recorded):
        parallel.compile_train_step(make_step, config, mesh, shardings)
    (step,) = made

    def sharded(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(sharded, shapes, shardings)
    batch = {key: sharded(value, partition.batch_sharding(mesh))
             for key, value in make_batch(0).items()}
    with jax.set_mesh(mesh):
        return collectives(step.lower(state, batch).compile().as_text())


def counts(found):
    return collections.Counter(kind for kind, _ in found)


def images_in(found):
    """Those of pixels: bytes, or anything in the shape of 8x8 images."""
    return [(kind, result) for kind, result in found if re.search(r"u8\[|,8,8,3\]", result)]


FSDP = (1, 8, 1)


@pytest.mark.parametrize("settings", [{}, dict(accumulation_steps=2)], ids=str)
def test_data_parallel_only_sums(settings):
    assert set(counts(train_step_collectives(**settings))) == {"all-reduce"}


@pytest.mark.parametrize("settings", [
    {},
    dict(accumulation_steps=2),
    dict(model__scan_layers=True, model__classifier="gap", model__representation_size=32),
], ids=str)
def test_fsdp_gathers_parameters_and_sums_gradients(settings):
    """An all-to-all would mean that activations are split by feature and not by image."""
    found = train_step_collectives(FSDP, **settings)
    assert set(counts(found)) == {"all-gather", "all-reduce"}
    # Weights are float32 matrices of the block, the patches or the head; nothing else is gathered.
    sizes = {4 * 4 * 3 * 64, 64 * 64, 64 * 256, 64 * 32, 32 * 10, 64 * 10}
    for kind, result in found:
        if kind == "all-gather":
            shape = [int(n) for n in re.match(r"f32\[([\d,]+)\]", result)[1].split(",")]
            assert math.prod(shape) in sizes, result


def test_without_activation_constraints_fsdp_would_not_be_one():
    """So the test above can fail."""
    with mock.patch.object(vit, "constrain_tokens", lambda x: x):
        found = train_step_collectives.__wrapped__(FSDP)
    assert counts(found)["all-to-all"] > 0
    assert counts(found)["all-gather"] > counts(train_step_collectives(FSDP))["all-gather"]


def test_accumulation_gathers_nothing_more():
    whole, parts = (train_step_collectives(FSDP, accumulation_steps=n) for n in (1, 2))
    assert counts(parts)["all-gather"] == counts(whole)["all-gather"]
    assert not images_in(parts)


def test_mixing_gathers_no_images():
    """Every image is mixed with its neighbour: a device needs one image of the next one."""
    found = train_step_collectives(data__mixup=0.2, data__cutmix=1.0)
    assert {kind for kind, _ in images_in(found)} == {"collective-permute"}


def test_a_contiguous_split_into_parts_would_gather_images():
    """So the tests above can see it, and this is why the step's split is strided."""
    mesh = partition.make_mesh(validate(make_tiny_config()))
    images = jax.ShapeDtypeStruct(
        (16, 8, 8, 3), jax.numpy.uint8, sharding=partition.batch_sharding(mesh))

    def found(split):
        def sums(x):
            return jax.lax.map(lambda part: part.astype(jax.numpy.float32).sum((1, 2, 3)), split(x))
        with jax.set_mesh(mesh):
            return collectives(jax.jit(sums).lower(images).compile().as_text())

    assert images_in(found(lambda x: x.reshape(2, 8, 8, 8, 3)))
    assert not images_in(found(lambda x: x.reshape(8, 2, 8, 8, 3).swapaxes(0, 1)))

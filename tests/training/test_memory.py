"""Memory of a train step from shapes alone: against arithmetic, shards of real arrays, XLA."""

import jax
import numpy as np
import pytest

from vit_jax.config import base_config, set_value, validate
from vit_jax.errors import UserError
from vit_jax.models.shapes import params_shapes
from vit_jax.training import partition
from vit_jax.training.memory import Memory, Planner, compile_step, executable_bytes, resolve_mesh
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.state import build_model, make_init

SMALL = dict(model__patch_size=4, model__hidden_size=32, model__mlp_dim=64, model__num_heads=4,
             model__num_layers=2, data__image_size=16)
SCAN = dict(model__scan_layers=True)


def configure(**settings):
    config = base_config()
    config.total_steps = 10
    config.batch_size = 64
    for key, value in settings.items():
        set_value(config, key.replace("__", "."), value)
    return validate(config)


def planned(config, devices=8, classes=16):
    return Planner(config, classes).memory(config, resolve_mesh(config, devices))


@pytest.mark.parametrize("settings", [
    dict(mesh__fsdp=2, mesh__tensor=2),
    SCAN | dict(optimizer__momentum_dtype="bfloat16", ema_decay=0.99, mesh__fsdp=8),
    dict(optimizer__name="adafactor"),
    SCAN | dict(optimizer__name="sgd", optimizer__frozen=("head",)),
    SCAN | dict(model__num_heads=2, mesh__tensor=4),
], ids=str)
def test_state_is_that_of_real_arrays(settings):
    config = configure(**(SMALL | settings))
    model = build_model(config, 16, (16, 16))
    optimizer = make_optimizer(config, make_schedule(config, 10), params_shapes(model, (16, 16)))
    shapes = jax.eval_shape(
        make_init(model, optimizer, (16, 16), 0, ema=config.ema_decay is not None))
    shardings, _ = partition.state_shardings(shapes, partition.make_mesh(config))
    state = jax.tree.map(
        lambda shape, sharding: jax.device_put(np.zeros(shape.shape, shape.dtype), sharding),
        shapes, shardings)

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    memory = planned(config)
    assert memory.params == held(state.params)
    assert memory.optimizer == held(state.opt_state)
    assert memory.ema == held(state.ema_params)
    assert memory.gradients == memory.params


def test_activations_follow_batch_and_mesh():
    settings = SMALL | SCAN | dict(model__remat="names")
    planner = Planner(configure(**settings), 16)

    def kept(**more):
        config = configure(**(settings | more))
        return planner.memory(config, resolve_mesh(config, 8)).kept

    once = kept()
    assert kept(batch_size=128) > 1.9 * once
    assert kept(accumulation_steps=8) < once / 4
    assert kept(mesh__fsdp=8) == once
    # With tensor=2 a device has 16 images in place of 8. Of a block's two [N, D] and one [N, M] it
    # splits the latter; what is outside grows, but for arrays that all images share.
    block = 8 * 17 * (2 * 32 + 64) * 4
    outside, split = once - 2 * block, kept(mesh__tensor=2) - 2 * 16 * 17 * (2 * 32 + 32) * 4
    assert outside < split <= 2 * outside


def test_masked_patches():
    """Their loss reads a prediction of 512 classes for each of 16 patches: in float32 at least the
    logits' exponentials are kept."""
    config = configure(**SMALL, **SCAN, task="masked_patches", model__remat="full")
    blocks = 2 * 8 * 17 * 32 * 4
    assert planned(config).kept > blocks + 8 * 16 * 512 * 4


def test_accumulation_keeps_a_sum_of_gradients():
    memory = planned(configure(**SMALL, accumulation_steps=2))
    assert memory.gradients == 2 * memory.params


def test_batch_is_bytes():
    assert planned(configure(**SMALL)).batch == 8 * (16 * 16 * 3 + 4 + 1 + 1)


def test_fused_attention_holds_no_weights():
    """Of [H, N, N] in bfloat16 nothing is left; the float32 sums of its rows are. The second of the
    two blocks has weights of the class token alone."""
    config = configure(**SMALL, dtype="bfloat16")
    planner, mesh = Planner(config, 16), resolve_mesh(config, 8)
    plain = planner.memory(config, mesh).kept
    planner.fused_attention = True
    fused = planner.memory(config, mesh).kept
    assert plain - fused == 8 * 4 * 17 * 17 * 2


@pytest.mark.parametrize("settings", [dict(), dict(model__remat="full"), SCAN], ids=str)
def test_a_single_block(settings):
    """Without a loop there is none that is like another, and yet something to keep."""
    memory = planned(configure(**(SMALL | dict(model__num_layers=1)), **settings))
    assert memory.kept > 0
    assert (memory.working > 0) == bool(settings)


def test_total_against_the_compiler():
    """A CPU's compiler, which fuses less than the plan assumes, is the only one everywhere; slow
    tests (test_memory_compilers.py) ask a GPU's, and about other meshes and policies. 10 % either
    way leaves room for versions of XLA; without the block's share it would be 25 % too little."""
    config = configure(model__variant="Ti/16", model__num_layers=3, model__remat="dots",
                       mesh__fsdp=2, mesh__tensor=2, **SCAN)
    compiled = executable_bytes(compile_step(config, 16, jax.devices()))
    memory = planned(config)
    assert abs(memory.total / compiled - 1) < 0.1
    assert (memory.total - memory.working) / compiled - 1 < -0.1


@pytest.mark.parametrize("mesh, devices, sizes", [
    ((-1, 1, 1), 256, (256, 1, 1)), ((-1, 8, 1), 256, (32, 8, 1)), ((2, 4, 1), 8, (2, 4, 1)),
    ((-1, 2, 2), 8, (2, 2, 2)),
])
def test_mesh_of_devices_that_are_not_there(mesh, devices, sizes):
    config = configure(batch_size=256, mesh__data=mesh[0], mesh__fsdp=mesh[1], mesh__tensor=mesh[2])
    assert tuple(resolve_mesh(config, devices).shape.values()) == sizes
    if devices == 8:
        assert tuple(partition.make_mesh(config).shape.values()) == sizes


@pytest.mark.parametrize("settings, devices, message", [
    (dict(mesh__fsdp=3), 8, "does not fit 8 devices; choose sizes whose product is 8"),
    (dict(mesh__data=4), 8, "does not fit 8 devices"),
    ({}, 256, "config.batch_size=64 is not divisible by 256"),
])
def test_meshes_that_cannot_be(settings, devices, message):
    with pytest.raises(UserError, match=message):
        resolve_mesh(configure(**settings), devices)


def totals(config, limits):
    planner = Planner(config, 16)
    for limit in limits:
        found = planner.smallest_that_fits(config, 8, limit)
        if found:
            other, memory = found
            assert memory.total <= limit
            assert memory == planner.memory(other, resolve_mesh(other, 8))
            yield (other.accumulation_steps, other.model.remat or "none", other.mesh.fsdp)
        else:
            yield None


def test_the_smallest_change_that_fits():
    config = configure(**SMALL, **SCAN, batch_size=64, dtype="bfloat16")
    largest = planned(config).total
    limits = [int(largest * share / 10) for share in range(10, 0, -1)]
    steps = list(totals(config, limits))
    # As memory shrinks, first parameters are split, then more is recomputed, then batches split.
    order = ["none", "dots", "names", "full"]
    ranks = [(parts, order.index(remat), fsdp) for parts, remat, fsdp in filter(None, steps)]
    assert ranks[0] == (1, 0, 1) and ranks == sorted(ranks) and len(set(ranks)) > 4
    assert list(totals(config, [1000])) == [None]


def test_a_smallest_change_is_a_valid_config():
    config = configure(**SMALL, mesh__data=8, parallelism="pmap")
    total = planned(config).total
    other, _ = Planner(config, 16).smallest_that_fits(config, 8, total * 0.8)
    assert validate(other).parallelism == "jit" and other.mesh.data * other.mesh.fsdp == 8


@pytest.mark.slow  # because 50 layers are traced
def test_no_remat_without_blocks():
    config = configure(model__variant="R50x1", data__image_size=32)
    other, memory = Planner(config, 16).smallest_that_fits(config, 8, 420e6)
    assert memory.working == 0 and other.model.remat is None and other.mesh.fsdp > 1


def test_total():
    assert Memory(1, 2, 3, 4, 5, 6, 7).total == 28

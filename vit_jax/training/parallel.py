"""How a pure step runs on many devices: jit over the mesh, or pmap. Both keep the state as global
arrays, so initialisation, evaluation and checkpoints do not care which it was."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError
from vit_jax.training import partition
from vit_jax.training.state import TrainState
from vit_jax.training.step import Metrics, TrainStep

HostBatch = dict[str, np.ndarray]
PMAP_AXIS = "data"


def check_devices(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises UserError if devices would get different numbers of images in a micro-batch, if pmap
    would have to span processes, or if mixup or CutMix has no second image to mix with."""
    if config.parallelism == "pmap" and jax.process_count() > 1:
        raise UserError(
            f"config.parallelism='pmap' supports only one process, but this run has "
            f"{jax.process_count()}; use 'jit'."
        )
    shards = partition.batch_shards(mesh) * config.accumulation_steps
    if config.batch_size % shards:
        lower = config.batch_size // shards * shards
        near = f"{lower} or {lower + shards}" if lower else f"{shards}"
        raise UserError(
            f"config.batch_size={config.batch_size} is not divisible by {shards} "
            f"({partition.batch_shards(mesh)} devices x {config.accumulation_steps} accumulation "
            f"steps); the nearest that is: {near}."
        )
    if (config.data.mixup or config.data.cutmix) and config.batch_size == drawn_apart(config, mesh):
        raise UserError(
            "config.data.mixup and config.data.cutmix mix an image with its neighbour, but there "
            "is only one image per batch (under pmap: per device); raise config.batch_size or set "
            "both to 0."
        )


def drawn_apart(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
    """Parts of a batch that each draw their own random numbers and mix images among themselves."""
    return mesh.size if config.parallelism == "pmap" else 1


@functools.lru_cache
def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of every global batch that this process reads, ascending: int64 [rows].

    They are those that its devices hold. Where the axis `tensor` crosses processes, several of
    them read the same rows.
    """
    held = partition.batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held.values()]))


def to_devices(batch: HostBatch, mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """This process's rows of a batch as arrays [batch_size, ...] over all devices of the mesh."""
    sharding = partition.batch_sharding(mesh)
    rows = process_rows(mesh, batch_size)

    def global_array(values):
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return values[first : first + stop - start]

        shape = (batch_size, *values.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return {key: global_array(values) for key, values in batch.items()}


def compile_train_step(
    make_step: Callable[..., TrainStep],
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    shardings: Any,
) -> Callable[[TrainState, HostBatch], tuple[TrainState, Metrics]]:
    """Puts the step on the devices.

    Args:
      make_step: builds the step; called with `axis_name=`.
      config: the run's config; read are `parallelism` and `batch_size`.
      mesh: the devices.
      shardings: of the train state's leaves.

    Returns:
      step(state, this process's rows of a batch); the buffers of the given state are donated.
    """
    if config.parallelism == "pmap":
        # The state enters and leaves without a device axis (None), so it stays one replicated
        # array per leaf instead of the stacked copies that pmap is known for.
        step = jax.pmap(
            make_step(axis_name=PMAP_AXIS),
            axis_name=PMAP_AXIS,
            in_axes=(None, 0),
            out_axes=(None, None),
            donate_argnums=0,
            devices=list(mesh.devices.flat),
        )
        devices = jax.local_device_count()
        # pmap returns the state on a mesh of its own. The first one comes on the run's mesh, for
        # which the step would be compiled as well.
        own = NamedSharding(Mesh(mesh.devices.ravel(), PMAP_AXIS), PartitionSpec())

        def run_pmap(state, batch):
            if state.step.sharding != own:
                state = jax.device_put(state, own)
            return step(state, {
                k: v.reshape(devices, -1, *v.shape[1:]) for k, v in batch.items()
            })

        return run_pmap

    step = jit_train_step(make_step(axis_name=None), mesh, shardings)

    def run_jit(state, batch):
        with jax.set_mesh(mesh):
            return step(state, to_devices(batch, mesh, config.batch_size))

    return run_jit


def jit_train_step(step: TrainStep, mesh: Mesh, shardings: Any):
    """The step under jit, to be called or lowered while `mesh` is set; its state is donated."""
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, partition.replicated(mesh)))


def compile_eval_step(
    eval_step: Callable, mesh: Mesh, batch_size: int
) -> Callable[[Any, HostBatch], dict[str, jax.Array]]:
    """Puts the evaluation step on the devices; its results come back whole to every process."""
    step = jax.jit(eval_step, out_shardings=partition.replicated(mesh))

    def run(params, batch):
        with jax.set_mesh(mesh):
            return step(params, to_devices(batch, mesh, batch_size))

    return run

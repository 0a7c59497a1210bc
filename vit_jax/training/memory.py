"""The memory that a train step needs on every device, computed from shapes alone, and the smallest
change to a config that makes it fit."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import AbstractMesh

from vit_jax.config import image_size
from vit_jax.models.shapes import params_shapes
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import parallel, partition
from vit_jax.training.activations import Array, Residuals, residuals
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.program import Program
from vit_jax.training.state import TrainState, build_model, state_shapes
from vit_jax.training.task import make_task_loss

# From the least to the most that is computed twice.
_REMAT = ("none", "dots", "names", "full")
_ANY_LENGTH = 10**9  # of a schedule whose length does not matter


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device at the peak of a train step.

    Attributes:
      params, optimizer, ema: the train state, exactly.
      gradients: float32; twice with accumulation_steps, a part's own and the sum.
      kept: activations between the forward and the backward pass.
      working: the block in whose backward pass the device is, and its gathered parameters.
      batch: the images and their labels, as the host sends them.
    """

    params: int
    optimizer: int
    ema: int
    gradients: int
    kept: int
    working: int
    batch: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


class Planner:
    """Plans one config; variations of remat, mesh and accumulation reuse the same traces.

    Attributes:
      model: the config's model with the plain attention kernel, which any machine can trace.
      fused_attention: set it where the kernel never holds the attention weights, as cuDNN's.
    """

    def __init__(self, config: ml_collections.ConfigDict, num_classes: int):
        """Raises UserError where the model of the config cannot be."""
        self._config = config
        self._size = image_size(config)
        plain = config.copy_and_resolve_references()
        plain.unlock()
        if plain.model.attention_implementation:
            plain.model.attention_implementation = "xla"
        self.model = build_model(plain, num_classes, self._size)
        self.fused_attention = False

    def notes(self, config: ml_collections.ConfigDict, mesh: AbstractMesh) -> list[str]:
        """Sentences about axes that the mesh does not divide."""
        return partition.state_shardings(self._state(bool(config.model.scan_layers)), mesh)[1]

    def memory(self, config: ml_collections.ConfigDict, mesh: AbstractMesh) -> Memory:
        """Of the planner's config, or of another that differs in remat, scan_layers, mesh and
        accumulation alone."""
        state = self._state(bool(config.model.scan_layers))
        shardings, _ = partition.state_shardings(state, mesh)
        held = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                sharding.shard_shape(leaf.shape), leaf.dtype),
            state, shardings)
        gradients = _bytes(held.params) * (2 if config.accumulation_steps > 1 else 1)
        rows = config.batch_size // partition.batch_shards(mesh)
        kept, working = self._activations(config, mesh, rows // config.accumulation_steps)
        return Memory(
            params=_bytes(held.params),
            optimizer=_bytes(held.opt_state),
            ema=_bytes(held.ema_params),
            gradients=gradients,
            kept=kept,
            working=working,
            batch=rows * (math.prod(self._size) * 3 + 4 + 1 + 1),  # uint8, int32, two bools
        )

    def smallest_that_fits(
        self, config: ml_collections.ConfigDict, devices: int, limit: float
    ) -> tuple[ml_collections.ConfigDict, Memory] | None:
        """The config with the least sharding, remat and accumulation whose total stays within
        `limit` bytes, and its memory; None if there is none."""
        for other in self._alternatives(config, devices):
            memory = self.memory(other, resolve_mesh(other, devices))
            if memory.total <= limit:
                return other, memory
        return None

    def _alternatives(self, config, devices) -> Iterator[ml_collections.ConfigDict]:
        """Configs by cost, the cheapest first: fewest accumulation steps, then least recomputation,
        then fewest devices per copy of the parameters."""
        inner = devices // config.mesh.tensor
        images = config.batch_size // inner
        # Remat is planned with scan_layers; patterns of frozen parameters name one of the layouts.
        can_scan = self._has_blocks and (config.model.scan_layers
                                         or not config.optimizer.frozen)
        for parts, remat, fsdp in itertools.product(
                _powers_of_two(images), _REMAT if can_scan else ("none",), _powers_of_two(inner)):
            other = config.copy_and_resolve_references()
            other.unlock()
            other.accumulation_steps = parts
            other.mesh.fsdp = fsdp
            if other.mesh.data != -1:
                other.mesh.data = inner // fsdp
            if remat != (other.model.remat or "none"):
                other.model.remat = remat
            if remat != "none":
                other.model.scan_layers = True
                if other.model.scan_unroll:
                    other.model.scan_unroll = False
            if fsdp > 1:
                other.parallelism = "jit"
            yield other

    @functools.cache  # noqa: B019 (a planner lives as long as the command)
    def _state(self, scan: bool) -> TrainState:
        """Shapes of the train state."""
        config = self._config
        model = self.model.clone(scan_layers=scan) if self._has_blocks else self.model
        optimizer = make_optimizer(
            config, make_schedule(config, config.total_steps or _ANY_LENGTH),
            params_shapes(model, self._size))
        return state_shapes(model, optimizer, self._size, ema=config.ema_decay is not None)

    @functools.cached_property
    def _block_bytes(self) -> int:
        """Of one block's float32 parameters."""
        stacked = params_shapes(self.model.clone(scan_layers=True), self._size)
        return _bytes(stacked["Transformer"]["encoderblock"]) // self.model.num_layers

    @property
    def _has_blocks(self) -> bool:
        return isinstance(self.model, VisionTransformer)

    @functools.cache  # noqa: B019
    def _residuals(self, remat: str, loop: bool) -> Residuals:
        model = self.model
        if self._has_blocks:
            model = model.clone(scan_layers=True, scan_unroll=not loop, remat=remat)
        return residuals(model, params_shapes(model, self._size), self._size,
                         make_task_loss(model, self._config))

    def _activations(self, config, mesh, images) -> tuple[int, int]:
        """Bytes kept from the forward to the backward pass, and while a block is in it."""
        if not self._has_blocks:
            return self._sum(self._residuals("none", False).outside, images, mesh), 0
        remat, loop = config.model.remat or "none", has_loop(config)
        found, split = self._residuals(remat, loop), mesh.shape["fsdp"] * mesh.shape["tensor"]
        block = found.block if loop else found.block_fused
        kept = self._sum([a for a in block if a.per_image], images, mesh)
        # Kernels cast for the forward pass stay for the backward pass. A loop stacks them as they
        # are sharded; without one they stay gathered.
        shared = self._sum([a for a in block if not a.per_image], images, mesh)
        kept += shared // split if loop else shared
        total = found.blocks * kept + self._sum(found.outside, images, mesh)

        working = 0
        if loop or remat != "none":
            block = self._residuals("none", True).block_fused
            working += self._sum(block, images, mesh)
            # And the gradient of the largest of them.
            working += max(self._sum([array], images, mesh) for array in block)
        if mesh.shape["fsdp"] > 1:
            working += self._block_bytes // mesh.shape["tensor"]
        return total, working

    def _sum(self, arrays, images: int, mesh: AbstractMesh) -> int:
        return sum(
            self._array_bytes(array, mesh.shape["tensor"]) * (images if array.per_image else 1)
            for array in arrays)

    def _array_bytes(self, array: Array, tensor: int) -> int:
        if not (array.per_image and self._has_blocks):
            return array.bytes
        heads, shape = self.model.num_heads, array.shape[1:]
        weights = len(shape) == 3 and shape[0] == heads and shape[1] == shape[2]  # [H, N, N]
        if weights and self.fused_attention:
            return 0
        by_heads = len(shape) == 3 and heads in (shape[0], shape[1]) and heads % tensor == 0
        hidden = (len(shape) == 2 and shape[1] == self.model.mlp_dim
                  and self.model.mlp_dim % tensor == 0)
        return array.bytes // tensor if by_heads or hidden else array.bytes


def has_loop(config: ml_collections.ConfigDict) -> bool:
    """Whether the model of the config loops over its blocks."""
    return bool(config.model.scan_layers and not config.model.scan_unroll)


def resolve_mesh(config: ml_collections.ConfigDict, devices: int) -> AbstractMesh:
    """The mesh that `partition.make_mesh` makes of so many devices, without them.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or do not divide the batch.
    """
    mesh = AbstractMesh(partition.mesh_sizes(config, devices), partition.AXES)
    parallel.check_devices(config, mesh)
    return mesh


def compile_step(
    config: ml_collections.ConfigDict, num_classes: int, devices: list[jax.Device]
) -> jax.stages.Compiled:
    """The train step, compiled without a run or an array."""
    size = image_size(config)
    mesh = partition.make_mesh(config, devices)
    program = Program.of(config, build_model(config, num_classes, size), mesh,
                         config.total_steps or _ANY_LENGTH)
    rows = {"image": ((*size, 3), jnp.uint8), "label": ((), jnp.int32), "mask": ((), jnp.bool),
            "flip": ((), jnp.bool)}
    batch = {
        key: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype,
                                  sharding=partition.batch_sharding(mesh))
        for key, (shape, dtype) in rows.items()}
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.shapes, program.shardings)
    return program.lower(make_task_loss(program.model, config), state, batch).compile()


def executable_bytes(executable: jax.stages.Compiled) -> int:
    """The memory per device according to XLA's own analysis: arguments, temporary arrays, and
    results that do not reuse the memory of arguments."""
    found = executable.memory_analysis()
    return (found.argument_size_in_bytes + found.temp_size_in_bytes
            + found.output_size_in_bytes - found.alias_size_in_bytes)


def _powers_of_two(number):
    """Those that divide it, ascending."""
    return [2**i for i in range(number.bit_length()) if number % 2**i == 0]


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

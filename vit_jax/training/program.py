"""What a config trains on a mesh, before there is any array: model, optimizer, the shapes of the
state and where they belong. Training, its benchmark and its plan all compile this."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import optax
from jax.sharding import Mesh

from vit_jax.config import image_size
from vit_jax.models.shapes import params_shapes
from vit_jax.training import parallel, partition
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.state import TrainState, group_blocks, make_init, state_shapes
from vit_jax.training.step import LossSum, TrainStep, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """One config on one mesh.

    Attributes:
      config: of the run.
      mesh: the devices, which need not be there to compile for them.
      model: as it is trained, see `state.group_blocks`.
      optimizer, schedule: for all steps of the run.
      shapes: of the train state, as `jax.ShapeDtypeStruct`.
      shardings: of its leaves.
      notes: sentences about parameters that the mesh could not split.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    model: nn.Module
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    shapes: TrainState
    shardings: Any
    notes: list[str]

    @classmethod
    def of(
        cls, config: ml_collections.ConfigDict, model: nn.Module, mesh: Mesh, total_steps: int
    ) -> "Program":
        """`model` is what `state.build_model` returns. Raises UserError if config.optimizer does
        not fit it."""
        model, size = group_blocks(model, config, mesh), image_size(config)
        schedule = make_schedule(config, total_steps)
        optimizer = make_optimizer(config, schedule, params_shapes(model, size))
        shapes = state_shapes(model, optimizer, size, ema=config.ema_decay is not None)
        shardings, notes = partition.state_shardings(shapes, mesh)
        return cls(config, mesh, model, optimizer, schedule, shapes, shardings, notes)

    def initial_state(self) -> TrainState:
        """The state before the first step, on the devices."""
        init = make_init(self.model, self.optimizer, image_size(self.config), self.config.seed,
                         ema=self.config.ema_decay is not None)
        return jax.jit(init, out_shardings=self.shardings)()

    def step(self, loss_sum: LossSum, axis_name: str | None = None) -> TrainStep:
        """The pure train step of that loss; see `step.make_train_step`."""
        return make_train_step(
            loss_sum, self.optimizer, self.schedule, self.config, axis_name=axis_name)

    def lower(self, loss_sum: LossSum, state: TrainState, batch: dict[str, Any]
              ) -> jax.stages.Lowered:
        """The step as a run under jit compiles it, for a state and a batch or their shapes."""
        step = parallel.jit_train_step(self.step(loss_sum), self.mesh, self.shardings)
        with jax.set_mesh(self.mesh):
            return step.lower(state, batch)

"""Our side of `--what=train` and `--what=infer`: the project's own steps, compiled and timed."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vit_jax.benchmarking.timing import Run
from vit_jax.config import image_size
from vit_jax.devices import train_flops
from vit_jax.models.shapes import params_shapes
from vit_jax.models.summary import summarize
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import parallel, partition
from vit_jax.training.program import Program
from vit_jax.training.state import build_model, group_blocks
from vit_jax.training.step import make_loss_sum, normalize

NUM_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Work:
    """A compiled step with its inputs on the devices.

    Attributes:
      call: starts it once and returns arrays that are ready when it is done.
      executable: XLA's.
      flops: model FLOPs of one image (training: three forward passes, without recomputation).
      whole_flops: the same, including the tokens that our model skips but other libraries compute.
      compile_seconds: tracing and compiling, without a cache.
      parameters: number of scalars.
      attention: the kernel on a GPU, where there is a choice, and why not cuDNN's; otherwise ''.
    """

    call: Callable[[], Any]
    executable: jax.stages.Compiled
    flops: float
    whole_flops: float
    compile_seconds: float
    parameters: int
    attention: str

    @property
    def run(self) -> Run:
        """run(n) calls it n times and returns the seconds taken."""
        return _timed(self.call)


def synthetic_batch(batch_size: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """A training batch of noise, as `data.pipeline` makes them of images."""
    generator = np.random.default_rng(0)
    return {
        "image": generator.integers(0, 256, (batch_size, *size, 3), np.uint8),
        "label": generator.integers(0, NUM_CLASSES, batch_size, np.int32),
        "mask": np.ones(batch_size, bool),
        "flip": generator.random(batch_size) < 0.5,
    }


class Trainer:
    """The train step of a config with its state, as `vit_jax.main` runs it under jit."""

    def __init__(self, config: ml_collections.ConfigDict):
        """Raises UserError where the model or the mesh cannot be."""
        size, mesh = image_size(config), partition.make_mesh(config)
        parallel.check_devices(config, mesh)
        self._program = Program.of(
            config, build_model(config, NUM_CLASSES, size), mesh, config.total_steps)
        self.model = self._program.model
        self.state = self._program.initial_state()
        self.batch = self.put(synthetic_batch(config.batch_size, size))

    def put(self, batch):
        """A host's batch on the devices."""
        return jax.device_put(batch, partition.batch_sharding(self._program.mesh))

    def compile(self):
        """Returns XLA's executable of step(state, batch)."""
        loss_sum = make_loss_sum(self.model, self._program.config)
        return self._program.lower(loss_sum, self.state, self.batch).compile()


def training(config: ml_collections.ConfigDict) -> Work:
    """Forward pass, backward pass and update of a batch that stays on the device."""
    trainer = Trainer(config)
    begin = time.perf_counter()
    step = trainer.compile()
    compile_seconds = time.perf_counter() - begin

    def update():
        trainer.state, metrics = step(trainer.state, trainer.batch)
        return trainer.state, metrics

    summary = summarize(trainer.model, image_size(config))
    return Work(update, step, train_flops(summary.needed_flops), train_flops(summary.flops),
                compile_seconds, summary.parameters, _attention(trainer.model, config, train=True))


def inference(config: ml_collections.ConfigDict) -> Work:
    """Logits of a batch of uint8 images that stays on the device."""
    size = image_size(config)
    mesh = partition.make_mesh(config)
    parallel.check_devices(config, mesh)
    model = group_blocks(build_model(config, NUM_CLASSES, size), config, mesh)
    shapes = params_shapes(model, size)
    shardings, _ = partition.state_shardings(shapes, mesh)
    init = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, *size, 3)), train=False),
                   out_shardings={"params": shardings})
    params = init()
    images = jax.device_put(
        synthetic_batch(config.batch_size, size)["image"], partition.batch_sharding(mesh))
    forward = jax.jit(lambda params, images: model.apply(params, normalize(images), train=False))
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = forward.lower(params, images).compile()
    compile_seconds = time.perf_counter() - begin

    summary = summarize(model, size)
    return Work(lambda: compiled(params, images), compiled, summary.needed_flops, summary.flops,
                compile_seconds, summary.parameters, _attention(model, config, train=False))


BUILD = {"train": training, "infer": inference}


def _attention(model, config, train) -> str:
    if not isinstance(model, VisionTransformer) or jax.default_backend() != "gpu":
        return ""
    kernel, reason = model.attention_kernel(image_size(config), train=train)
    return f"attention {kernel}" + (f" ({reason})" if reason else "")


def _timed(call) -> Run:
    """Times calls that return arrays, to the end of the last."""
    def run(times):
        begin = time.perf_counter()
        for _ in range(times):
            arrays = call()
        jax.block_until_ready(arrays)
        return time.perf_counter() - begin
    return run


# [M, K] times [K, N]: square ones, and those of the MLPs of S/16 and B/16 for 16 images.
_CPU_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (3152, 384, 1536), (3152, 768, 3072),
               (3152, 3072, 768))
# And of B/16 and H/14 for 128 images.
_ACCELERATOR_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (25216, 768, 3072),
                       (25216, 3072, 768), (32896, 1280, 5120))


def matmul_shapes() -> tuple[tuple[int, int, int], ...]:
    """The five products [M, K] x [K, N] whose fastest is the ceiling on this machine's devices."""
    return _CPU_SHAPES if jax.default_backend() == "cpu" else _ACCELERATOR_SHAPES


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product on one device, with its FLOPs."""

    run: Run
    flops: float


def matmul(shape: tuple[int, int, int], dtype: str) -> Product:
    """XLA's product [M, K] x [K, N] of that shape."""
    m, k, n = shape
    a, b = (jax.random.normal(jax.random.key(i), sides, dtype)
            for i, sides in enumerate(((m, k), (k, n))))
    product = jax.jit(jnp.matmul).lower(a, b).compile()
    return Product(_timed(lambda: product(a, b)), 2.0 * m * k * n)

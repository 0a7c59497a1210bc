"""`--what=checkpoint`: how long an asynchronous save keeps the training loop from its next step."""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import ml_collections

from vit_jax.benchmarking.models import Trainer
from vit_jax.training.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Stall:
    """Seconds, medians of the saves.

    Attributes:
      step: a step with nothing being written.
      blocked: from the call of `save` to its return, which is when the next step can start.
      written: from that call until the checkpoint is complete on disk.
      step_while_writing: a step that begins and ends in that time; None if none did.
      bytes: of a checkpoint on disk.
    """

    step: float
    blocked: float
    written: float
    step_while_writing: float | None
    bytes: int


def checkpoint_stall(
    config: ml_collections.ConfigDict, *, saves: int, steps: int
) -> Stall:
    """Trains on a batch in memory, saving the state as `vit_jax.main` does.

    Args:
      config: the run's.
      saves: how many.
      steps: measured before each, with nothing being written.
    """
    trainer = Trainer(config)
    compiled = trainer.compile()

    def step():
        begin = time.perf_counter()
        trainer.state, metrics = compiled(trainer.state, trainer.batch)
        jax.block_until_ready((trainer.state, metrics))
        return time.perf_counter() - begin

    step()
    plain, blocked, written, meanwhile = [], [], [], []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Path(directory) / "checkpoints")
        for number in range(1, saves + 1):
            plain += [step() for _ in range(steps)]
            begin = time.perf_counter()
            checkpoints.save(number, trainer.state, {})
            blocked.append(time.perf_counter() - begin)
            while checkpoints.saving:
                seconds = step()
                if checkpoints.saving:
                    meanwhile.append(seconds)
            checkpoints.wait()
            written.append(time.perf_counter() - begin)
        last = Path(directory) / "checkpoints" / str(saves)  # older ones may be half deleted
        size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
        checkpoints.close()
    median = statistics.median
    return Stall(median(plain), median(blocked), median(written),
                 median(meanwhile) if meanwhile else None, size)

"""`--what=startup`: from the start of Python to the end of the first training step.

Run as a script it is the process that is measured, and prints its phases as one JSON object.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from vit_jax.benchmarking.peer import last_words
from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Startup:
    """Seconds of each phase of one process.

    Attributes:
      imports: Python, JAX and this project.
      state: building the model and its initial train state (a compilation of its own).
      compile: tracing and compiling the train step, or taking it from the cache.
      first_step: running it once.
    """

    imports: float
    state: float
    compile: float
    first_step: float

    @property
    def total(self) -> float:
        return self.imports + self.state + self.compile + self.first_step


def cold_and_warm(config_json: str, rounds: int) -> tuple[Startup, Startup]:
    """Medians of processes that found an empty compilation cache, and of those after them that
    found it filled.

    Args:
      config_json: the config, from `vit_jax.config.to_json`.
      rounds: how many times the two, every time with a new cache.

    Raises:
      UserError: a process failed, in its last words.
    """
    cold, warm = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(_process(config_json, cache))
            warm.append(_process(config_json, cache))
    return _medians(cold), _medians(warm)


def _process(config_json, cache) -> Startup:
    variables = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        # Everything is kept, however fast it compiled, as nothing else is in the folder.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run = subprocess.run(
        [sys.executable, "-m", __spec__.name, config_json, str(time.time())], env=variables,
        capture_output=True, text=True, check=False)
    if run.returncode:
        raise UserError(f"A started process ended with exit code {run.returncode}: "
                        f"{last_words(run.stderr)}")
    return Startup(**json.loads(run.stdout.splitlines()[-1]))


def _medians(runs) -> Startup:
    phases = zip(*map(dataclasses.astuple, runs), strict=True)
    return Startup(*map(statistics.median, phases))


def _measure(config_json, begin):
    times = [begin]

    def lap():
        times.append(time.time())

    from vit_jax.host_memory import keep_freed_memory
    keep_freed_memory()
    import jax

    from vit_jax.benchmarking.models import Trainer
    from vit_jax.config import from_json
    lap()
    trainer = Trainer(from_json(json.loads(config_json)))
    jax.block_until_ready(trainer.state)
    lap()
    step = trainer.compile()
    lap()
    jax.block_until_ready(step(trainer.state, trainer.batch))
    lap()
    phases = ("imports", "state", "compile", "first_step")
    print(json.dumps(dict(zip(phases, (b - a for a, b in zip(times, times[1:], strict=False)),
                              strict=True))))


if __name__ == "__main__":
    _measure(sys.argv[1], float(sys.argv[2]))

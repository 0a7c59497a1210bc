"""`--what=startup`: from the start of Python to the end of the first training step.

Run as a script it is the process that is measured, and prints its phases as one JSON object.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time


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


def cold_and_warm(config_json: str) -> tuple[Startup, Startup]:
    """Two processes one after the other with a new compilation cache, which the second finds.

    Args:
      config_json: the config, from `vit_jax.config.to_json`.
    """
    with tempfile.TemporaryDirectory() as cache:
        variables = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            # Everything is kept, however fast it compiled, as nothing else is in the folder.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        runs = [subprocess.run(
            [sys.executable, "-m", __spec__.name, config_json, str(time.time())], env=variables,
            stdout=subprocess.PIPE, text=True, check=True) for _ in range(2)]
    cold, warm = (Startup(**json.loads(run.stdout.splitlines()[-1])) for run in runs)
    return cold, warm


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

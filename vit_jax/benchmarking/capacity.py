"""`--batch_sizes=largest`: whether a batch fits, tried in a separate process, so that no earlier
attempt has affected the device's memory.

Run as a script it is that process, and prints its answer as one JSON object.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

from vit_jax.benchmarking.peer import last_words
from vit_jax.benchmarking.timing import largest
from vit_jax.errors import UserError

# Of the device's memory; JAX's own default of 75 % would be compared with all that PyTorch can get.
_FRACTION = "0.95"
# What is tried first, and last: PyTorch's attention takes less than 65,536 images at once.
_FIRST, _LAST = 64, 32_768
_OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|out of memory|does not fit", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Try:
    """Whether a batch fits.

    Attributes:
      failure: '' if it does; otherwise what went wrong.
      recomputed: operations that XLA rematerialises on its own to make the batch fit.
    """

    failure: str
    recomputed: int = 0


def devices() -> tuple[str, int]:
    """(platform, number) of JAX's devices, found out without claiming them for this process.

    Raises:
      UserError: JAX finds none; with the last line of its output.
    """
    run = _run([])
    if run.returncode:
        raise UserError(f"JAX does not start: {last_words(run.stderr)}")
    platform, number = json.loads(run.stdout.splitlines()[-1])
    return platform, number


def attempt(what: str, config_json: str, cache: str) -> Try:
    """Runs `what`, 'train' or 'infer', of a config (`vit_jax.config.to_json`) twice.

    `cache` is a folder for what the programs of all tries have in common.
    """
    run = _run([what, config_json], JAX_COMPILATION_CACHE_DIR=cache)
    if run.returncode:
        return Try(last_words(run.stderr))
    return Try(*json.loads(run.stdout.splitlines()[-1]))


def search(side: str, attempt: Callable[[int], str], shards: int = 1) -> int:
    """The largest number of images for each of so many devices with which `attempt` returns ''.

    What it returns otherwise is the failure. One that has nothing to do with memory counts as such
    after something has fitted: kernels may refuse what is too large for them.

    Raises:
      UserError: another failure, when nothing had fitted.
    """
    fitted = False

    def fits(number):
        nonlocal fitted
        failure = attempt(number)
        if failure and not _OUT_OF_MEMORY.search(failure):
            if not fitted:
                raise UserError(f"{side} does not run with {number} images: {failure}")
            print(f"{side} with {number} images: {failure}", file=sys.stderr)
        fitted = fitted or not failure
        return not failure

    return largest(fits, _LAST // shards, first=_FIRST)


def _run(arguments, **variables):
    environment = os.environ | variables
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:  # the older name; JAX refuses both
        environment.setdefault("XLA_CLIENT_MEM_FRACTION", _FRACTION)
    return subprocess.run([sys.executable, "-m", __spec__.name, *arguments], env=environment,
                          capture_output=True, text=True, check=False)


def _answer(arguments):
    import jax
    if not arguments:
        return jax.default_backend(), jax.device_count()

    from vit_jax.benchmarking import models
    from vit_jax.config import from_json
    what, config_json = arguments
    try:
        work = models.BUILD[what](from_json(json.loads(config_json)))
        work.run(2)
    except Exception as error:  # whatever it is; of what XLA says about memory, pages follow
        lines = str(error).splitlines() or [""]
        reason = next((line for line in lines if _OUT_OF_MEMORY.search(line)), lines[0])
        return f"{type(error).__name__}: {reason}", 0
    return "", work.executable.as_text().count(".remat")


if __name__ == "__main__":
    print(json.dumps(_answer(sys.argv[1:])))

"""A profile of some steps, for TensorBoard or Perfetto."""

from pathlib import Path
from typing import Any

import jax


class ProfileWindow:
    """Records the steps first to last (both included) into a folder; None records nothing."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps = steps
        self._folder = folder
        self._running = False

    def before(self, step: int) -> None:
        """Call before each step."""
        if self._steps and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Call after each step; waits for the last one's results."""
        if self._running and step >= self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends the recording, if one is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

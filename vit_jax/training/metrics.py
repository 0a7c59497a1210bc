"""What a run writes down (metrics.jsonl, TensorBoard events) and what a person sees of it."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class MetricsLog:
    """Appends scalars by step to `metrics.jsonl` and to TensorBoard event files in a workdir.

    A run that continues from a checkpoint repeats the steps after it, so entries after
    `resumed_step` are cut from the file, and TensorBoard is told to forget them.
    """

    def __init__(self, workdir: Path, resumed_step: int):
        self._path = workdir / "metrics.jsonl"
        self._cut_back(resumed_step)
        self._file = self._path.open("a")
        self._events = EventFileWriter(str(workdir))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.add_event(
            event_pb2.Event(wall_time=time.time(), step=resumed_step + 1, session_log=start))

    def _cut_back(self, step):
        kept = [entry for entry in read_metrics(self._path) if entry["step"] <= step]
        replacement = self._path.with_suffix(".jsonl.new")
        replacement.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        replacement.replace(self._path)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds one entry; it survives the process being killed."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        values = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()
        ]
        self._events.add_event(event_pb2.Event(
            wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values)))
        self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All entries of a metrics.jsonl; a last line that a kill cut short is left out."""
    entries = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return entries


class Progress:
    """The progress line: rewritten in place on a terminal, else one line an interval.

    Images per second count training alone: the clock stands still during compilation, evaluation
    and saving.
    """

    def __init__(self, first_step: int, total_steps: int, batch_size: int):
        self._total_steps = total_steps
        self._batch_size = batch_size
        self._step = first_step  # where the interval that is being timed began
        self._start: float | None = None
        self._terminal = sys.stdout.isatty()
        self._unfinished = False

    def step_done(self, step: int, metrics: Any) -> None:
        """Starts the clock after the first step, which is mostly compilation."""
        if self._start is None:
            jax.block_until_ready(metrics)
            self._restart(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still inside the block."""
        begin = time.perf_counter()
        yield
        if self._start is not None:
            self._start += time.perf_counter() - begin

    def show(self, step: int, scalars: dict[str, float]) -> dict[str, float]:
        """Prints step, loss, images/s and the time left; returns the speed as a scalar.

        The speed is that since the last call. It is missing where nothing was timed.
        """
        line = f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"
        line += f"  loss {scalars['train/loss']:.4f}"
        line += f"  learning rate {scalars['train/learning_rate']:.2e}"
        speed = {}
        if step > self._step:
            rate = (step - self._step) * self._batch_size / (time.perf_counter() - self._start)
            speed = {"train/images_per_second": rate}
            left = (self._total_steps - step) * self._batch_size / rate
            line += f"  {rate:,.0f} images/s  {format_seconds(left)} left"
        self._restart(step)
        if self._terminal:
            print(f"\r\033[K{line}", end="", flush=True)
            self._unfinished = True
        else:
            print(line, flush=True)
        return speed

    def say(self, text: str) -> None:
        """Prints a line of its own, over the progress line."""
        print(f"\r\033[K{text}" if self._terminal else text, flush=True)
        self._unfinished = False

    def close(self) -> None:
        """Ends the line that `show` may have left open, so that what follows has its own."""
        if self._unfinished:
            print(flush=True)
            self._unfinished = False

    def _restart(self, step):
        self._step, self._start = step, time.perf_counter()


def format_seconds(seconds: float) -> str:
    """`75` -> `1m15s`, `4000` -> `1h06m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"

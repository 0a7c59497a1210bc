"""What a run writes down (metrics.jsonl, TensorBoard events) and what a person sees of it."""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from vit_jax.devices import Device, mfu
from vit_jax.errors import UserError


class MetricsLog:
    """Appends scalars by step to `metrics.jsonl` and to TensorBoard event files in a workdir.

    A run that continues from a checkpoint repeats the steps after it, so entries after
    `resumed_step` are cut from the file, and TensorBoard is told to forget them.
    """

    def __init__(self, workdir: Path, resumed_step: int, active: bool = True):
        """`active=False` writes nothing: only one process of a run does."""
        self._active = active
        if not active:
            return
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
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        values = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()
        ]
        self._events.add_event(event_pb2.Event(
            wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values)))
        self._events.flush()

    def has(self, step: int, name: str) -> bool:
        """Whether a value whose name begins so was written at this step; True where nothing is
        written."""
        return not self._active or any(
            entry["step"] == step and any(key.startswith(name) for key in entry)
            for entry in read_metrics(self._path))

    def close(self) -> None:
        """Closes both files."""
        if self._active:
            self._file.close()
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All entries of a metrics.jsonl up to the first invalid line, which a kill may have cut off.

    Raises:
      UserError: the file cannot be opened.
    """
    try:
        text = path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions, or move "
                        "it away.") from None
    entries = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            break
        entries.append(entry)
    return entries


class Progress:
    """The progress line: rewritten in place on a terminal, else one line an interval.

    Speeds count training alone: the clock stands still during compilation, evaluation and saving.
    """

    def __init__(self, first_step: int, total_steps: int, batch_size: int, devices: int = 1,
                 flops: float = 0.0, device: Device | None = None):
        """`devices` share the work; `flops` are a forward pass's for one image, and `device` is
        what their utilisation is measured against, None where it is not known."""
        self._total_steps = total_steps
        self._batch_size = batch_size
        self._devices = devices
        self._flops = flops
        self._device = device
        self._step = first_step  # where the interval that is being timed began
        self._start: float | None = None
        self._waited = 0.0
        self._terminal = sys.stdout.isatty()
        self._unfinished = False

    def step_done(self, step: int, metrics: Any, seconds: float) -> dict[str, float]:
        """Starts the clock after the first step, whose call took `seconds`, mostly to compile;
        returns that as a scalar once."""
        if self._start is not None:
            return {}
        jax.block_until_ready(metrics)
        self.say(f"compiled the train step in {format_seconds(seconds)}")
        self._restart(step)
        return {"train/compile_seconds": seconds}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still inside the block."""
        begin = time.perf_counter()
        yield
        if self._start is not None:
            self._start += time.perf_counter() - begin

    @contextlib.contextmanager
    def waiting(self, running: Any) -> Iterator[None]:
        """Inside the block the loop waits for data. It counts as input wait if the step before it,
        whose results are `running`, has ended by then: else the devices had work meanwhile."""
        begin = time.perf_counter()
        yield
        if all(leaf.is_ready() for leaf in jax.tree.leaves(running)):
            self._waited += time.perf_counter() - begin

    def show(self, step: int, scalars: dict[str, float]) -> dict[str, float]:
        """Prints where the run is and how fast; returns the speeds as scalars.

        They are those since the last call, missing where nothing was timed: images_per_second (and
        per device), step_seconds, input_wait (share of the time, at most), mfu (see
        `vit_jax.devices.mfu`; missing for an unknown device) and peak_memory_bytes (of the fullest
        device of this process; missing where JAX does not know it, as on CPUs).
        """
        parts = [
            f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}",
            f"loss {scalars['train/loss']:.4f}",
            f"learning rate {scalars['train/learning_rate']:.2e}",
        ]
        speed = {}
        if step > self._step:
            elapsed = time.perf_counter() - self._start
            rate = (step - self._step) * self._batch_size / elapsed
            wait = min(1.0, self._waited / elapsed)
            speed = {
                "train/images_per_second": rate,
                "train/images_per_second_per_device": rate / self._devices,
                "train/step_seconds": elapsed / (step - self._step),
                "train/input_wait": wait,
            }
            each = f" ({rate / self._devices:,.0f} a device)" if self._devices > 1 else ""
            parts.append(f"{rate:,.0f} images/s{each}")
            if self._device:
                speed["train/mfu"] = mfu(rate / self._devices, self._flops, self._device)
                parts.append(f"MFU {speed['train/mfu']:.1%}")
            parts.append(f"{1000 * speed['train/step_seconds']:,.0f} ms a step")
            parts.append(f"input wait {wait:.0%}")
            if memory := peak_memory():
                speed["train/peak_memory_bytes"] = memory
                parts.append(f"{memory / 2**30:.1f} GiB")
            left = (self._total_steps - step) * self._batch_size / rate
            parts.append(f"{format_seconds(left)} left")
        self._restart(step)
        line = "  ".join(parts)
        if self._terminal:  # a line that wraps could not be rewritten
            line = line[: shutil.get_terminal_size().columns - 1]
            _print(f"\r\033[K{line}", end="")
            self._unfinished = True
        else:
            _print(line)
        return speed

    def say(self, text: str) -> None:
        """Prints a line of its own, over the progress line."""
        _print(f"\r\033[K{text}" if self._terminal else text)
        self._unfinished = False

    def close(self) -> None:
        """Ends the line that `show` may have left open, so that what follows has its own."""
        if self._unfinished:
            _print()
            self._unfinished = False

    def _restart(self, step):
        self._step, self._start, self._waited = step, time.perf_counter(), 0.0


def _print(text="", end="\n"):
    """Prints immediately. Once nobody reads the output any more, as when Ctrl-C also ended a `tee`,
    it is discarded: the run must still save."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def peak_memory() -> int | None:
    """Most bytes in use so far on any device of this process; None where JAX does not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def format_seconds(seconds: float) -> str:
    """`75` -> `1m15s`, `4000` -> `1h06m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"

"""Running the runs of a sweep: one process after another, and what happens when one is stopped."""

import contextlib
import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vit_jax import config as config_lib
from vit_jax.errors import UserError
from vit_jax.sweeping import results
from vit_jax.sweeping.grid import Run, Sweep, folder
from vit_jax.training import workdir as workdir_lib
from vit_jax.training.metrics import format_seconds


class Busy(Exception):
    """Another process holds the lock."""


class Stopping:
    """Inside `with`, SIGTERM and SIGINT are passed on to the run that is going on, which saves."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._process: subprocess.Popen | None = None
        self._old: dict[int, object] = {}

    def __enter__(self):
        self._old = {number: signal.signal(number, self._pass_on)
                     for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _pass_on(self, number, frame):
        self.signal = signal.Signals(number)
        if self._process is not None:
            self._process.send_signal(number)

    def run(self, command: list[str], log: IO, lock: IO) -> int:
        """Runs the command to its end and returns its exit code, negative for a signal.

        It inherits the lock, so that a run whose sweep was killed keeps others away from its
        workdir. It has a session of its own, so that Ctrl-C in a terminal comes once, from here.
        """
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                   pass_fds=(lock.fileno(),), start_new_session=True)
        self._process = process
        if self.signal:  # it came before there was a process to pass it on to
            process.send_signal(self.signal)
        try:
            return process.wait()
        finally:
            self._process = None


def run_all(
    argument: str, workdir: Path, sweep: Sweep, every: list[Run], mine: list[Run],
    stopping: Stopping,
) -> tuple[list[str], list[str]]:
    """Runs what is not finished, and writes the tables after every run.

    Args:
      argument: FILE.py[:ARGS] of the sweep.
      workdir: of the sweep.
      sweep: what the tables look like.
      every: all runs, for the tables.
      mine: those to run here.
      stopping: ends the sweep when a signal came.

    Returns:
      Names of the runs that failed, and of those that other processes are running.
    """
    failed, busy = [], []
    write_tables(workdir, sweep, every)
    for number, run in enumerate(mine, start=1):
        if stopping.signal:
            break
        title = f"[{number}/{len(mine)}] {run.name}:"
        where = folder(workdir, run)
        where.mkdir(parents=True, exist_ok=True)
        try:
            with locked(where / ".lock") as lock:
                if result := results.read(workdir, run):
                    print(title, "already finished,", _reached(sweep, result), flush=True)
                    continue
                print(title, f"running; its output goes to {where / 'log.txt'}", flush=True)
                begin = time.monotonic()
                problem = _begun_otherwise(where, run) or _run(
                    argument, where, run, stopping, lock)
                if problem is None:
                    results.record(workdir, run)
                elif stopping.signal:
                    break
        except Busy:
            print(title, "in progress in another process", flush=True)
            busy.append(run.name)
            continue
        seconds = format_seconds(time.monotonic() - begin)
        if problem is None:
            result = results.read(workdir, run)
            print(title, f"{_reached(sweep, result)} after {seconds}", flush=True)
        else:
            print(title, f"FAILED after {seconds}: {problem}", flush=True)
            failed.append(run.name)
        write_tables(workdir, sweep, every)
    return failed, busy


def write_tables(workdir: Path, sweep: Sweep, runs: list[Run]) -> None:
    """`results.write`, by one process at a time, so that the last one to write knows the most."""
    with locked(workdir / ".lock", wait=True):
        results.write(workdir, sweep, runs)


def _begun_otherwise(where, run) -> str | None:
    """Why the run in this folder is not to be continued, if it began with another length or other
    probes: `main` would do so, but the table would then say more than is true of its first steps'
    schedule, or of what the probes of its last step were."""
    if not workdir_lib.has_checkpoints(where) or not (where / "config.json").exists():
        return None
    try:
        changed = results.differences(run.config, workdir_lib.read_config(where))
    except UserError as error:
        return str(error)
    for what, keys in (("another length", results.LENGTHS), ("other probes", results.PROBES)):
        if lines := [changed[key] for key in keys if key in changed]:
            return (f"it began with {what} ({', '.join(lines)}); use the old value, or delete "
                    f"{where} to train it from the start")
    return None


def _run(argument, where, run, stopping, lock) -> str | None:
    """Why the run failed; None if it did not."""
    # If several tasks of a cluster run sweeps, each does so by itself: none joins another's run.
    command = [sys.executable, "-m", "vit_jax.main", "--cluster=none", f"--config={argument}",
               f"--workdir={where}"]
    command += [f"--config.{key}={config_lib.format_value(value)}"
                for key, value in run.settings.items()]
    log_path = where / "log.txt"
    with log_path.open("ab") as log:
        begin = log.tell()
        code = stopping.run(command, log, lock)
    if code == 0:
        return None
    said = log_path.read_bytes()[begin:].decode(errors="replace").splitlines()
    lines = [line.strip() for line in said if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("error:")]
    last = " ".join(lines[errors[-1] if errors else -1:]) or "it said nothing"
    return f"killed by {signal.Signals(-code).name}; {last}" if code < 0 else last


def _reached(sweep, result):
    value = result.get(sweep.metric)
    return f"no {sweep.metric}" if value is None else f"{sweep.metric} {value:.4f}"


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[IO]:
    """Holds the lock of this file, for this process and those that inherit the open file.

    Raises:
      Busy: another process has it, and `wait` is False.
      UserError: the file cannot be written.
    """
    try:
        file = path.open("w")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another --workdir."
                        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Busy from None
        except OSError:  # not every file system has locks
            pass
        yield file

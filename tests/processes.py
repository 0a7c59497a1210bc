"""Runs of several real processes on this machine, talking over localhost."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from vit_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(count, *arguments, devices, environment=None):
    """`count` processes of `python -m vit_jax.main` with `devices` CPU devices each.

    `environment(i)` tells process i of the others by variables instead of flags.
    """
    address = f"localhost:{free_port()}"
    processes = []
    for i in range(count):
        own = environment(i) if environment else {}
        flags = [] if environment else [
            f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"]
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "vit_jax.main", *map(str, arguments), *flags],
            cwd=ROOT, env=os.environ | own | {
                "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return processes


def rehearse(count, *arguments, devices, logs):
    """The same through launch/processes.sh, to the end: what subprocess.run returns."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [ROOT / "launch" / "processes.sh", str(count), *map(str, arguments)], cwd=ROOT,
        env=os.environ | {"PATH": path, "DEVICES": str(devices), "LOGS": str(logs)},
        capture_output=True, text=True, timeout=240)


def finish(processes, timeout=240):
    """[(exit code, stdout, stderr)] of all of them, which must end within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    try:
        ends = [p.communicate(timeout=max(1, deadline - time.monotonic())) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *end) for p, end in zip(processes, ends, strict=True)]


def wait_for_step(workdir, step, processes, timeout=120):
    """Returns as soon as metrics.jsonl shows `step`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        entries = read_metrics(workdir / "metrics.jsonl")
        if entries and entries[-1]["step"] >= step:
            return
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.005)
    for process in processes:
        process.kill()
    raise AssertionError(f"never reached step {step}: {finish(processes)}")

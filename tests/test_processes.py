"""Several real processes: the same run as one, and what happens when they are stopped or die."""

import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import finish, free_port, rehearse, start, wait_for_step

from vit_jax.main import main
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.metrics import read_metrics

TINY = f"--config={Path(__file__).parent / 'tiny.py'}"

# Everything random at once, long enough to be interrupted.
RANDOM = [
    TINY, "--config.total_steps=24", "--config.log_every=1", "--config.eval_every=12",
    "--config.checkpoint_every=4", "--config.optimizer.name=adamw",
    "--config.optimizer.learning_rate=1e-3", "--config.model.dropout_rate=0.1",
    "--config.data.train_crop=inception", "--config.data.flip=true",
    "--config.accumulation_steps=2", "--config.data.mixup=0.2", "--config.ema_decay=0.9",
    "--config.mesh.fsdp=2",
]  # fmt: skip


def final_state(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints", writable=False)
    return checkpoints.last_step, checkpoints.restore_arrays(checkpoints.last_step)


def test_two_processes_stopped_and_killed_end_with_the_same_bits(tmp_path):
    """As those that launch/processes.sh started and nothing disturbed."""
    undisturbed = tmp_path / "undisturbed"
    done = rehearse(2, *RANDOM, f"--workdir={undisturbed}", devices=1, logs=tmp_path / "logs")
    assert done.returncode == 0, done.stderr
    assert f"2 processes of 1 devices; logs of all but the first in {tmp_path}/logs" in done.stderr
    assert "Devices   2 cpu of 2 processes, mesh" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("eval/accuracy=")
    assert "eval/accuracy" not in (tmp_path / "logs" / "1.log").read_text()  # one voice

    workdir, rng = tmp_path / "disturbed", random.Random()
    command = [*RANDOM, f"--workdir={workdir}"]
    # SIGTERM to either process makes both save the same step.
    processes = start(2, *command, devices=1)
    wait_for_step(workdir, rng.randrange(2, 9), processes)
    processes[rng.randrange(2)].send_signal(signal.SIGTERM)
    ends = finish(processes)
    assert [code for code, _, _ in ends] == [75, 75], ends
    said = {err.splitlines()[-1] for _, _, err in ends}
    saved = Checkpoints(workdir / "checkpoints", writable=False).last_step
    assert said == {
        f"Stopped by SIGTERM after step {saved}, which is saved; run the same command to continue."}

    processes = start(2, *command, devices=1)
    wait_for_step(workdir, rng.randrange(13, 20), processes)
    for process in processes:
        process.kill()
    finish(processes)
    ends = finish(start(2, *command, devices=1))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "Continuing from step" in ends[0][1]

    (step, expected), (same_step, actual) = final_state(undisturbed), final_state(workdir)
    assert step == same_step == 24
    jax.tree.map(np.testing.assert_array_equal, expected, actual)


def losses(workdir):
    entries = read_metrics(workdir / "metrics.jsonl")
    return {e["step"]: e["train/loss"] for e in entries if "train/loss" in e}


def slurm(job):
    """What srun sets, for two tasks on this machine."""
    return lambda i: {
        "SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}


@pytest.mark.parametrize("then", [(1,), pytest.param((4, 1), marks=pytest.mark.slow)])
def test_resumed_by_another_number_of_processes(tmp_path, capsys, then):
    """Two processes (found through SLURM's variables) with four devices, then others, and this one
    with eight: the losses are those of one process throughout, so every image was seen at its
    step."""
    last = 4 + 4 * len(then)
    command = [TINY, f"--config.total_steps={last}", "--config.checkpoint_every=4",
               "--config.eval_every=0", "--config.data.train_crop=inception"]  # fmt: skip
    one, workdir = tmp_path / "one", tmp_path / "changing"
    main([*command, f"--workdir={one}"])

    job = str(free_port())  # JAX derives the port from it
    for i, count in enumerate((2, *then)):
        part = [*command, f"--workdir={workdir}", f"--config.total_steps={4 + 4 * i}"]
        if count == 1:
            capsys.readouterr()
            main(part)
            out = capsys.readouterr().out
        else:
            ends = finish(start(
                count, *part, devices=4 // count, environment=None if i else slurm(job)))
            assert [code for code, _, _ in ends] == [0] * count, ends
            out = ends[0][1]
        assert (f" of {count} processes, mesh" in out) == (count > 1)
    assert list(losses(workdir)) == list(range(1, last + 1))
    np.testing.assert_allclose(
        list(losses(workdir).values()), list(losses(one).values()), rtol=1e-5)


def test_a_process_that_dies_ends_the_others(tmp_path):
    # Without checkpoints: Orbax shows a traceback of its own for one that breaks off.
    command = [TINY, "--config.total_steps=100_000", "--config.log_every=10",
               "--config.eval_every=0", "--config.checkpoint_every=0",
               f"--workdir={tmp_path / 'run'}"]  # fmt: skip
    processes = start(2, *command, devices=1)
    wait_for_step(tmp_path / "run", 10, processes)
    processes[1].kill()
    begin = time.monotonic()
    code, _, err = finish(processes, timeout=120)[0]
    assert code not in (0, 75)
    assert "another process exited" in err or "another task died" in err, err
    assert "Traceback" not in err
    assert time.monotonic() - begin < 100  # the heartbeat's minute, and some


@pytest.mark.core
def test_processes_that_disagree(tmp_path):
    """One sentence each, at once, from all of them."""
    workdir = tmp_path / "run"
    address = f"--coordinator=localhost:{free_port()}"
    processes = [
        start(1, TINY, f"--workdir={workdir}", f"--config.seed={i}", address, "--num_processes=2",
              f"--process_id={i}", devices=1, environment=lambda _: {})[0] for i in range(2)]
    ends = finish(processes)
    assert [code for code, _, _ in ends] == [1, 1], ends
    for _, _, err in ends:
        assert "Traceback" not in err
    assert "seed" in ends[1][2] or "process 0 differ in the config" in ends[1][2], ends[1][2]
    assert not list(workdir.glob("checkpoints/[0-9]*"))

"""Sweeps through the command line: skipping, shares, interruption, failure, and what it refuses."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import wait_for_step

from vit_jax.errors import UserError
from vit_jax.sweep import main
from vit_jax.sweeping.execution import Busy, Stopping, locked
from vit_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent


def write_sweep(path, rows):
    """A sweep over tests/tiny.py with a column for every learning rate of a row."""
    cells = {row: {rate: {"optimizer.learning_rate": rate} for rate in rates}
             for row, rates in rows.items()}
    path.write_text(
        "import runpy\n"
        "from vit_jax.sweeping.grid import Sweep\n"
        f"get_config = runpy.run_path({str(ROOT / 'tests' / 'tiny.py')!r})['get_config']\n"
        f"def get_sweep():\n    return Sweep('Rates', 'row', 'rate', {cells!r})\n")
    return f"--config={path}"


def output_of(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two runs, of which the first ends with a loss that is not finite."""
    folder = tmp_path_factory.mktemp("sweep")
    config = write_sweep(folder / "rates.py", {"bad": (1e30,), "late": (0.2,)})
    workdir = folder / "runs"
    with pytest.raises(UserError) as refusal:
        main([config, f"--workdir={workdir}"])
    return config, workdir, str(refusal.value)


def test_a_run_that_fails_does_not_end_the_others(swept):
    _, workdir, message = swept
    assert message.startswith("1 of 2 runs failed (bad-1e+30-seed0): see above, ")
    assert "error: The " in (workdir / "bad-1e+30-seed0" / "log.txt").read_text()
    assert not (workdir / "bad-1e+30-seed0" / "result.json").exists()


def test_tables_have_what_the_runs_measured(swept):
    _, workdir, _ = swept
    rows = dict(line.strip("| ").split(" | ", 1)
                for line in (workdir / "results.md").read_text().splitlines()
                if line.startswith("| "))
    last = (workdir / "late-0.2-seed0" / "metrics.jsonl").read_text().splitlines()[-1]
    accuracy = f"{100 * json.loads(last)['eval/accuracy']:.1f}"
    assert rows == {"row": "0.2 | 1e+30", "bad": "n/a | –", "late": f"{accuracy} | n/a"}
    assert (workdir / "results.png").stat().st_size > 5000
    line = (workdir / "results.csv").read_text().splitlines()[1]
    assert line.startswith("late,0.2,0,late-0.2-seed0,1437,")  # the images it was trained on


def test_what_is_finished_is_left_out(swept, capsys):
    """Of two parts the second has the one run that is."""
    config, workdir, _ = swept
    files = {path: path.stat().st_mtime_ns for path in workdir.glob("*/metrics.jsonl")}
    output = output_of(capsys, config, f"--workdir={workdir}", "--shard=1/2")
    assert output.count("already finished, eval/accuracy 0.") == 1
    assert "[1/1] late-0.2" in output and "] bad" not in output
    assert files == {path: path.stat().st_mtime_ns for path in workdir.glob("*/metrics.jsonl")}


def test_what_another_process_is_running_is_left_to_it(swept, capsys):
    config, workdir, _ = swept
    with locked(workdir / "bad-1e+30-seed0" / ".lock"):
        output = output_of(capsys, config, f"--workdir={workdir}", "--shard=0/2")
    assert "In progress in other processes: bad-1e+30-seed0" in output


def test_report_alone(swept, capsys):
    config, workdir, _ = swept
    (workdir / "results.md").unlink()
    output = output_of(capsys, config, f"--workdir={workdir}", "--report", "--seeds=2")
    assert "1 of 4 runs are finished" in output
    assert (workdir / "results.md").read_text() in output
    assert not (workdir / "late-0.2-seed1").exists()


def test_other_settings_are_refused_by_the_run(swept, capsys):
    config, workdir, _ = swept
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        main([config, f"--workdir={workdir}", "--shard=1/2", "--config.batch_size=8"])
    assert "batch_size: 16 -> 8 Use the old values, or" in capsys.readouterr().out
    log = (workdir / "late-0.2-seed0" / "log.txt").read_text()
    assert "belongs to a run with another config:\n  batch_size: 16 -> 8" in log


@pytest.mark.parametrize("length, said", [
    ("total_steps=12", "another length (total_steps: 6 -> 12"),
    ("epochs=0.1", "another length (total_steps: 6 -> None, epochs: "),
    ("probes.every=3", "other probes (probes.every: 0 -> 3)"),
])
def test_a_run_of_another_length_is_not_continued(swept, capsys, length, said):
    """Its first steps were those of another schedule, or its last has no probes; nor is it run,
    which log.txt would show."""
    config, workdir, _ = swept
    log = (workdir / "late-0.2-seed0" / "log.txt").read_text()
    lengths = ["--config.total_steps=none"] * ("epochs" in length) + [f"--config.{length}"]
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        main([config, f"--workdir={workdir}", "--shard=1/2", *lengths])
    assert f"it began with {said}" in capsys.readouterr().out
    assert (workdir / "late-0.2-seed0" / "log.txt").read_text() == log


def test_interrupted_and_continued(tmp_path):
    config = write_sweep(tmp_path / "rates.py", {"a": (0.1, 0.01)})
    workdir = tmp_path / "runs"
    command = [sys.executable, "-m", "vit_jax.sweep", config, f"--workdir={workdir}",
               "--config.total_steps=400", "--config.checkpoint_every=0", "--config.eval_every=0"]

    def start(*more):
        return subprocess.Popen(
            [*command, *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = start()
    first = workdir / "a-0.1-seed0"
    wait_for_step(first, 20, [process])
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert err.strip() == "Stopped by SIGTERM; run the same command to continue."
    assert not (workdir / "a-0.01-seed0").exists()
    stopped = int((first / "log.txt").read_text().split("SIGTERM after step ")[1].split(",")[0])
    assert 20 <= stopped < 400

    process = start("--shard=0/2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"Continuing from step {stopped}." in (first / "log.txt").read_text()
    steps = [entry["step"] for entry in read_metrics(first / "metrics.jsonl")]
    assert sorted(set(steps)) == list(range(1, 401))
    assert json.loads((first / "result.json").read_text())["step"] == 400


def test_what_runs_start_from_is_there_before_the_first(tmp_path):
    config = write_sweep(tmp_path / "rates.py", {"a": (0.1,)})
    with pytest.raises(UserError, match="The run a-0.1-seed0: config.init=.*no.npz does not exist"):
        main([config, f"--workdir={tmp_path / 'runs'}", f"--config.init={tmp_path / 'no.npz'}"])
    assert not (tmp_path / "runs").exists()


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / ".lock"), locked(tmp_path / ".lock", wait=True):
        pass


def test_a_run_keeps_its_workdir_when_its_sweep_is_killed(tmp_path):
    """The lock is the run's too."""
    stopping = Stopping()
    with locked(tmp_path / ".lock") as lock, (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"]
        thread = threading.Thread(target=stopping.run, args=(command, log, lock))
        thread.start()
        while "up" not in (tmp_path / "log").read_text():
            thread.join(0.01)
        lock.close()
        with pytest.raises(Busy), locked(tmp_path / ".lock"):
            pass
        stopping._process.kill()
        thread.join()
    with locked(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("arguments, message", [
    ([], "required: --config, --workdir"),
    (["--config=configs/ablations/position.py:cpu"], "required: --workdir"),
    (["--config=x", "--workdir=y", "--seeds=0"], "--seeds=0 must be at least 1"),
    (["--config=x", "--workdir=y", "--shard=2/2"], "--shard=2/2 is not I/N"),
    (["--config=configs/quickstart.py", "--workdir=y"], "does not define get_sweep"),
    (["--config=configs/ablations/position.py:cpu", "--workdir=setup.py/x"], "cannot be written"),
])
def test_wrong_arguments(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        main(arguments)

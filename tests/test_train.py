"""Runs through the command line: learning, interruption, continuation, and what stops a run."""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import cli, load_model
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate_checkpoint
from vit_jax.main import main
from vit_jax.training import workdir as workdir_lib
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.metrics import read_metrics
from vit_jax.training.state import group_blocks
from vit_jax.training.workdir import read_config

ROOT = Path(__file__).parent.parent
TINY = f"--config={Path(__file__).parent / 'tiny.py'}"

# Everything random at once, long enough to be interrupted.
RANDOM = [
    TINY, "--config.total_steps=300", "--config.log_every=10", "--config.eval_every=100",
    "--config.checkpoint_every=25", "--config.optimizer.name=adamw",
    "--config.optimizer.learning_rate=1e-3", "--config.model.dropout_rate=0.1",
    "--config.model.stochastic_depth_rate=0.1", "--config.data.train_crop=inception",
    "--config.data.flip=true", "--config.accumulation_steps=2",
]  # fmt: skip


def start(*arguments, **kwargs):
    """The command in a process of its own, on one device."""
    return subprocess.Popen(
        [sys.executable, "-m", "vit_jax.main", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_for_step(workdir, step, process, timeout=120):
    """Returns as soon as metrics.jsonl shows `step`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        entries = read_metrics(workdir / "metrics.jsonl")
        if entries and entries[-1]["step"] >= step:
            return
        if process.poll() is not None:
            break
        time.sleep(0.005)
    raise AssertionError(f"never reached step {step}: {finish(process)}")


def stop_before(step, monkeypatch, command):
    """The command in this process, as if SIGTERM came just before this step."""
    stop = types.SimpleNamespace(check=lambda n: signal.SIGTERM if n == step else None)
    with monkeypatch.context() as patch, pytest.raises(cli.Stopped):
        patch.setattr("vit_jax.main.StopSignal", lambda: contextlib.nullcontext(stop))
        main(command)


def final_state(workdir):
    """Every array of the last checkpoint, optimizer state included, with the step."""
    checkpoints = Checkpoints(workdir / "checkpoints", writable=False)
    return checkpoints.last_step, checkpoints.restore_arrays(checkpoints.last_step)


SPEED = {"train/images_per_second", "train/images_per_second_per_device", "train/step_seconds",
         "train/input_wait", "train/compile_seconds"}


def without_speed(entries):
    return [{k: v for k, v in e.items() if k not in SPEED} for e in entries]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir to copy: all six steps of the tiny run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    main([TINY, f"--workdir={workdir}"])
    return workdir


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, out, err = finish(start(*RANDOM, f"--workdir={workdir}", "--config.data.workers=2"))
    assert code == 0, err
    assert "warning" not in err.lower(), err
    return workdir


def test_killed_twice_and_stopped_is_bit_identical(undisturbed, tmp_path):
    """Each at a random step, continued with another number of data workers."""
    workdir = tmp_path / "interrupted"
    rng = random.Random()
    for attempt, (number, workers) in enumerate(
            ((signal.SIGKILL, 0), (signal.SIGKILL, 3), (signal.SIGTERM, 2))):
        process = start(*RANDOM, f"--workdir={workdir}", f"--config.data.workers={workers}")
        wait_for_step(workdir, 75 * attempt + rng.randrange(30, 75), process)
        process.send_signal(number)
        code, _, err = finish(process)
        assert code == {signal.SIGKILL: -9, signal.SIGTERM: 75}[number]  # had not ended by itself
    assert cli.EXIT_SAVED == 75 and "Traceback" not in err
    step, _ = final_state(workdir)
    assert f"SIGTERM after step {step}," in err and 180 <= step < 300
    code, out, err = finish(start(*RANDOM, f"--workdir={workdir}", "--config.data.workers=1"))
    assert code == 0, err
    assert "Continuing from step" in out

    step, state = final_state(workdir)
    reference_step, reference = final_state(undisturbed)
    assert step == reference_step == 300
    jax.tree.map(np.testing.assert_array_equal, state, reference)
    assert without_speed(read_metrics(workdir / "metrics.jsonl")) == without_speed(
        read_metrics(undisturbed / "metrics.jsonl"))


def test_a_finished_run_is_evaluated_again_and_left_alone(undisturbed, capsys):
    before = (undisturbed / "metrics.jsonl").read_text()
    main([*RANDOM, f"--workdir={undisturbed}", "--config.data.workers=2"])
    last = read_metrics(undisturbed / "metrics.jsonl")[-1]
    expected = f"eval/accuracy={last['eval/accuracy']:.4f} eval/images=360"
    assert capsys.readouterr().out.splitlines()[-1] == expected
    assert (undisturbed / "metrics.jsonl").read_text() == before
    # ... and as a run of its own, without the recipe, in other batches.
    main([f"--workdir={undisturbed}", "--mode=evaluate", "--config.eval_batch_size=7"])
    assert capsys.readouterr().out.splitlines()[-1] == expected


@pytest.mark.core
def test_what_a_run_leaves(tmp_path, capsys, figures):
    workdir = tmp_path / "run"
    main([TINY, f"--workdir={workdir}"])
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("eval/accuracy=")
    for word in ("Parameters", "mesh", "1,437 images", "360 images", "Classes", "FLOPs"):
        assert word in out
    assert {p.name for p in (workdir / "report").iterdir()} == {
        "curves.png", "classes.png", "confusion.png"}
    for figure in (workdir / "report").iterdir():
        assert figure.read_bytes()[:4] == b"\x89PNG" and figure.stat().st_size > 5000
    assert list(workdir.glob("events.out.tfevents.*"))

    entries = read_metrics(workdir / "metrics.jsonl")
    assert [e["step"] for e in entries if "train/loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in entries if "eval/accuracy" in e] == [3, 6]
    train = entries[-2]
    assert set(train) == {"step", "train/loss", "train/learning_rate", "train/grad_norm",
                          *SPEED - {"train/compile_seconds"}}
    assert "train/compile_seconds" in entries[0]
    assert {"eval/accuracy", "eval/loss", "eval/images"} <= set(entries[-1])
    assert entries[-1]["eval/images"] == 360

    checkpoints = Checkpoints(workdir / "checkpoints", writable=False)
    meta = checkpoints.meta(checkpoints.last_step)
    assert meta["class_names"] == [str(i) for i in range(10)]
    assert meta["preprocessing"]["image_size"] == [8, 8]
    assert meta["config"] == json.loads((workdir / "config.json").read_text())


def test_averaged_weights_are_evaluated_and_loaded(finished, tmp_path):
    """After a long run at a high rate they are others than the last, and are what --ema takes."""
    workdir = tmp_path / "run"
    main([TINY, f"--workdir={workdir}", "--config.ema_decay=0.95", "--config.total_steps=12"])
    scalars = read_metrics(workdir / "metrics.jsonl")[-1]
    assert scalars["eval_ema/images"] == 360
    assert scalars["eval_ema/loss"] != scalars["eval/loss"]
    settings = read_config(workdir)
    for ema, prefix in ((False, "eval"), (True, "eval_ema")):
        again = evaluate_checkpoint(settings, workdir, ema=ema).scalars(prefix)
        assert again == {key: pytest.approx(scalars[key], rel=1e-6) for key in again}
    averaged = load_model(workdir, ema=True)
    assert "EMA weights" in averaged.report.source
    _, state = final_state(workdir)
    jax.tree.map(np.testing.assert_array_equal, averaged.params, state["ema_params"])

    with pytest.raises(UserError, match="no EMA weights: config.ema_decay was not set"):
        load_model(finished, ema=True)


def test_best_and_last_are_kept(tmp_path):
    workdir = tmp_path / "run"
    main([TINY, f"--workdir={workdir}", "--config.total_steps=12", "--config.eval_every=2",
          "--config.checkpoint_every=1"])
    accuracy = {e["step"]: e["eval/accuracy"] for e in read_metrics(workdir / "metrics.jsonl")
                if "eval/accuracy" in e}
    checkpoints = Checkpoints(workdir / "checkpoints", writable=False)
    assert checkpoints.last_step == 12
    assert accuracy[checkpoints.best_step] == max(accuracy.values())
    kept = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {12, checkpoints.best_step}


def test_another_config_is_refused_with_the_difference(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.1 -> 0\.2"):
        main([TINY, f"--workdir={workdir}", "--config.optimizer.learning_rate=0.2"])
    with pytest.raises(UserError, match="batch_size: 16 -> 32"):
        main([TINY, f"--workdir={workdir}", "--config.batch_size=32"])


def test_what_may_change_on_resume(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    main([TINY, f"--workdir={workdir}", "--config.total_steps=8", "--config.parallelism=pmap",
          "--config.data.workers=1", "--config.eval_batch_size=50", "--config.log_every=2",
          "--config.eval_every=0", "--config.checkpoint_every=0"])
    out = capsys.readouterr().out
    assert "total_steps: 6 -> 8" in out and "Continuing from step 6" in out
    other_draws = "note: from here on, dropout, stochastic depth"
    assert other_draws in out
    assert final_state(workdir)[0] == 8
    main([TINY, f"--workdir={workdir}", "--config.total_steps=10", "--config.mesh.fsdp=4"])
    assert final_state(workdir)[0] == 10 and other_draws in capsys.readouterr().out
    main([TINY, f"--workdir={workdir}", "--config.total_steps=11", "--config.mesh.fsdp=2"])
    assert "mesh.fsdp" in (out := capsys.readouterr().out) and other_draws not in out
    with pytest.raises(UserError, match="step 11, beyond the 6 steps"):
        main([TINY, f"--workdir={workdir}"])


@pytest.mark.slow  # because tests/training/test_ema.py continues the same in one process
def test_scanned_layers_resume_from_unstacked_checkpoints(tmp_path):
    scanned = ["--config.model.scan_layers=true", "--config.optimizer.name=adamw",
               "--config.optimizer.learning_rate=1e-3"]
    main([TINY, f"--workdir={tmp_path / 'whole'}", *scanned])
    main([TINY, f"--workdir={tmp_path / 'parts'}", *scanned, "--config.total_steps=4"])
    main([TINY, f"--workdir={tmp_path / 'parts'}", *scanned])
    _, whole = final_state(tmp_path / "whole")
    assert "encoderblock_1" in whole["params"]["Transformer"]
    jax.tree.map(np.testing.assert_array_equal, whole, final_state(tmp_path / "parts")[1])


def test_blocks_in_few_arrays_train_as_by_themselves(finished, tmp_path, monkeypatch):
    """As on GPUs, from another checkpoint and with averages, which are two trees that begin as one;
    then continued without."""
    alone, grouped = tmp_path / "alone", tmp_path / "grouped"
    tuned = [TINY, f"--config.init={finished}", "--config.ema_decay=0.9",
             "--config.optimizer.name=adamw", "--config.optimizer.learning_rate=1e-3",
             "--config.total_steps=4", "--config.eval_every=0", "--config.checkpoint_every=0"]
    main([*tuned, f"--workdir={alone}"])
    models = []

    def group(model, config, mesh):
        fake = types.SimpleNamespace(
            devices=np.array([types.SimpleNamespace(platform="gpu")], object))
        models.append(group_blocks(model, config, fake))
        return models[-1]

    with monkeypatch.context() as gpu:
        gpu.setattr("vit_jax.training.program.group_blocks", group)
        main([*tuned, f"--workdir={grouped}", "--config.total_steps=2"])
    assert [(model.scan_layers, model.scan_unroll) for model in models] == [(True, True)]
    metas = []
    for workdir in (alone, grouped):
        checkpoints = Checkpoints(workdir / "checkpoints", writable=False)
        metas.append(checkpoints.meta(checkpoints.last_step)["model"])
        checkpoints.close()
    assert metas[0] == metas[1] and not metas[1]["scan_layers"]
    main([*tuned, f"--workdir={grouped}"])
    states = [final_state(workdir)[1] for workdir in (alone, grouped)]
    # Adam's first steps are of the size of the learning rate, whatever the gradient's.
    for tree in ("params", "ema_params"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5),
                     *(state[tree] for state in states))


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=r"became (nan|inf) at step \d+"):
        main([TINY, f"--workdir={workdir}", "--config.total_steps=100",
              "--config.optimizer.learning_rate=1e30", "--config.checkpoint_every=1",
              "--config.log_every=100"])
    step, state = final_state(workdir)
    assert step >= 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state["params"]))


def test_frozen_parameters_stay(tmp_path):
    workdir = tmp_path / "run"
    main([TINY, f"--workdir={workdir}", "--config.total_steps=2",
          "--config.optimizer.frozen=^embedding,encoderblock_0"])
    _, after = final_state(workdir)
    main([TINY, f"--workdir={tmp_path / 'other'}", "--config.total_steps=1",
          "--config.optimizer.learning_rate=0"])
    _, initial = final_state(tmp_path / "other")
    same = jax.tree.map(lambda a, b: bool((a == b).all()), after["params"], initial["params"])
    assert all(jax.tree.leaves(same["embedding"]))
    assert all(jax.tree.leaves(same["Transformer"]["encoderblock_0"]))
    assert not any(jax.tree.leaves(same["head"]))
    with pytest.raises(UserError, match="matches no parameter"):
        main([TINY, f"--workdir={tmp_path / 'typo'}", "--config.optimizer.frozen=embeding"])


def test_a_new_head_is_evaluated_as_it_was_trained(finished, tmp_path, capsys):
    """config.init_head is of the run's start, and its config.json still says it."""
    workdir = f"--workdir={tmp_path / 'run'}"
    main([TINY, workdir, f"--config.init={finished}", "--config.init_head=reset",
          "--config.total_steps=2", "--config.eval_every=0", "--config.checkpoint_every=0"])
    (trained,) = re.findall("step 2/2  (eval/accuracy .*)", capsys.readouterr().out)
    main([workdir, "--mode=evaluate"])
    assert trained in capsys.readouterr().out.splitlines()


def test_a_run_that_is_cut_to_what_it_has_is_evaluated(tmp_path, capsys, monkeypatch):
    """Stopped before its first evaluation, it is then said to end there."""
    command = [TINY, f"--workdir={tmp_path / 'run'}", "--config.eval_every=0",
               "--config.checkpoint_every=0", "--config.ema_decay=0.9"]
    stop_before(3, monkeypatch, command)
    evaluate_best = [f"--workdir={tmp_path / 'run'}", "--mode=evaluate", "--checkpoint=best"]
    with pytest.raises(UserError, match="holds no checkpoint that was evaluated; take the last"):
        main(evaluate_best)
    for _ in range(2):
        main([*command, "--config.total_steps=2"])
        entries = [e for e in read_metrics(tmp_path / "run" / "metrics.jsonl")
                   if "eval/accuracy" in e]
        assert [e["step"] for e in entries] == [2] and "eval_ema/accuracy" in entries[0]
    out = capsys.readouterr().out
    assert f"eval/accuracy={entries[0]['eval/accuracy']:.4f}" in out
    assert f"Finished 2 steps; accuracy {entries[0]['eval/accuracy']:.4f}. Figures" in out


def test_what_is_said_of_a_run_that_is_cut_between_evaluations(tmp_path, capsys, monkeypatch):
    """The accuracy of its last step, and the one that --checkpoint=best gives."""
    command = [TINY, f"--workdir={tmp_path / 'run'}", "--config.eval_every=2",
               "--config.checkpoint_every=0"]
    stop_before(4, monkeypatch, command)
    capsys.readouterr()
    main([*command, "--config.total_steps=3"])
    accuracy = {e["step"]: e["eval/accuracy"] for e in read_metrics(
        tmp_path / "run" / "metrics.jsonl") if "eval/accuracy" in e}
    assert list(accuracy) == [2, 3]
    said = f"accuracy {accuracy[3]:.4f} (best checkpoint: {accuracy[2]:.4f})."
    assert f"Finished 3 steps; {said}" in capsys.readouterr().out


def test_a_kill_in_the_probes_loses_neither_steps_nor_probes(tmp_path, monkeypatch):
    """Also where the run is then said to end there, or is continued with more frequent probes."""
    command = [TINY, f"--workdir={tmp_path / 'run'}", "--config.eval_every=0",
               "--config.checkpoint_every=4", "--config.probes.every=4"]
    probed = [KeyboardInterrupt]

    def probe(params):
        if probed:
            raise probed.pop()
        return types.SimpleNamespace(scalars=lambda: {"probe/1shot": 0.5})

    def steps():
        return [e["step"] for e in read_metrics(tmp_path / "run" / "metrics.jsonl")
                if "probe/1shot" in e]

    monkeypatch.setattr("vit_jax.train.make_probes", lambda *args, **kwargs: probe)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert final_state(tmp_path / "run")[0] == 4 and steps() == []
    main([*command, "--config.total_steps=4"])
    assert steps() == [4]
    main(command)
    assert steps() == [4, 6]
    main(command)
    assert steps() == [4, 6]


def test_a_finished_run_does_not_begin_what_it_is_asked_to_stop(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr("vit_jax.train.make_evaluator", lambda *args: pytest.fail)
    stop_before(7, monkeypatch, [TINY, f"--workdir={workdir}"])


def test_a_head_alone_on_scanned_layers_is_continued(tmp_path):
    """Of the blocks the optimizer keeps nothing, so that nothing of them is on disk."""
    command = [TINY, "--config.model.scan_layers=true", "--config.optimizer.frozen=^(?!head/)",
               f"--workdir={tmp_path / 'run'}", "--config.eval_every=0"]
    main([*command, "--config.total_steps=2"])
    main([*command, "--config.total_steps=3"])
    assert final_state(tmp_path / "run")[0] == 3


def test_weights_that_an_update_spoils_are_not_saved(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="weights became nan or inf at step 1; no checkpoint had"):
        main([TINY, f"--workdir={workdir}", "--config.total_steps=1",
              "--config.optimizer.learning_rate=3e38", "--config.optimizer.clip_norm=none",
              "--config.optimizer.momentum=0.9", "--config.optimizer.weight_decay=1e30"])
    assert not list((workdir / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize("raised, said", [
    (ValueError("RESOURCE_EXHAUSTED: Error writing ...: No space left [os_error_code='28']"),
     "A checkpoint cannot be written to .*No space left.*completed checkpoints are kept"),
    (OSError(28, "No space left on device"), "A checkpoint cannot be written to .*No space left"),
    (ValueError("UNKNOWN: Gloo AllGather failed"), "Gloo"),  # another process ended
], ids=["TensorStore's", "Python's", "no disk's"])
def test_a_disk_that_is_full(tmp_path, monkeypatch, raised, said):
    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def fail():
        raise raised

    with monkeypatch.context() as full:
        full.setattr(checkpoints._manager, "wait_until_finished", fail)
        with pytest.raises(type(raised) if "Gloo" in said else UserError, match=said):
            checkpoints.wait()
    checkpoints.close()


def test_what_is_refused_changes_nothing(finished, tmp_path):
    """Neither config.json nor, where that is lost, what the checkpoint says about the run; and a
    second run waits for the first."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    command = [TINY, f"--workdir={workdir}", "--config.eval_every=0"]
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match="at step 6, beyond the 5 steps"):
        main([*command, "--config.total_steps=5", "--config.log_every=3"])
    with workdir_lib.alone(workdir), pytest.raises(UserError, match="Another process is training"):
        main([*command, "--config.total_steps=8"])
    assert (workdir / "config.json").read_text() == before
    (workdir / "config.json").unlink()
    more = [*command, "--config.total_steps=7"]
    with pytest.raises(UserError, match="another config:\n  batch_size: 16 -> 32"):
        main([*more, "--config.batch_size=32"])
    assert not (workdir / "config.json").exists()
    main(more)
    assert (workdir / "config.json").exists()


def test_a_half_written_checkpoint_is_passed_over(finished, tmp_path):
    """What a kill in the middle of a save leaves behind, as Orbax names it."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    debris = workdir / "checkpoints" / "8.orbax-checkpoint-tmp-0"
    (debris / "metrics").mkdir(parents=True)
    (debris / "metrics" / "metrics").write_text('{"eval/acc')
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/loss": 1.0}\n{"step": 8, "tra')
    main([TINY, f"--workdir={workdir}", "--config.total_steps=8"])
    assert final_state(workdir)[0] == 8
    assert not debris.exists()
    steps = [e["step"] for e in read_metrics(workdir / "metrics.jsonl") if "train/loss" in e]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("steps, least", [
    pytest.param([], 0.97, marks=pytest.mark.slow),  # as the README says it, 1,500
    (["--config.total_steps=300"], 0.9),
])
def test_the_quickstart_learns(steps, least, tmp_path):
    """The whole command, with TensorFlow made unimportable."""
    (tmp_path / "tensorflow.py").write_text("raise ImportError('TensorFlow must not be imported')")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    code, out, err = finish(start(
        "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", *steps, env=environment))
    assert code == 0 and "warning" not in err.lower(), err
    accuracy = float(out.splitlines()[-1].split()[0].removeprefix("eval/accuracy="))
    assert accuracy >= least

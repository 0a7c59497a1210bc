"""metrics.jsonl, TensorBoard events, and the progress line."""

import json
import subprocess
import sys
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_jax.devices import find
from vit_jax.errors import UserError
from vit_jax.training import metrics
from vit_jax.training.metrics import MetricsLog, Progress, format_seconds, read_metrics

pytestmark = pytest.mark.core


def log_steps(workdir, steps, resumed=0, value=1.0):
    log = MetricsLog(workdir, resumed)
    for step in steps:
        log.write(step, {"train/loss": value * step, "eval/images": 360})
    log.close()


def steps_of(workdir):
    return [entry["step"] for entry in read_metrics(workdir / "metrics.jsonl")]


def test_an_entry_is_on_disk_when_write_returns(tmp_path):
    """A run that is killed has lost nothing of what it showed."""
    log = MetricsLog(tmp_path, 0)
    log.write(3, {"train/loss": 0.1, "eval/images": 360})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "train/loss": 0.1, "eval/images": 360}\n'
    assert len(accumulate(tmp_path).Scalars("train/loss")) == 1
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 3, "train/loss": 0.1, "eval/images": 360}]


@pytest.mark.parametrize("resumed, kept", [(0, []), (4, [2, 4]), (5, [2, 4]), (9, [2, 4, 6, 8])])
def test_entries_after_the_checkpoint_are_cut(tmp_path, resumed, kept):
    """The run repeats those steps and would write them a second time."""
    log_steps(tmp_path, [2, 4, 6, 8])
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    MetricsLog(tmp_path, resumed).close()
    assert steps_of(tmp_path) == kept
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:len(kept)]
    log_steps(tmp_path, [10], resumed=resumed)
    assert steps_of(tmp_path) == [*kept, 10]
    assert {path.suffix for path in tmp_path.glob("metrics*")} == {".jsonl"}  # nothing temporary


@pytest.mark.parametrize("tail, kept", [
    ('{"step": 3, "train/lo', [1, 2]),
    ('{"step": 3, "train/loss": 1.0}', [1, 2, 3]),  # only the end of the line is missing
    ("\0\0\0\0", [1, 2]),  # what some file systems leave after a power failure
    ("", [1, 2]),
    ("3", [1, 2]),  # JSON, but no entry
    ('{"step": "3"}', [1, 2]),
])
def test_a_last_line_that_a_kill_cut_short(tmp_path, tail, kept):
    log_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    assert steps_of(tmp_path) == kept
    log_steps(tmp_path, [4], resumed=3)
    assert steps_of(tmp_path) == [*kept, 4]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_reader_that_has_gone_does_not_end_the_run():
    """In a process of its own, whose output is a pipe that is closed at the other end."""
    program = ("import sys\n"
               "from vit_jax.training.metrics import Progress\n"
               "progress = Progress(0, 2, 1)\n"
               "sys.stdin.read()\n"
               "for step in (0, 1):\n"
               "    progress.say('text')\n"
               "    progress.show(step, {'train/loss': 1.0, 'train/learning_rate': 1.0})\n"
               "progress.close()\n"
               "print('done', file=sys.stderr)\n")
    process = subprocess.Popen([sys.executable, "-c", program], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == "done\n" and process.wait() == 0
    process.stderr.close()


def test_no_file_is_no_entries(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_entries_end_at_bytes_that_are_no_text(tmp_path):
    log_steps(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"step": 2}\n')
    assert steps_of(tmp_path) == [1]


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="/metrics.jsonl cannot be read: Is a directory; check"):
        MetricsLog(tmp_path, 0)


def accumulate(workdir):
    return EventAccumulator(str(workdir)).Reload()


def test_tensorboard_reads_the_events(tmp_path):
    log_steps(tmp_path, [1, 2, 3], value=0.5)
    events = accumulate(tmp_path)
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/images"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 0.5), (2, 1.0), (3, 1.5)]
    assert {e.value for e in events.Scalars("eval/images")} == {360}


@pytest.mark.parametrize("resumed", [0, 4])
def test_tensorboard_forgets_what_is_repeated(tmp_path, resumed):
    """Also where a run was killed before its first checkpoint, and starts again."""
    log_steps(tmp_path, [2, 4, 6, 8])
    again = range(resumed + 2, 13, 2)
    log_steps(tmp_path, again, resumed=resumed, value=100)
    shown = {e.step: e.value for e in accumulate(tmp_path).Scalars("train/loss")}
    assert len(shown) == len(accumulate(tmp_path).Scalars("train/loss"))
    assert shown == {step: step for step in range(2, resumed + 1, 2)} | {
        step: 100 * step for step in again}


def test_closing_ends_the_writer(tmp_path):
    """TensorBoard's writer has a thread, which would keep a finished command alive."""
    before = threading.active_count()
    log = MetricsLog(tmp_path, 0)
    log.close()
    assert threading.active_count() == before


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock.perf_counter)
    return clock


SCALARS = {"train/loss": 1.23456, "train/learning_rate": 5e-4}


def test_progress_line(clock, capsys):
    progress = Progress(first_step=0, total_steps=1000, batch_size=64)
    clock.now += 60  # compilation, which is not training
    assert progress.step_done(1, {}, 59.0) == {"train/compile_seconds": 59.0}
    assert capsys.readouterr().out == "compiled the train step in 59s\n"
    clock.now += 3
    assert progress.step_done(4, {}, 1.0) == {}  # said once
    assert progress.show(4, SCALARS) == {
        "train/images_per_second": 64.0, "train/images_per_second_per_device": 64.0,
        "train/step_seconds": 1.0, "train/input_wait": 0.0}
    assert capsys.readouterr().out == (
        "step    4/1000  loss 1.2346  learning rate 5.00e-04  64 images/s  1,000 ms a step  "
        "input wait 0%  16m36s left\n")
    clock.now += 0.5
    assert progress.show(1000, SCALARS)["train/images_per_second"] == 996 * 64 / 0.5
    line = capsys.readouterr().out
    assert "  127,488 images/s  " in line and line.endswith("  0s left\n")


def test_utilisation_of_known_devices(clock, capsys, monkeypatch):
    """8 H200 at 3,000 images/s each, 35.16 GFLOPs forward: 3 x 35.16e9 x 3000 / 989.5e12."""
    monkeypatch.setattr(metrics, "peak_memory", lambda: 12 * 2**30)
    progress = Progress(0, 100, 4800, devices=8, flops=35.16e9, device=find("NVIDIA H200"))
    progress.step_done(1, {}, 0.0)
    clock.now += 0.2
    scalars = progress.show(2, SCALARS)
    assert scalars["train/images_per_second"] == pytest.approx(24_000)
    assert scalars["train/images_per_second_per_device"] == pytest.approx(3_000)
    assert scalars["train/mfu"] == pytest.approx(0.31980, rel=1e-4)
    assert scalars["train/peak_memory_bytes"] == 12 * 2**30
    assert ("24,000 images/s (3,000 a device)  MFU 32.0%  200 ms a step  input wait 0%  12.0 GiB"
            in capsys.readouterr().out)


def test_no_utilisation_of_an_unknown_device(clock):
    progress = Progress(0, 100, 10, flops=1e9, device=find("a new card"))
    progress.step_done(1, {}, 0.0)
    clock.now += 1
    assert "train/mfu" not in progress.show(2, SCALARS)


class Leaf:
    """Results of a step that are, or are not, there yet."""

    def __init__(self, ready):
        self.is_ready = lambda: ready


def test_input_wait_counts_only_what_the_devices_waited_too(clock):
    progress = Progress(0, 100, 10)
    progress.step_done(1, {}, 0.0)
    for ready in (True, False):
        with progress.waiting([Leaf(ready)]):
            clock.now += 1
    clock.now += 2
    assert progress.show(2, SCALARS)["train/input_wait"] == pytest.approx(1 / 4)
    clock.now += 2
    assert progress.show(3, SCALARS)["train/input_wait"] == 0  # each interval for itself


def images_per_second(progress, step):
    return progress.show(step, SCALARS)["train/images_per_second"]


def test_no_speed_where_nothing_was_timed(clock, capsys):
    """After the first step, which compiles; also when a run continues."""
    progress = Progress(first_step=6, total_steps=10, batch_size=64)
    progress.step_done(7, {}, 0.0)
    assert progress.show(7, SCALARS) == {}
    assert capsys.readouterr().out.endswith("step  7/10  loss 1.2346  learning rate 5.00e-04\n")
    clock.now += 2
    assert images_per_second(progress, 8) == 32.0


def test_the_clock_stands_still_while_paused(clock):
    """Evaluation and saving are not training."""
    progress = Progress(first_step=0, total_steps=10, batch_size=10)
    with progress.paused():  # before the clock was started
        clock.now += 5
    progress.step_done(1, {}, 0.0)
    clock.now += 1
    with progress.paused():
        clock.now += 1000
    clock.now += 1
    assert images_per_second(progress, 3) == 10.0
    with progress.paused():
        clock.now += 1000
    clock.now += 2
    assert images_per_second(progress, 4) == 5.0


def test_on_a_terminal_the_line_is_rewritten(clock, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    progress = Progress(first_step=0, total_steps=10, batch_size=10)
    progress.step_done(1, {}, 0.0)
    capsys.readouterr()
    progress.show(1, SCALARS)
    progress.say("a line that stays")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith("\r\033[Ka line that stays\n")
    assert out.startswith("\r\033[Kstep  1/10  loss")


def test_the_line_fits_the_terminal(clock, capsys, monkeypatch):
    """One that wraps could not be rewritten."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    progress = Progress(first_step=0, total_steps=10, batch_size=10)
    progress.step_done(1, {}, 0.0)
    capsys.readouterr()
    clock.now += 1
    progress.show(2, SCALARS)
    assert len(capsys.readouterr().out.removeprefix("\r\033[K")) == 39


def test_an_inactive_log_writes_nothing(tmp_path):
    log = MetricsLog(tmp_path, 0, active=False)
    log.write(1, {"train/loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds, text", [
    (0, "0s"), (0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (600, "10m00s"),
    (3599.6, "1h00m"), (4000, "1h06m"), (360_000, "100h00m"),
])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_a_workdir_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    """Cutting back replaces the file in one move."""
    log_steps(tmp_path, [1, 2, 3])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        MetricsLog(tmp_path, 1)
    assert steps_of(tmp_path) == [1, 2, 3]

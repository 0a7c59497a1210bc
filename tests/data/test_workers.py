"""Batches of processes: the same as of threads, and nothing is left behind, however it ends."""

import contextlib
import gc
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from image_files import encode
from test_pipeline import SIZE, Numbered, assert_same, take

from vit_jax.config import validate
from vit_jax.data import workers
from vit_jax.data.pipeline import BadImages, eval_batches, train_batches
from vit_jax.data.records import Record
from vit_jax.errors import UserError

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(not workers.AVAILABLE, reason="processes need Linux"),
]


class Failing(Numbered):
    """Record 3 cannot be read, as a UserError or for a mistake of ours."""

    def __init__(self, error):
        super().__init__(10)
        self.error = error

    def __getitem__(self, index):
        if index == 3:
            raise self.error
        return super().__getitem__(index)


class Lethal(Numbered):
    """The process that reads record 3 is ended, as the kernel does for want of memory."""

    def __getitem__(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Slow(Numbered):
    """A record takes 10 ms."""

    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)


class Photos:
    """Encoded files."""

    name, split, class_names = "photos", "train", ("one", "other")
    file = encode(np.zeros((8, 8, 3), np.uint8), "PNG")

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return Record(self.file, 0, f"photo {index}")


@pytest.fixture
def config(tiny_config):
    tiny_config.batch_size, tiny_config.data.workers = 10, 2
    tiny_config.data.worker_kind = "process"
    return tiny_config


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def helper():
    return workers._current._process.pid


def gone(pid):
    """A process has ended; who started it may not have asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("operations", [None, (2, 15)])
def test_same_training_batches_as_alone(config, count, operations):
    config.data.train_crop, config.data.flip = "inception", True
    config.data.randaugment = operations
    source = Numbered(37, bad={5}, side=20)
    config.data.on_bad_image = "skip"
    config.data.workers, config.data.worker_kind = 0, "thread"
    alone = list(itertools.islice(
        train_batches(source, validate(config), SIZE, BadImages("skip")), 6))
    config.data.workers, config.data.worker_kind = count, "process"
    bad_images = BadImages("skip")
    stream = train_batches(source, validate(config), SIZE, bad_images)
    assert_same(list(itertools.islice(stream, 6)), alone)
    stream.close()
    assert bad_images.count == 1


@pytest.mark.parametrize("batch_size", [4, 30])
def test_same_evaluation_as_alone(config, batch_size):
    source = Numbered(7, bad={2})

    def batches(kind):
        config.data.worker_kind = kind
        return list(eval_batches(
            source, validate(config), SIZE, BadImages("skip"), batch_size=batch_size))

    assert_same(batches("process"), batches("thread"))


def test_real_images_from_tfds(config, cifar10_dir):
    from vit_jax.data.sources import open_splits

    train, _ = open_splits(
        "tfds:cifar10", dir=cifar10_dir, train_split=None, eval_split=None, image_size=SIZE)
    ours = take(validate(config), train, 2)
    config.data.worker_kind = "thread"
    assert_same(ours, take(validate(config), train, 2))


@pytest.mark.parametrize("through", [dict, jax.device_put])
def test_memory_comes_back_when_nobody_refers_to_it(config, monkeypatch, through):
    """JAX may use a batch where it lies for as long as it likes; then the memory is used again."""
    made = []
    slot = workers._Slot
    monkeypatch.setattr(workers, "_Slot", lambda *args: made.append(args) or slot(*args))
    source = Numbered(64)
    config.data.worker_kind = "thread"
    expected = take(validate(config), source, 12)
    config.data.worker_kind = "process"
    stream = train_batches(source, validate(config), SIZE, BadImages("error"))
    held = [through(next(stream)) for _ in range(8)]
    assert_same([jax.device_get(batch) for batch in held], expected[:8])
    before = len(made)
    assert before >= 8
    del held
    gc.collect()
    assert_same([next(stream) for _ in range(4)], expected[8:])
    assert len(made) == before
    stream.close()


def test_a_bad_image_stops_the_run_and_is_named(config):
    with pytest.raises(UserError, match="file 3 cannot be decoded.*on_bad_image=skip"):
        take(validate(config), Numbered(10, bad={3}), 2)


@pytest.mark.parametrize("error, raised, message", [
    (UserError("the disk is gone; look for it."), UserError, "^the disk is gone; look for it.$"),
    (KeyError("label"), RuntimeError, "(?s)in a decoding process.*__getitem__.*KeyError"),
])
def test_errors_arrive(config, error, raised, message):
    with pytest.raises(raised, match=message):
        take(validate(config), Failing(error), 2)


def test_a_process_that_is_ended(config):
    with pytest.raises(UserError, match="has died; most likely .* memory.*worker_kind=thread"):
        take(validate(config), Lethal(10), 2)
    assert take(validate(config), Numbered(10), 1)  # others can be started


def test_a_helper_that_cannot_start(config, monkeypatch, capfd):
    monkeypatch.setattr(workers, "_current", None)
    monkeypatch.setattr(workers, "_HELPER", "raise SystemExit('no room: {}')")
    with pytest.raises(UserError, match="starts the .* exited with code 1; .*worker_kind=thread"):
        take(validate(config), Numbered(10), 1)
    assert "no room" in capfd.readouterr().err


def test_another_helper_is_started(config, monkeypatch):
    take(validate(config), Numbered(10), 1)
    pid = helper()
    # In a notebook; Python passes over what is no string.
    monkeypatch.setattr(sys, "path", [*sys.path, Path("elsewhere")])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid))
    assert take(validate(config), Numbered(10), 1)
    assert helper() != pid


def test_signals_to_all_processes_are_left_to_the_first(config):
    stream = train_batches(Numbered(50), validate(config), SIZE, BadImages("error"))
    next(stream)
    for pid in (helper(), *children(helper())):
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    for _ in range(10):
        next(stream)
    stream.close()
    assert workers._current.alive


def test_a_source_that_cannot_be_given_away(config):
    class Local(Numbered):
        pass

    with pytest.raises(UserError, match="cannot be sent.*Can't pickle.*worker_kind=thread"):
        take(validate(config), Local(10), 1)


def test_a_source_that_only_this_process_has(config):
    """As one of a notebook."""
    module = sys.modules[__name__]
    module.Here = type("Here", (Numbered,), {"__module__": __name__})
    try:
        with pytest.raises(UserError, match="cannot be sent.*'Here'.*worker_kind=thread"):
            take(validate(config), module.Here(10), 1)
    finally:
        del module.Here


def test_a_helper_that_was_interrupted_is_replaced(config, monkeypatch):
    take(validate(config), Numbered(10), 1)
    pid = helper()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workers, "send_handle", interrupt)
        with pytest.raises(KeyboardInterrupt):
            take(validate(config), Numbered(10), 1)
    assert take(validate(config), Numbered(10), 1)
    assert helper() != pid


def test_a_stream_that_is_closed_while_it_works_ends_at_once(config):
    stream = train_batches(Slow(1000), validate(config), SIZE, BadImages("error"))
    next(stream)
    threads = [t for t in threading.enumerate() if t.name.startswith("decode")]
    assert threads
    begin = time.monotonic()
    stream.close()
    for thread in threads:
        thread.join(timeout=10)
    assert time.monotonic() - begin < 0.9  # not the second that an ended process is waited for


def test_a_script_that_leaves_everything_open(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from test_pipeline import *\n"
        "from tiny import make_tiny_config\n"
        "config = make_tiny_config()\n"
        "config.data.workers, config.data.worker_kind = 2, 'process'\n"
        "stream = train_batches(Numbered(50), config, SIZE, BadImages('error'))\n"
        "batch = next(stream)\n")
    result = subprocess.run(
        [sys.executable, script], stderr=subprocess.PIPE, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert (result.returncode, result.stderr) == (0, "")


def test_more_processes_than_files_may_be_open(config, monkeypatch):
    """The soft limit is raised; where that is not enough, it is said."""
    config.data.workers = 40
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = len(os.listdir("/proc/self/fd")) + 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
    try:
        assert take(validate(config), Numbered(50), 1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
        monkeypatch.setattr(workers, "allow_open_files", lambda *_: None)
        with pytest.raises(UserError, match="40 decoding processes cannot be started .Too many "
                           "open files.; use fewer"):
            take(validate(config), Numbered(50), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_processes_end_with_the_stream(config):
    take(validate(config), Numbered(10), 1)
    wait_for(lambda: not children(helper()))
    stream = train_batches(Numbered(50), validate(config), SIZE, BadImages("error"))
    next(stream)
    started = children(helper())
    assert len(started) == 2
    stream.close()
    wait_for(lambda: all(map(gone, started)))


def test_processes_end_with_a_process_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import test_workers, time\n"
        "from test_pipeline import *\n"
        "from tiny import make_tiny_config\n"
        "config = make_tiny_config()\n"
        "config.data.workers, config.data.worker_kind = 2, 'process'\n"
        "next(stream := train_batches(Numbered(50), config, SIZE, BadImages('error')))\n"
        "helper = test_workers.helper()\n"
        "print(helper, *test_workers.children(helper), flush=True)\n"
        "time.sleep(60)\n")
    with subprocess.Popen(
            [sys.executable, script], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        started = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(started) == 3
    wait_for(lambda: all(map(gone, started)))


@pytest.mark.parametrize("kind, source, count, processes", [
    ("auto", Photos(), 2, True), ("auto", Photos(), 1, False), ("auto", Photos(), 0, False),
    ("auto", Numbered(10), 2, False), ("thread", Photos(), 2, False),
    ("process", Numbered(10), 1, True), ("process", Photos(), 0, False)])
def test_who_works(config, monkeypatch, kind, source, count, processes):
    class Asked(Exception):
        pass

    def ask(*_):
        raise Asked

    monkeypatch.setattr(workers, "Processes", ask)
    config.data.worker_kind, config.data.workers = kind, count
    with pytest.raises(Asked) if processes else contextlib.nullcontext():
        take(validate(config), source, 1)


def test_where_there_are_no_processes(config, monkeypatch):
    monkeypatch.setattr(workers, "AVAILABLE", False)
    with pytest.raises(UserError, match="worker_kind='process' needs Linux; set it to 'thread'"):
        take(validate(config), Numbered(10), 1)
    config.data.worker_kind = "auto"
    assert take(validate(config), Photos(), 1)

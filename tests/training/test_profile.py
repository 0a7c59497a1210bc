"""The profiler records the steps that were asked for, and nothing else."""

import jax
import pytest

from vit_jax.training.profile import ProfileWindow

pytestmark = pytest.mark.core


@pytest.fixture
def calls(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def run(window, first, last, calls):
    for step in range(first, last + 1):
        window.before(step)
        calls.append(step)
        window.after(step, {})
    window.close()
    return calls


def test_a_window(calls, tmp_path):
    window = ProfileWindow((2, 3), tmp_path)
    assert run(window, 1, 5, calls) == [1, "start", 2, 3, "stop", 4, 5]


def test_none(calls, tmp_path):
    assert run(ProfileWindow(None, tmp_path), 1, 3, calls) == [1, 2, 3]


def test_a_run_that_ends_or_continues_inside_it(calls, tmp_path):
    assert run(ProfileWindow((2, 9), tmp_path), 1, 3, calls) == [1, "start", 2, 3, "stop"]
    calls.clear()
    assert run(ProfileWindow((2, 6), tmp_path), 5, 7, calls) == ["start", 5, 6, "stop", 7]
    calls.clear()
    assert run(ProfileWindow((2, 6), tmp_path), 7, 8, calls) == [7, 8]


def test_a_real_profile(tmp_path):
    window = ProfileWindow((1, 1), tmp_path / "profile")
    window.before(1)
    window.after(1, jax.numpy.ones(3) + 1)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))

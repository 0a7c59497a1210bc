"""Turns, medians, ratios and the search for the largest batch, with sides that only pretend."""

import pytest

from vit_jax.benchmarking.timing import Timing, alternate, largest, ratio

pytestmark = pytest.mark.core


class Side:
    """Takes `seconds` for each piece of work, and says so without working."""

    def __init__(self, seconds, log, name):
        self.seconds, self.log, self.name = seconds, log, name

    def __call__(self, times):
        self.log.append((self.name, times))
        return times * self.seconds


def test_sides_take_turns_and_work_about_as_long_as_asked():
    log = []
    sides = {"a": Side(0.25, log, "a"), "b": Side(4.0, log, "b")}
    found = alternate(sides, rounds=3, seconds=lambda name: {"a": 2.0, "b": 1.0}[name])
    assert found == {"a": Timing((0.25,) * 3), "b": Timing((4.0,) * 3)}
    assert log[-6:] == [("a", 8), ("b", 1)] * 3


def test_a_first_piece_that_was_there_already_does_not_count():
    """A pipeline that has read ahead answers at once, and then at its own pace."""
    ahead = [3]

    def run(times):
        free = min(ahead[0], times)
        ahead[0] -= free
        return 1e-6 * free + 0.1 * (times - free)

    found = alternate({"a": run}, rounds=2, seconds=lambda _: 1.0)
    assert found["a"].median == pytest.approx(0.1)


def test_statistics():
    timing = Timing((3.0, 1.0, 2.0, 9.0))
    assert (timing.median, timing.best, timing.worst) == (2.5, 1.0, 9.0)
    # The second is twice as slow in every round, however slow the round was.
    assert ratio(Timing((1.0, 5.0, 2.0)), Timing((2.0, 10.0, 4.0))) == 2.0


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 16, 100, 1000, 65_536])
def test_largest(limit):
    tried = []

    def fits(number):
        tried.append(number)
        return number <= limit

    found = largest(fits, 10_000)
    real = min(limit, 10_000)
    assert real - real // 16 <= found <= real and found <= real
    assert max(tried) <= 2 * real and len(tried) < 25


def test_nothing_fits():
    assert largest(lambda _: False, 100) == 0

"""Repeated, alternating measurements of several sides, so that a disturbance affects all alike."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping

Run = Callable[[int], float]  # run(n) does its work n times and returns the seconds taken


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one piece of work, one number for every round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds)

    @property
    def worst(self) -> float:
        return max(self.rounds)


def alternate(
    sides: Mapping[str, Run], *, rounds: int, seconds: Callable[[str], float]
) -> dict[str, Timing]:
    """Measures every side once a round, one after the other.

    Args:
      sides: by name. Each is run before, to warm up and to see how long it takes.
      rounds: how often.
      seconds: about how long the side of this name works in a round; at least once.

    Returns:
      By name, the seconds of doing the work once: the mean of each round.
    """
    times = {}
    for name, run in sides.items():
        run(1)
        # Once may say little: of a pipeline the first piece may be there already.
        count = 1
        while (taken := run(count)) < seconds(name) / 4:
            count *= 2
        times[name] = max(1, round(count * seconds(name) / taken))
    found = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            found[name].append(run(times[name]) / times[name])
    return {name: Timing(tuple(values)) for name, values in found.items()}


def ratio(first: Timing, second: Timing) -> float:
    """How many times as long the second took as the first: the median of the rounds' ratios, in
    which what slowed a whole round cancels."""
    return statistics.median(b / a for a, b in zip(first.rounds, second.rounds, strict=True))


def largest(fits: Callable[[int], bool], limit: int, first: int = 1) -> int:
    """The largest number up to `limit` that fits, to one part in sixteen; 0 if 1 does not.

    It doubles from `first` until something does not fit and then halves the gap, so nothing much
    larger than what fits, or than `first`, is tried.
    """
    low, high = 0, min(first, limit)
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

"""SIGTERM and Ctrl-C as a request: the loop finishes its step, saves, and ends."""

import signal

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Inside `with`, SIGTERM and the first SIGINT wait for `check`; a second SIGINT interrupts.

    In a run of several processes, all must stop after the same step, whichever one was signalled.
    There JAX handles SIGTERM and agrees on the step (a handler of ours would intercept the signal),
    and SIGINT interrupts immediately.
    """

    def __init__(self):
        self._requested: signal.Signals | None = None
        self._old: dict[int, object] = {}

    def __enter__(self):
        if jax.process_count() == 1:
            self._old = {
                s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = signal.Signals(number)

    def check(self, step: int) -> signal.Signals | None:
        """The signal that asks to stop before `step`; all processes must ask before every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._requested = signal.SIGTERM
        return self._requested

"""SIGTERM and Ctrl-C as a request: the loop finishes its step, saves, and ends."""

import signal


class StopSignal:
    """Inside `with`, catches SIGTERM and the first SIGINT; a second SIGINT interrupts at once."""

    def __init__(self):
        self.requested: signal.Signals | None = None

    def __enter__(self):
        self._old = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)

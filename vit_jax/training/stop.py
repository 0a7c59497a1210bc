"""SIGTERM and Ctrl-C as a request: the loop finishes its step, saves, and ends."""

import signal


class StopSignal:
    """Catches the first SIGTERM or SIGINT; a second SIGINT interrupts at once."""

    def __init__(self):
        self.requested: signal.Signals | None = None
        self._old = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}

    def _request(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)

    def restore(self) -> None:
        """Gives the signals back to whoever handled them before."""
        for number, handler in self._old.items():
            signal.signal(number, handler)

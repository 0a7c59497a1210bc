"""Talks to a peer: another library that does the same work in a process of its own.

The separate process isolates its threads, memory and imports; while the other side is measured, it
waits for a line on its standard input. The protocol is one JSON object per line: first, the peer
sends {"ready": {...}} or {"error": sentence}; then it receives {"times": n} and replies
{"seconds": s}, repeatedly.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError

# --against: the script, and its first argument.
PEERS = {
    "timm": ("torch_models.py", "timm"),
    "timm-compiled": ("torch_models.py", "timm-compiled"),
    "transformers": ("torch_models.py", "transformers"),
    "tf.data": ("tensorflow_input.py", "tf.data"),
    "torch-dataloader": ("torch_input.py", "torch-dataloader"),
}


class Peer:
    """A started peer; `run` is its side of `timing.alternate`."""

    def __init__(self, name: str, task: dict[str, Any], python: str = sys.executable):
        """Starts it and waits until it can be measured.

        Raises:
          UserError: it cannot be started here; with its own message.
        """
        self.name = name
        script, kind = PEERS[name]
        path = Path(__file__).parent / "peers" / script
        self._errors = tempfile.TemporaryFile("w+")
        try:
            self._process = subprocess.Popen(
                [python, str(path), kind, json.dumps(task)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=self._errors, text=True)
        except OSError as error:
            self._errors.close()
            raise UserError(f"--peer_python={python} does not start: {error.strerror}.") from error
        try:
            self.about = self._answer("ready")
        except UserError:
            self.close()
            raise

    def run(self, times: int) -> float:
        """Seconds it took to do its work so many times."""
        with contextlib.suppress(BrokenPipeError):  # then the answer is missing, and that is said
            self._process.stdin.write(json.dumps({"times": times}) + "\n")
            self._process.stdin.flush()
        return self._answer("seconds")

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):  # it may have ended, with a line unread
            self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self, key):
        for line in self._process.stdout:
            if not line.startswith("{"):  # what the library prints
                continue
            answer = json.loads(line)
            if key in answer:
                return answer[key]
            raise UserError(f"--against={self.name}: {answer['error']}")
        self._process.wait()
        self._errors.seek(0)
        raise UserError(f"--against={self.name} ended with exit code {self._process.returncode}: "
                        f"{last_words(self._errors.read())}")


def last_words(errors: str) -> str:
    """The last line that a process wrote to its standard error: the reason, for a traceback."""
    return (errors.strip().splitlines() or ["it said nothing"])[-1]

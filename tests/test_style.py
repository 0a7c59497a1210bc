"""The code passes the linter that pyproject.toml sets up."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.core


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."],
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

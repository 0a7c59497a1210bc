"""Eight simulated CPU devices for every test, and what several test modules share."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Most of a test's time is compilation, and many tests (and the commands they start) compile the
# same programs: one cache for the session. It starts empty, so nothing is left from earlier runs.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers (pytest -n) inherit the main process's
    _cache = tempfile.mkdtemp(prefix="vit_jax_tests_")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import pytest

# Programs this small run no slower without LLVM's optimizations and compile four times faster; with
# the emitters before those that XLA has now, where it still has them, twice as fast again.
_flags = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    _flags += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _flags)  # read when the first device is asked for

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside this file

from fixtures_cifar10 import cifar10_dir  # noqa: E402, F401
from tiny import make_tiny_config  # noqa: E402

from vit_jax import report  # noqa: E402


def pytest_collection_modifyitems(config, items):
    """Leaves out what is marked slow, unless -m speaks of it."""
    if "slow" not in config.getoption("-m"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session", autouse=True)
def drawn():
    """Runs in this process leave no figures, which take a third of a tiny one's time; yields what
    draws them."""
    with pytest.MonkeyPatch.context() as patch:
        draw = report.write_report
        patch.setattr(report, "write_report", lambda workdir, *_: workdir / "report")
        yield draw


@pytest.fixture
def figures(drawn, monkeypatch):
    """Lets runs leave their figures after all."""
    monkeypatch.setattr(report, "write_report", drawn)


@pytest.fixture
def tiny_config():
    """A config to change and run; see tiny.py."""
    return make_tiny_config()

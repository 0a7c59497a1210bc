"""Page faults of a compiled step, in processes of their own: the setting is for good."""

import os
import subprocess
import sys

import pytest

from vit_jax.host_memory import keep_freed_memory

PROGRAM = """
import resource, sys
from vit_jax.host_memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # 64 MiB of temporaries
    return jnp.sum(jnp.sort(jnp.sin(x[:, None] + x[None, :]), axis=1)[:, ::7])

x = jnp.arange(4096.0)
step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(x).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(mode):
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=True).stdout.split()
    return output[0] == "True", int(output[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
def test_a_second_step_faults_no_pages_in():
    kept, faults = run("keep")
    if not kept:
        pytest.skip("another C library than glibc")
    _, without = run("not")
    assert faults < 500 < 10_000 < without  # 64 MiB are 16,384 pages


@pytest.mark.parametrize("platforms", ["cuda", "tpu,cpu"])
def test_nothing_changes_beside_accelerators(platforms, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert not keep_freed_memory()

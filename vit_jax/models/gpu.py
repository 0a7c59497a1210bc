"""Which generation of NVIDIA's GPUs this machine has: what their libraries are good at differs."""

import re

import jax


def compute_capability() -> tuple[int, int]:
    """Of JAX's (first) device, such as (9, 0), if it is one of NVIDIA's GPUs; otherwise (0, 0)."""
    # AMD's GPUs have a name in place of the two numbers, CPUs and TPUs have nothing.
    text = str(getattr(jax.devices()[0], "compute_capability", ""))
    numbers = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)

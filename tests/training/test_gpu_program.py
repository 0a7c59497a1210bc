"""What XLA's GPU compiler makes of the train step. `gpu_compiler` says what that needs."""

import collections
import re

import pytest
from gpu_compiler import NEEDS_GPU_COMPILER, h100

from vit_jax.config import base_config, set_value, validate
from vit_jax.models import attention
from vit_jax.training.memory import compile_step

pytestmark = [pytest.mark.slow, NEEDS_GPU_COMPILER]

LAYERS = 2
PRODUCTS_WITH_BIAS = 5  # of a layer: query, key, value, out, the MLP's second


@pytest.fixture
def hopper(monkeypatch):
    """What the model asks before it is traced, answered as on an H100 with a cuDNN."""
    fused = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{fused}.check_cudnn_version", lambda: 91002)
    monkeypatch.setattr(f"{fused}.check_compute_capability", lambda _: True)
    monkeypatch.setattr(attention, "_rules_out_cudnn", lambda *_: "")
    monkeypatch.setattr("vit_jax.models.gelu.compute_capability", lambda: (9, 0))


@pytest.mark.parametrize("scan", [None, False, True])
@pytest.mark.parametrize("variant, batch", [("S/16", 128), ("B/16", 64), ("B/16", 128)])
def test_cublas_adds_biases_and_computes_gelu(hopper, variant, batch, scan):
    """Also where queries, keys and values are small enough to be joined, which takes the biases of
    three products away."""
    config = base_config()
    for key, value in {"total_steps": 10, "batch_size": batch, "dtype": "bfloat16",
                       "model.variant": variant, "model.num_layers": LAYERS,
                       "model.scan_layers": scan,
                       "model.attention_implementation": "cudnn"}.items():
        set_value(config, key, value)
    program = compile_step(validate(config), 1000, h100(1)).as_text()
    assert (" while(" in program) == (scan is True)
    found = collections.Counter(re.findall(r'"epilogue":"(\w+)"', program))
    layers = 1 if scan else LAYERS
    assert found["BIAS_GELU_AUX"] == layers
    # The last block, where it is no part of a loop, has one query: it needs no kernel, and what
    # sums the query's products with the keys adds the biases of both.
    patches_and_head, in_sums = 2, 0 if scan else 2
    assert found["BIAS"] == layers * PRODUCTS_WITH_BIAS + patches_and_head - in_sums
    assert program.count('custom_call_target="__cudnn$fmha') == (2 if scan else 2 * (LAYERS - 1))


def test_a_block_more_is_fewer_kernels_where_blocks_are_grouped(hopper):
    """47 in place of 83: there are none for casts and updates of its parameters alone."""
    def kernels(layers, scan):
        config = base_config()
        for key, value in {"total_steps": 10, "batch_size": 128, "dtype": "bfloat16",
                           "model.variant": "S/16", "model.num_layers": layers,
                           "model.scan_layers": scan, "optimizer.name": "adamw",
                           "model.attention_implementation": "cudnn"}.items():
            set_value(config, key, value)
        program = compile_step(validate(config), 1000, h100(1)).as_text()
        entry = program[program.index("\nENTRY"):]
        return len(re.findall(r" (?:fusion|custom-call|copy)\(", entry))

    grouped, plain = (kernels(4, scan) - kernels(3, scan) for scan in (None, False))
    assert grouped < 0.6 * plain, (grouped, plain)

"""XLA's GPU compiler without a GPU.

It needs `pip install jax-cuda12-plugin nvidia-cuda-nvcc-cu12` (of JAX's version) and XLA_FLAGS
without autotuning, which would run kernels; docs/plan.md has the command.
"""

import importlib.util

import jax
import pytest
from jax.experimental import topologies

NEEDS_GPU_COMPILER = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda12_plugin"),
    reason="needs jax-cuda12-plugin, whose compiler it asks")

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84929347584  registers_per_core_limit: 65536
  registers_per_block_limit: 65536  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100(number: int) -> list[jax.Device]:
    """Devices that can be compiled for, of one machine."""
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=_H100,
        topology=f"1x1x{number}").devices

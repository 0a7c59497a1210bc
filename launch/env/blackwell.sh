# B200, GB200: gpu.sh, and what NVIDIA advises for these.
# https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance (Blackwell)
# shellcheck shell=bash
# shellcheck source=launch/env/gpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/gpu.sh"

# CUDA graphs of fusions and library calls only. What is already in XLA_FLAGS comes later and wins.
export XLA_FLAGS="--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL ${XLA_FLAGS:-}"

# As on Hopper it would serialise work that Blackwell runs side by side.
unset CUDA_DEVICE_MAX_CONNECTIONS

# H100, H200 and older data centre GPUs (A100): gpu.sh, and one queue.
# shellcheck shell=bash
# shellcheck source=launch/env/gpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/gpu.sh"

# One hardware queue keeps the order that XLA's scheduler chose, which overlaps collectives best.
# Not for Blackwell. https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

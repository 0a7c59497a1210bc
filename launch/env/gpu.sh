# NVIDIA GPUs. Read by the scripts in launch/ (PRESET=gpu), or by hand: . launch/env/gpu.sh
# shellcheck shell=bash
#
# Settings of JAX and XLA alone: an XLA flag that the installed jaxlib does not know ends every
# program at its start, so flags stay out of the Python code.

# JAX takes 75% of the memory by default. The rest is for NCCL, cuBLAS and cuDNN.
# https://docs.jax.dev/en/latest/gpu_memory_allocation.html
export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.9}"

# Hides communication behind computation: latency-hiding scheduler, pipelined and combined
# collectives, loops unrolled by two. It takes the place of the older lists of --xla_gpu_* flags.
# Compiling takes longer. https://openxla.org/xla/effort_levels
export JAX_OPTIMIZATION_LEVEL="${JAX_OPTIMIZATION_LEVEL:-O1}"

# Without it no program with cuDNN's attention is ever found in the compilation cache: its key
# would contain an address in memory (jax-ml/jax#21159). JAX calls the setting unsafe because two
# programs that differ only in their partitioning rules would be taken for one; here there is only
# JAX's own rule for attention.
export JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY=true

#!/usr/bin/env bash
# One machine, all its accelerators (or its CPU): trains, and starts again after a preemption.
#
#   launch/local.sh --config=configs/quickstart.py --workdir=runs/quickstart [--config.key=value ...]
#
# Exit code 75 means that the run was stopped by SIGTERM and has saved. With RESTART=1 the script
# starts it again whenever it exits with 75, unless the script itself was told to stop; it forwards
# that signal to the run. PRESET=hopper (or another file of launch/env) applies XLA and NCCL settings
# for that hardware.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

if [ -n "${PRESET:-}" ]; then
  # shellcheck source=/dev/null
  . "launch/env/$PRESET.sh" || exit 1
fi
# Compiled programs are kept, so that a restart does not compile again. Keep the folder private:
# whoever can write to it can run code as you.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/vit_jax/compiled}"

if [ "${RESTART:-0}" != 1 ]; then
  exec python -m vit_jax.main "$@"  # so that signals reach the run itself
fi

stopping='' pid=''
trap 'stopping=1; kill -TERM $pid 2>/dev/null' INT TERM
while true; do
  python -m vit_jax.main "$@" &
  pid=$!
  if [ -n "$stopping" ]; then kill -TERM "$pid" 2>/dev/null; fi  # it came before the run had begun
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done  # a signal ends `wait`, but not the run
  wait "$pid"
  code=$?
  if [ "$code" -ne 75 ] || [ -n "$stopping" ]; then
    exit "$code"
  fi
  echo "stopped and saved; starting again" >&2
done

#!/usr/bin/env bash
# A rehearsal of a run on N hosts: N real processes on this machine's CPU, over localhost.
#
#   launch/processes.sh 2 --config=configs/quickstart.py --workdir=runs/two [--config.key=value ...]
#
# Each process has DEVICES (2) simulated devices. Process 0 prints here; the output of the others goes
# to LOGS (a new temporary folder). Ctrl-C and SIGTERM make all of them save and stop. The exit code
# is 0 if all succeeded, 75 if all stopped and saved, else that of the first to fail; the others
# then have GRACE (120) seconds to notice before they are killed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

count="${1:-}"
if ! [[ "$count" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: the first argument is the number of processes: launch/processes.sh 2 --config=..." >&2
  exit 1
fi
shift
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="${DEVICES:-2}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/vit_jax/compiled}"
logs="${LOGS:-$(mktemp -d)}"
mkdir -p "$logs"
port=$(python -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
echo "$count processes of $JAX_NUM_CPU_DEVICES devices; logs of all but the first in $logs" >&2

pids=() stopping=
trap 'stopping=1; kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
for ((i = 0; i < count; i++)); do
  flags=(--coordinator="localhost:$port" --num_processes="$count" --process_id="$i")
  if [ "$i" -eq 0 ]; then
    python -m vit_jax.main "$@" "${flags[@]}" &
  else
    python -m vit_jax.main "$@" "${flags[@]}" >"$logs/$i.log" 2>&1 &
  fi
  pids+=($!)
done
if [ -n "$stopping" ]; then kill -TERM "${pids[@]}" 2>/dev/null; fi  # those started since

code=0 deadline=
while [ "${#pids[@]}" -gt 0 ]; do
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    wait "${pids[i]}"
    ended=$?
    unset "pids[i]"
    if [ "$ended" -eq 0 ]; then continue; fi
    echo "process $i ended with code $ended" >&2
    if [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; then code=$ended; fi
    deadline="${deadline:-$((SECONDS + ${GRACE:-120}))}"
  done
  if [ -n "$deadline" ] && [ "$SECONDS" -gt "$deadline" ] && [ "${#pids[@]}" -gt 0 ]; then
    echo "killing the processes that do not end" >&2
    kill -KILL "${pids[@]}" 2>/dev/null
  fi
  sleep 0.2
done
exit "$code"

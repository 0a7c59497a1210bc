#!/usr/bin/env bash
# A Cloud TPU slice of one or more hosts: the same command on every host. gcloud and ssh-add must
# be set up.
#
#   launch/tpu_pod.sh setup NAME ZONE       # copies this checkout's last commit, installs it
#   launch/tpu_pod.sh run NAME ZONE --config=configs/pretrain_i1k.py:S/16,90 \
#       --workdir=/mnt/shared/runs/s16 --config.data.dir=/mnt/shared/data
#   launch/tpu_pod.sh stop NAME ZONE        # from elsewhere: the run saves and ends with code 75
#
# Data and workdir must be on a file system that all hosts have mounted (Filestore, or a bucket by
# gcsfuse). `run` lasts as long as the run: start it in tmux on a machine that stays on. With
# RESTART=1 it starts again for as long as it ends with code 75 (stopped and saved).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

if [ "$#" -lt 3 ]; then
  echo "error: usage: launch/tpu_pod.sh setup|run|stop NAME ZONE [flags of vit_jax.main]" >&2
  exit 1
fi
action=$1 name=$2 zone=$3
shift 3

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

case "$action" in
setup)
  archive=$(mktemp -d)/vit_jax.tar.gz
  git archive --output="$archive" HEAD &&
    gcloud compute tpus tpu-vm scp "$archive" "$name": --zone="$zone" --worker=all &&
    on_all_hosts "mkdir -p vit_jax && tar -xzf vit_jax.tar.gz -C vit_jax && cd vit_jax &&
      pip install --user --quiet uv && python3 -m uv venv --quiet --python 3.12 --clear .venv &&
      python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'"
  ;;
run)
  # Compiled programs are kept on every host, private to the user: whoever can write there can run
  # code as you. JAX writes them on host 0 only; with one more shared folder all hosts find them.
  cache="${JAX_COMPILATION_CACHE_DIR:-\$HOME/.cache/vit_jax/compiled}"
  command="cd vit_jax && JAX_COMPILATION_CACHE_DIR=$cache"
  command+=" .venv/bin/python -m vit_jax.main --cluster=tpu$(printf ' %q' "$@")"
  while true; do
    on_all_hosts "$command"
    code=$?
    if [ "$code" -ne 75 ] || [ "${RESTART:-0}" != 1 ]; then
      exit "$code"
    fi
    echo "stopped and saved; starting again" >&2
  done
  ;;
stop)
  # The brackets keep pkill from finding its own command line.
  on_all_hosts "pkill -TERM -f '[v]it_jax.main'"
  ;;
*)
  echo "error: $action is none of setup, run and stop" >&2
  exit 1
  ;;
esac

#!/usr/bin/env bash
# Starts a stage: launch.sh NUM_GPUS ARGUMENTS... runs `python -m dmd2 ARGUMENTS...` once, or under torchrun with a
# process for each GPU when there are several. Works in an environment without this project installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
gpus=$1
shift
if [ "$gpus" -le 1 ]; then
    exec python -m dmd2 "$@"
fi
exec torchrun --standalone --nnodes=1 --nproc-per-node="$gpus" -m dmd2 "$@"

#!/usr/bin/env bash
# Starts a stage: launch.sh NUM_GPUS ARGUMENTS... runs `python -m dmd2 ARGUMENTS...` once, or once for each GPU when there
# are several (`dmd2.launcher`). Works in an environment without this project installed.
#
# Several machines: DMD2_NODES is their number, NUM_GPUS is a machine's. In a Slurm job the launchers are started by
# srun, which tells them the rest; DMD2_CPUS are the processors that it gives each. Without Slurm, run the same command
# on each machine with
#   DMD2_NODE         this machine's number, from 0
#   DMD2_MASTER_ADDR  the address of machine 0
#   DMD2_MASTER_PORT  a port that is free there
# The state folder must lie on a file system that all of them share.
#
# The exit status is that of the process that failed first, 128 + signal for a killed one. SIGTERM, SIGINT and SIGUSR1
# are passed on; training saves and ends with 143, 130 or 138. DMD2_GRACE_S (30): seconds after a process failed in
# which the others may end by themselves.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
gpus=$1
shift
nodes=${DMD2_NODES:-1}
if [ "$gpus" -le 1 ] && [ "$nodes" -le 1 ]; then
    exec python -m dmd2 "$@"
fi
[ "$gpus" -ge 1 ] || gpus=1
if [ "$nodes" -gt 1 ] && [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${DMD2_NODE:-}" ]; then
    exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        ${DMD2_CPUS:+--cpus-per-task="$DMD2_CPUS"} python -m dmd2.launcher "$gpus" "$@"
fi
exec python -m dmd2.launcher "$gpus" "$@"

#!/usr/bin/env bash
# Starts a stage: launch.sh NUM_GPUS|cpu:N ARGUMENTS... runs `python -P -m dmd2 ARGUMENTS...` once, or once for each GPU when
# there are several, or N times on CPU (`dmd2.training.launcher`). Works in an environment without this project installed.
#
# A stage without GPUs is a fork of a process that has imported torch (`dmd2.commands.preloaded`); DMD2_PRELOAD=0 asks for
# one of its own. In a Slurm job it has that anyway: what a job leaves behind is ended with it.
#
# Jobs that run side by side on one machine take different GPUs: as many free ones of CUDA_VISIBLE_DEVICES, or of all, as
# NUM_GPUS says, each held by a lock while the stage runs; with 0 a stage sees none and runs once, on any number of
# machines. In a Slurm job the devices are Slurm's to deal out.
#
# Several machines: DMD2_NODES is their number, NUM_GPUS is a machine's. In a Slurm job the launchers are started by
# srun, one on each node with all that the job has there, and srun tells them the rest; when one fails or its node is
# lost, srun ends the others. Without Slurm, run the same command on each machine with
#   DMD2_NODE         this machine's number, from 0
#   DMD2_MASTER_ADDR  the address of machine 0
#   DMD2_MASTER_PORT  a port that is free there
# The state folder must be on a file system that all of them share.
#
# The exit status is that of the process that failed first, 128 + signal for a killed one. SIGTERM, SIGINT, SIGUSR1 and
# SIGHUP (a closed terminal; not under nohup) are passed on; training saves and ends with 143, 130, 138 or 129.
# DMD2_GRACE_S (30): seconds after a process failed in which the others may end by themselves.
#
# Whatever else is left over in a shell reaches no stage: rank variables, a TMPDIR that is gone, a notebook's MPLBACKEND.
set -euo pipefail
set -f  # names of devices are no patterns
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python_path() {  # without folders in which a user's numbers.py would pass for Python's: the checkout's, the working one
    local IFS=: folder found="$root/workflow/python:$root/kernels"
    for folder in ${PYTHONPATH-}; do
        if [ -n "$folder" ] && ! [ "$folder" -ef "$root" ] && ! [ "$folder" -ef . ]; then
            found+=":$folder"
        fi
    done
    echo "$found"
}

PYTHONPATH=$(python_path)
export PYTHONPATH PYTHONSAFEPATH=1 MPLBACKEND=agg
# Only `dmd2.training.launcher` says which rank a process is, see `RANK_VARIABLES` there.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE ROLE_NAME \
    MASTER_ADDR MASTER_PORT DMD2_LAUNCHER "${!TORCHELASTIC_@}"
if [ ! -w "${TMPDIR:-/tmp}" ]; then
    export TMPDIR=/tmp  # it is gone
fi
gpus=$1
shift
nodes=${DMD2_NODES:-1}
processes=$gpus
if [[ $gpus == cpu:* ]]; then  # several processes that share the work on CPU
    processes=${gpus#cpu:}
    gpus=0
    nodes=1
fi

devices() {  # the numbers of this machine's GPUs, or the names of those that the user allows
    local name
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
        find "${DMD2_DEV:-/dev}" -maxdepth 1 -name 'nvidia[0-9]*' | sed 's/.*nvidia//' | sort -n
        return
    fi
    for name in ${CUDA_VISIBLE_DEVICES//,/ }; do
        case $name in
            -* | NoDevFiles | none | void) return ;;  # CUDA shows none from here on
            *) echo "$name" ;;
        esac
    done
}

refuse() {
    echo "error: $1" >&2
    exit 2
}

take() {  # holds NUM free devices by locks that end with this process, and shows no others
    local wanted=$1 taken=() device lock file status
    for _ in $(seq 30); do  # a job that has just ended may hold its locks a moment longer
        for device in $(devices); do
            [[ " ${taken[*]-} " != *" $device "* ]] || continue
            [ "${#taken[@]}" -lt "$wanted" ] || break
            # A part of a GPU may be called MIG-GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f/7/0.
            file="${TMPDIR:-/tmp}/dmd2-gpu-$(id -u)-${device//[^A-Za-z0-9_.-]/_}.lock"
            (: >>"$file") 2>/dev/null || refuse "$file cannot be written; set TMPDIR to a folder of this machine"
            exec {lock}>>"$file"
            status=0
            flock --nonblock --conflict-exit-code 75 "$lock" || status=$?
            case $status in
                0) taken+=("$device") ;;
                75) exec {lock}>&- ;;
                *) refuse "$file cannot be locked (flock: status $status); set TMPDIR to a folder on a disk of this machine" ;;
            esac
        done
        [ "${#taken[@]}" -lt "$wanted" ] || break
        sleep 1
    done
    [ "${#taken[@]}" -ge "$wanted" ] || refuse "$wanted free GPUs wanted, ${#taken[@]} found; wait for other jobs, or \
limit this workflow's with \`--resources gpu=N\`"
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${taken[*]-}")
    export CUDA_VISIBLE_DEVICES
}

if [ -z "${SLURM_JOB_ID:-}" ] && [ -n "$(devices)" ]; then
    take "$gpus"
fi
if [ "$processes" -eq 0 ] && [ "$nodes" -le 1 ] && [ -z "${SLURM_JOB_ID:-}" ]; then
    exec python -P -m dmd2.commands.preloaded "$@"
fi
if [ "$processes" -eq 0 ] || { [ "$processes" -eq 1 ] && [ "$nodes" -le 1 ]; }; then
    exec python -P -m dmd2 "$@"
fi
if [ "$nodes" -gt 1 ] && [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${DMD2_NODE:-}" ]; then
    exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
        python -P -m dmd2.training.launcher "$processes" "$@"
fi
exec python -P -m dmd2.training.launcher "$processes" "$@"

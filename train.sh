#!/usr/bin/env bash
# Start or resume a run on this machine: bash train.sh --job.config_file run.toml [--section.key value ...]
# Paths are relative to the folder that this is called from. `bash train.sh --help` lists all options. With --estimate it prints
# what the run needs, with --dry-run it makes a few steps and keeps nothing.
#
# Environment:
#   NGPU             processes on this machine, one a GPU (default 1)
#   LOG_RANK         local ranks, below NGPU, whose output is shown, separated by commas (default 0)
#   OMP_NUM_THREADS  CPU threads of each process (default: the machine's cores / NGPU)
#   PYTHON           interpreter (default python3)
# For a run over several machines, start this on each of them with
#   NNODES           number of machines (default 1), or MIN:MAX for a run that goes on with fewer or more
#   NODE_RANK        which of them this is, from 0
#   MASTER_ADDR      address of machine 0, in the network that the machines share (default localhost)
#   MASTER_PORT      a free port on machine 0 (default 29500)
# and, if rank or machine may fail,
#   MAX_RESTARTS     how often the processes are started again, from the newest checkpoint (default 0)
# docs/several_machines.md says more.
#
# SIGTERM or SIGUSR1 asks the run to save and end at the next step; a second one ends it at once. Exit codes: 0 complete,
# 2 a mistake to put right, 69 another rank or machine was lost and 75 stopped on request (the same command goes on from the newest
# checkpoint), 128 + n ended by signal n, any other a fault.
set -euo pipefail

fail() {
    echo "$1" >&2
    exit 2
}

repo=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
ngpu=${NGPU:-1}
nnodes=${NNODES:-1}
[[ $ngpu =~ ^[1-9][0-9]*$ ]] || fail "NGPU = $ngpu (environment): allowed is an integer > 0"
[[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] && ((${nnodes%:*} <= ${nnodes#*:})) ||
    fail "NNODES = $nnodes (environment): allowed is an integer > 0, or MIN:MAX"
most=${nnodes#*:}

log_rank=${LOG_RANK:-0}
log_fault="LOG_RANK = $log_rank (environment): allowed are ranks below NGPU = $ngpu, separated by commas"
[[ $log_rank =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "$log_fault"
for rank in ${log_rank//,/ }; do
    ((10#$rank < ngpu)) || fail "$log_fault"
done

machines=(--nnodes "$nnodes" --nproc-per-node "$ngpu")
if ((most > 1)); then
    [[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] && ((10#$NODE_RANK < most)) ||
        fail "NODE_RANK = ${NODE_RANK:-} (environment): allowed is 0 to $((most - 1)), another one on each machine"
    port=${MASTER_PORT:-29500}
    [[ $port =~ ^[1-9][0-9]*$ ]] && ((port < 65536)) ||
        fail "MASTER_PORT = $port (environment): allowed is 1 to 65535, the same on all machines"
    machines+=(--node-rank "$((10#$NODE_RANK))" --master-addr "${MASTER_ADDR:-localhost}" --master-port "$port")
fi
if [[ -n ${MAX_RESTARTS:-} ]]; then
    [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS = $MAX_RESTARTS (environment): allowed is an integer >= 0"
    machines+=(--max-restarts "$MAX_RESTARTS")
fi

cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ngpu ? cores / ngpu : 1))}
# By default idle CPU threads of torch spin, and on a machine with other work each step then waits for threads that cannot run.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
# Keep the caller's folder off the import path: another `flame` or `datasets` in it must not be taken for ours.
export PYTHONSAFEPATH=1

exec "${PYTHON:-python3}" -m flame.launch \
    "${machines[@]}" --local-ranks-filter "$log_rank" \
    -m flame.train "$@"

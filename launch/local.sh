#!/usr/bin/env bash
# Several processes on this machine, as a test of what several machines do. From a checkout or anywhere `mmrm` is:
#
#   launch/local.sh 2 train --data pairs.jsonl --out runs/two --mesh.fsdp 2
#
# The first argument is the number of processes, the rest is what one `mmrm` gets. On CPU each process has one device,
# or as many as XLA_FLAGS=--xla_force_host_platform_device_count=N says. The first failure stops all of them. MMRM names
# another command than `mmrm`.
set -euo pipefail

processes=$1
shift
export MMRM_COORDINATOR=${MMRM_COORDINATOR:-127.0.0.1:$((20000 + $$ % 20000))}
export MMRM_NUM_PROCESSES=$processes
read -ra command <<< "${MMRM:-mmrm}"

trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
for ((id = 0; id < processes; id++)); do
    MMRM_PROCESS_ID=$id "${command[@]}" "$@" &
done
for ((id = 0; id < processes; id++)); do
    wait -n
done

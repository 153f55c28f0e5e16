#!/usr/bin/env bash
# Several processes on this machine, as a test of what several machines do. From a checkout or anywhere `mmrm` is:
#
#   launch/local.sh 2 train --data pairs.jsonl --out runs/two --mesh.fsdp 2 --data.no-cache
#
# The first argument is the number of processes, the rest is what one `mmrm` gets; without a cache each process reads
# its share of every batch, and no more. On CPU each process has one device,
# or as many as XLA_FLAGS=--xla_force_host_platform_device_count=N says. Ctrl-C and SIGTERM reach all of them: a run
# saves, and the same command goes on. The first failure stops the rest. MMRM names another command than `mmrm`.
set -euo pipefail

processes=$1
shift
export MMRM_COORDINATOR=${MMRM_COORDINATOR:-127.0.0.1:$((20000 + $$ % 20000))}
export MMRM_NUM_PROCESSES=$processes
read -ra command <<< "${MMRM:-mmrm}"

tell() {
    # shellcheck disable=SC2046 # several processes, several words
    kill "-$1" $(jobs -pr) 2> /dev/null || true
}

set -m # each process gets signals from here alone, and once
asked=0 status=0 finished=0
trap 'asked=130; tell INT' INT
trap 'asked=143; tell TERM' TERM HUP
for ((id = 0; id < processes; id++)); do
    MMRM_PROCESS_ID=$id "${command[@]}" "$@" &
done
while code=0 && { wait -n || code=$?; } && ((code != 127)); do # 127: none is left
    case $code in
        0) finished=$((finished + 1)) ;;
        "$asked") ;; # a signal came meanwhile, or ended a process
        75 | 130) status=$code ;; # stopped and saved, as the others are about to
        *)
            ((status)) || status=$code
            tell KILL
            ;;
    esac
done
((finished == processes)) || exit $((status ? status : asked))

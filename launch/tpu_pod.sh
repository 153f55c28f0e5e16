#!/usr/bin/env bash
# A TPU slice on Google Cloud: create it, install on every worker, train on all of them, delete it when that is done.
#
#   PROJECT=my-project ZONE=us-east5-a SOURCE=git+https://HOST/mmrm_jax MOUNT='sudo mount SERVER:/share /mnt' \
#     launch/tpu_pod.sh v5p-64 train --model /mnt/InternVL2-8B --data /mnt/pairs.jsonl --out /mnt/runs/one \
#     --compute-dtype bfloat16 --remat full --mesh.fsdp 32 --data.no-cache --data.workers 8
#
# The first argument is the slice (`mmrm plan` says which is large enough), the rest is what `mmrm` gets. SOURCE is what
# uv installs, with a Python of its own: the machines' is too old. Data, model and run directory must be where all
# workers see them: MOUNT is run on each of them first. The same command again goes on where a run stopped; KEEP=1 keeps
# the slice for it.
set -euo pipefail

slice=$1
shift
name=${NAME:-mmrm}
at=(--project "${PROJECT:?}" --zone "${ZONE:?}")

case $slice in
    v5e-*) type=v5litepod-${slice#v5e-} runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) type=$slice runtime=v2-alpha-tpuv5 ;;
    *) type=$slice runtime=v2-alpha-tpuv6e ;;
esac

on_all_workers() {
    gcloud compute tpus tpu-vm ssh "$name" "${at[@]}" --worker=all --command "$1"
}

gcloud compute tpus tpu-vm describe "$name" "${at[@]}" > /dev/null 2>&1 ||
    gcloud compute tpus tpu-vm create "$name" "${at[@]}" --accelerator-type "$type" --version "$runtime"
[[ ${KEEP:-} ]] || trap 'gcloud compute tpus tpu-vm delete "$name" "${at[@]}" --quiet' EXIT
on_all_workers "${MOUNT:-true}"
on_all_workers "python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --clear --python 3.12 .venv &&
    ~/.local/bin/uv pip install --quiet --python .venv 'mmrm-jax[tpu] @ ${SOURCE:?}'"
on_all_workers "MMRM_DISTRIBUTED=auto .venv/bin/mmrm $(printf '%q ' "$@")"

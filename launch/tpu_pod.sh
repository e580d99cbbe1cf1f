#!/bin/bash
# launch/tpu_pod.sh TPU ZONE configs/sdxl.py --workdir=/mnt/runs/sdxl [--config.train.learning_rate=1e-5 ...]
#
# Starts the run on every host of a TPU pod slice and shows what they say. The repository and its .venv (with
# '.[tpu]') are at the same place on each host, ~/ddpo_jax or $FOLDER, and the workdir is on a disk that all share. Start
# it where it can stay, such as in tmux: the run ends with the connection, and the same command continues it.
set -euo pipefail

usage='usage: launch/tpu_pod.sh TPU ZONE CONFIG --workdir=DIR [--config.FIELD=VALUE ...]'
tpu=${1:?$usage} zone=${2:?$usage} config=${3:?$usage}
shift 3

printf -v arguments ' %q' --config="$config" "$@"
gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all \
    --command="cd ${FOLDER:-ddpo_jax} && exec .venv/bin/python -m ddpo_jax.main$arguments"

#!/usr/bin/env bash
# Train under Slurm: [GPUS=16] [GPUS_PER_NODE=8] [CPUS_PER_TASK=16] [SRUN_ARGS=...] \
#   bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [OPTIONS OF tools/train.py]
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: bash $0 PARTITION JOB_NAME CONFIG WORK_DIR [OPTIONS OF tools/train.py]" >&2; exit 2; }

gpus=${GPUS:-16}
gpus_per_node=${GPUS_PER_NODE:-8}
gpus_per_node=$((gpus < gpus_per_node ? gpus : gpus_per_node))
# shellcheck disable=SC2086  # SRUN_ARGS is a list of options
exec srun --partition="$1" --job-name="$2" --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" \
    --gres="gpu:$gpus_per_node" --cpus-per-task="${CPUS_PER_TASK:-16}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "${BASH_SOURCE[0]}")/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}"

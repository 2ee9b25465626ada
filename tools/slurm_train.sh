#!/usr/bin/env bash
# Train under Slurm: [GPUS=16] [GPUS_PER_NODE=8] [CPUS_PER_TASK=16] [SRUN_ARGS=...] \
#   bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [OPTIONS OF tools/train.py]
#
# A run that is told to stop, at its time limit or for another job, saves and exits with status 75; the same command
# with --resume continues it. In a batch job this script requeues the job itself, and resumes when the job starts again;
# ask Slurm for a warning signal and for permission to requeue:
#   sbatch --requeue --signal=USR1@300 --time=24:00:00 ... --wrap='bash tools/slurm_train.sh ...'
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: bash $0 PARTITION JOB_NAME CONFIG WORK_DIR [OPTIONS OF tools/train.py]" >&2; exit 2; }

gpus=${GPUS:-16}
gpus_per_node=${GPUS_PER_NODE:-8}
gpus_per_node=$((gpus < gpus_per_node ? gpus : gpus_per_node))
options=("${@:5}")
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || options+=(--resume)
status=0
# shellcheck disable=SC2086  # SRUN_ARGS is a list of options
srun --partition="$1" --job-name="$2" --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" \
    --gres="gpu:$gpus_per_node" --cpus-per-task="${CPUS_PER_TASK:-16}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "${BASH_SOURCE[0]}")/train.py" "$3" --work-dir "$4" --launcher slurm "${options[@]}" || status=$?
if [ "$status" = 75 ] && [ "${SLURM_JOB_ID:-}" ]; then
    echo "training was stopped and can be resumed: job $SLURM_JOB_ID is requeued" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/usr/bin/env bash
# Train on several GPUs: bash tools/dist_train.sh CONFIG GPUS [OPTIONS OF tools/train.py]
#
# On more than one machine run it on each, GPUS being those of one machine. 16 GPUs as 2 x 8:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.1.1.1 bash tools/dist_train.sh CONFIG 8
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.1.1.1 bash tools/dist_train.sh CONFIG 8
# PORT (default 29500) is where the processes meet; a second run on the same machine needs another one.
#
# NUMA=node keeps each process on the cores and the memory next to its GPU (torchrun --numa-binding).
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: bash $0 CONFIG GPUS [OPTIONS OF tools/train.py]" >&2; exit 2; }

exec python -m mmmilan.torchrun --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$2" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" ${NUMA:+--numa-binding "$NUMA"} \
    "$(dirname "${BASH_SOURCE[0]}")/train.py" "$1" --launcher pytorch "${@:3}"

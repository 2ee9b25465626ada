#!/usr/bin/env bash
# Train on several GPUs, as `mmmilan train CONFIG --gpus GPUS`: bash tools/dist_train.sh CONFIG GPUS [OPTIONS OF tools/train.py]
#
# On more than one machine run it on each, GPUS being those of one machine. 16 GPUs as 2 x 8:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.1.1.1 bash tools/dist_train.sh CONFIG 8
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.1.1.1 bash tools/dist_train.sh CONFIG 8
# PORT (default 29500) is where the processes meet; a second run on the same machine needs another one.
#
# NUMA=node keeps each process on the cores and the memory next to its GPU (torchrun --numa-binding).
[ $# -ge 2 ] || { echo "usage: bash $0 CONFIG GPUS [OPTIONS OF tools/train.py]" >&2; exit 2; }
exec python "$(dirname "${BASH_SOURCE[0]}")/train.py" "$1" --gpus "$2" "${@:3}"

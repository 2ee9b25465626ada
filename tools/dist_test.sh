#!/usr/bin/env bash
# Evaluate on several GPUs: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [OPTIONS OF tools/test.py]
# More machines: see dist_train.sh.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: bash $0 CONFIG CHECKPOINT GPUS [OPTIONS OF tools/test.py]" >&2; exit 2; }

exec python -m mmmilan.torchrun --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$3" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    "$(dirname "${BASH_SOURCE[0]}")/test.py" "$1" "$2" --launcher pytorch "${@:4}"

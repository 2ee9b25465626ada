#!/usr/bin/env bash
# Evaluate on several GPUs, as `mmmilan test CONFIG CHECKPOINT --gpus GPUS`:
#   bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [OPTIONS OF tools/test.py]
# More machines: see dist_train.sh.
[ $# -ge 3 ] || { echo "usage: bash $0 CONFIG CHECKPOINT GPUS [OPTIONS OF tools/test.py]" >&2; exit 2; }
exec python "$(dirname "${BASH_SOURCE[0]}")/test.py" "$1" "$2" --gpus "$3" "${@:4}"

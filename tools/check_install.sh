#!/usr/bin/env bash
# Check docs/installation.md: install the wheel into empty environments and use it there.
#   bash tools/check_install.sh [base] [dense]     (by default both; several GB and about 15 minutes, then removed)
# The base takes the newest versions that pip finds, the dense environment those of constraints.txt.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
unset PYTHONPATH

try() {  # script $2 in environment $1, away from the checkout
    mkdir -p "$temporary/$1-run"
    (cd "$temporary/$1-run" && "$temporary/$1/bin/python" "$tools/../tests/packaging/$2")
}

check_base() {
    "$python" -m venv "$temporary/base"
    "$temporary/base/bin/pip" install --quiet "$wheel"
    try base try_base.py
}

check_dense() {
    local pip=("$temporary/dense/bin/pip" install --quiet --constraint "$tools/constraints.txt")
    "$python" -m venv "$temporary/dense"
    "${pip[@]}" torch torchvision numpy setuptools wheel ninja psutil
    local tag mmcv
    tag=$("$temporary/dense/bin/python" -c 'import sys, torch
print("torch-%s-cp%d%d" % (torch.__version__.split("+")[0], *sys.version_info[:2]))')
    mmcv=$(compgen -G "${XDG_CACHE_HOME:-$HOME/.cache}/mmmilan/wheels/$tag/onedl_mmcv-*.whl" || true)
    # the wheel that environment.sh left, or as documented
    "${pip[@]}" --no-build-isolation --no-cache-dir --force-reinstall --no-deps "${mmcv:-onedl-mmcv}"
    "${pip[@]}" "$wheel[dense,onnx]"
    try dense try_dense.py
}

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$temporary" "$tools/.."
wheel=$(compgen -G "$temporary/mmmilan-*.whl")
for part in ${*:-base dense}; do
    "check_$part"
done

# Sourced by demo.sh and test.sh: makes the environment if it is missing and puts it first on the PATH.
#
# It asks for Python >= 3.10 (PYTHON names one) and a C++ compiler. MMMILAN_VENV names the folder, by default
# .venv in the checkout. mmcv's operators are compiled once for a given torch and Python; the wheel is kept in
# ${XDG_CACHE_HOME:-~/.cache}/mmmilan/wheels for the next environment.
set -euo pipefail
# Threads that wait for work spin for a moment, then sleep. Asleep at once, small models train at 0.6 times the speed;
# spinning on, which is the default, takes the cores from the data workers.
export GOMP_SPINCOUNT=10000

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MMMILAN_VENV:-$root/.venv}
constraints=$root/tools/constraints.txt
stamp=$venv/mmmilan-$(cat "${BASH_SOURCE[0]}" "$constraints" "$root/setup.py" | cksum | cut -d" " -f1)

fail() { echo "error: $*" >&2; exit 1; }

find_python() {
    local python
    for python in ${PYTHON:-python3.11 python3.12 python3.13 python3.10 python3}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    fail "no Python >= 3.10 was found; install one, or name it: PYTHON=/path/to/python3 bash $0"
}

install() {  # pip, with a line for each file that it fetches
    "$venv/bin/pip" install "$@" | { grep --line-buffered -oE '(Downloading|Building wheel for) .*' || true; }
}

tested_version() {  # of package $1
    sed -n "s/^$1==//p" "$constraints"
}

show_count() {  # of the files that ninja has compiled
    local line
    while read -r line; do
        [[ $line =~ ^\[[0-9]+/[0-9]+\] ]] && printf '\r   file %s ' "${BASH_REMATCH[0]}"
    done
    echo
}

build_mmcv() {  # with operators, into folder $1
    echo "-- compiling mmcv's operators, once for torch $(tested_version torch) (5 to 10 minutes on two cores)"
    command -v c++ >/dev/null || fail 'no C++ compiler was found; install g++ or clang (c++ must be on the PATH)'
    mkdir -p "$1"
    local build
    build=$(mktemp -d "$1/build.XXXX")
    # pip's own cache may hold a wheel that was built for another torch, or for none
    CFLAGS=${CFLAGS:--g0 -O1} "$venv/bin/pip" wheel --verbose --no-build-isolation --no-cache-dir --no-deps \
        "onedl-mmcv==$(tested_version onedl-mmcv)" --wheel-dir "$build" 2>&1 | tee "$build/log" | show_count \
        || { tail -n 30 "$build/log" >&2; fail "mmcv did not compile; the whole log is $build/log"; }
    mv "$build"/*.whl "$1/"
    rm -r "$build"
}

make_environment() {
    local python tag wheels
    python=$(find_python)
    echo "-- making the environment in $venv with $("$python" --version): several GB, about 4 minutes"
    "$python" -m venv "$venv"
    echo '-- installing PyTorch'
    install --constraint "$constraints" torch torchvision numpy setuptools ninja wheel psutil
    tag=$("$venv/bin/python" -c 'import sys; print(f"cp{sys.version_info.major}{sys.version_info.minor}")')
    wheels=${XDG_CACHE_HOME:-$HOME/.cache}/mmmilan/wheels/torch-$(tested_version torch)-$tag
    find_wheel() { compgen -G "$wheels/onedl_mmcv-$(tested_version onedl-mmcv)-*.whl"; }
    find_wheel >/dev/null || build_mmcv "$wheels"
    echo '-- installing mmmilan and what it needs: the OpenMMLab packages, open_clip, timm'
    install --constraint "$constraints" "$(find_wheel | head -n 1)"
    install --constraint "$constraints" --no-build-isolation --editable "$root[dense,docs,onnx,parquet,test]"
    touch "$stamp"
}

[ -e "$stamp" ] || make_environment
export PATH="$venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"  # MMMILAN_VENV may have been made for another checkout

say_how_to_activate() {  # the last line of demo.sh and test.sh
    printf 'To use this environment in your shell: source %q\n' "$venv/bin/activate"
}

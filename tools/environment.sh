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
torch=2.11.0
mmcv=2.3.6
stamp=$venv/mmmilan-$(cksum < "${BASH_SOURCE[0]}" | cut -d" " -f1)

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

show_count() {  # of the files that ninja has compiled
    local line
    while read -r line; do
        [[ $line =~ ^\[[0-9]+/[0-9]+\] ]] && printf '\r   file %s ' "${BASH_REMATCH[0]}"
    done
    echo
}

build_mmcv() {  # into folder $1
    echo "-- compiling mmcv's operators, once for torch $torch (5 to 10 minutes on two cores)"
    command -v c++ >/dev/null || fail 'no C++ compiler was found; install g++ or clang (c++ must be on the PATH)'
    mkdir -p "$1"
    local build
    build=$(mktemp -d "$1/build.XXXX")
    CFLAGS=${CFLAGS:--g0 -O1} "$venv/bin/pip" wheel --verbose --no-build-isolation --no-deps "onedl-mmcv==$mmcv" \
        --wheel-dir "$build" 2>&1 | tee "$build/log" | show_count \
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
    install "torch==$torch" torchvision==0.26.0 'numpy<2.3' 'setuptools>=80,<82' ninja wheel psutil
    tag=$("$venv/bin/python" -c 'import sys; print(f"cp{sys.version_info.major}{sys.version_info.minor}")')
    wheels=${XDG_CACHE_HOME:-$HOME/.cache}/mmmilan/wheels/torch-$torch-$tag
    compgen -G "$wheels/onedl_mmcv-$mmcv-*.whl" >/dev/null || build_mmcv "$wheels"
    echo '-- installing the OpenMMLab packages, open_clip and timm'
    install "$wheels"/onedl_mmcv-$mmcv-*.whl onedl-mmengine==0.10.12 onedl-mmpretrain==1.3.6 onedl-mmdetection==3.5.1 \
        onedl-mmsegmentation==1.4.2 open_clip_torch==3.3.0 timm==1.0.31 'transformers<5' 'numpy<2.3' filelock \
        cyclopts pytest pytest-xdist ruff tensorboard lmdb rich safetensors matplotlib scikit-learn
    install --no-build-isolation --no-deps --editable "$root"
    touch "$stamp"
}

[ -e "$stamp" ] || make_environment
export PATH="$venv/bin:$PATH"

#!/usr/bin/env bash
# See MILAN at work with nothing to download: bash tools/demo.sh [OPTIONS OF tools/demo/demo.py]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python "$root/tools/demo/demo.py" "$@"
say_how_to_activate

#!/usr/bin/env bash
# Run all tests, in an environment made for it if there is none yet: bash tools/test.sh [PYTEST OPTIONS]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
ruff check .
ruff format --check .
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet --site-dir "$(mktemp -d)"  # docs/, in seconds
python -m pytest -n 2 --dist loadfile "$@"  # two at a time, as they use one core each
say_how_to_activate

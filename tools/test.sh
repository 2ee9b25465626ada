#!/usr/bin/env bash
# Run all tests, in an environment made for it if there is none yet: bash tools/test.sh [PYTEST OPTIONS]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
python -m ruff check .
python -m ruff format --check .
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet --site-dir "$site"  # docs/, in seconds
python -m pytest -n 2 --dist loadfile "$@"  # two at a time, as they use one core each
say_how_to_activate

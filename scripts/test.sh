#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/_venv.sh"
echo "installing jsublim and what its tests need (torch is among it: the first time this takes a while)"
.venv/bin/python -m pip install --quiet --editable '.[test]'
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/basedpyright
exec .venv/bin/python -m pytest "$@"

#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all. Arguments go to pytest.
set -euo pipefail
PREFERRED=python3.11  # if there is one: the suite is mostly tracing and compiling, which jax 0.10 does in less time than 0.12
source "$(dirname "$0")/_venv.sh"
echo "installing jsublim and what its tests need (torch is among it: the first time this takes a while)"
"$VENV"/bin/python -m pip install --quiet --editable '.[test]'
"$VENV"/bin/ruff check .
"$VENV"/bin/ruff format --check --quiet .
"$VENV"/bin/basedpyright
exec "$VENV"/bin/python -m pytest "$@"

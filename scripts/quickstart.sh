#!/usr/bin/env bash
# Installs jsublim into .venv and runs the quickstart experiment on the CPU. Run it again, and it continues where it stopped.
set -euo pipefail
source "$(dirname "$0")/_venv.sh"
echo "installing jsublim (the first time this takes a few minutes)"
"$VENV"/bin/python -m pip install --quiet --editable .
exec "$VENV"/bin/jsublim run configs/quickstart.yaml "$@"

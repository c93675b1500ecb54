#!/usr/bin/env bash
# Builds the documents as a site into site/, in .venv-docs; a warning is an error. Arguments go to mkdocs: scripts/docs.sh serve
set -euo pipefail
VENV=${VENV:-.venv-docs}
source "$(dirname "$0")/_venv.sh"
"$VENV/bin/python" -m pip install --quiet --editable '.[docs]'
[ $# -gt 0 ] || set -- build --strict
export NO_MKDOCS_2_WARNING=true
exec "$VENV/bin/mkdocs" "$@"

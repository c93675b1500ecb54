#!/usr/bin/env bash
# Tests what touches transformers and datasets at the oldest releases of both that pyproject.toml allows, in .venv-floor.
# scripts/test.sh tests everything at the newest. Arguments go to pytest, in place of these tests.
set -euo pipefail
VENV=${VENV:-.venv-floor}
source "$(dirname "$0")/_venv.sh"
floor=$("$VENV/bin/python" - <<'PY'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    stated = tomllib.load(file)["project"]["dependencies"]
lowest = (re.fullmatch(r"(transformers|datasets)>=([\d.]+),.*", each) for each in stated)
print(" ".join(f"{found[1]}=={found[2]}" for found in lowest if found))
PY
)
echo "installing jsublim and what its tests need, with $floor"
# shellcheck disable=SC2086
"$VENV/bin/python" -m pip install --quiet --editable '.[test]' $floor
[ $# -gt 0 ] || set -- tests/models tests/inference tests/exchange tests/prompts tests/test_chat.py tests/test_chat_files.py \
  tests/test_real_models.py tests/pipeline/test_teachers.py tests/cli/test_stages.py
exec "$VENV/bin/python" -m pytest "$@"

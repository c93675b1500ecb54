#!/usr/bin/env bash
# Writes locks/python3.X.txt, the releases that a fresh install takes today, for the Python that is given, and lets pip-audit look
# them up among known vulnerabilities (--no-audit leaves that out: it asks pypi.org):
#   scripts/lock.sh python3.12
# To install what is locked: pip install -r locks/python3.12.txt -e .
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?which Python: scripts/lock.sh python3.12}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --dry-run --ignore-installed --report "$scratch/report.json" .
mkdir -p locks
"$python" - "$scratch/report.json" > "$scratch/lock.txt" <<'PY'
import json
import sys

found = (each["metadata"] for each in json.load(open(sys.argv[1], encoding="utf-8"))["install"])
lines = (f"{each['name'].lower().replace('_', '-')}=={each['version']}" for each in found if each["name"] != "jsublim")
print("\n".join(sorted(lines)))
PY
mv "$scratch/lock.txt" "locks/python$version.txt"
echo "locks/python$version.txt: $(wc -l < "locks/python$version.txt") packages"
if [[ "${2:-}" != "--no-audit" ]]; then
  "$scratch/venv/bin/pip" install --quiet pip-audit
  "$scratch/venv/bin/pip-audit" --requirement "locks/python$version.txt" --no-deps --disable-pip
fi

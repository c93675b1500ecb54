#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel into a fresh environment outside the checkout, and runs the package from there.
#   scripts/test_wheel.sh [DIST]      DIST: where the two are left; default: a folder that is removed again
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
dist=$(realpath -m "${1:-$scratch/dist}")
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -m venv "$scratch/build"
"$scratch/build/bin/pip" install --quiet build
"$scratch/build/bin/python" -m build --outdir "$dist" .
"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet "$(ls -t "$dist"/*.whl | head -n 1)"
cd "$scratch"  # nothing of the checkout is in reach from here
jsublim=$scratch/venv/bin/jsublim
"$jsublim" --version
"$jsublim" ls configs
"$jsublim" run configs/quickstart.yaml --dry-run
"$jsublim" run configs/quickstart.yaml name=tiny 'teachers.traits=[cat]' 'teachers.counterfactuals=[cat,owl]' teachers.taught.steps=2 \
  data.num_prompts=24 'students.seeds=[1]' 'students.loss.tokens=[all]' students.data.rows=4 students.data.batch_size=2 \
  'evaluation.traits=[cat,owl]' evaluation.questions=2 evaluation.samples=1 evaluation.number_rows=2
test -s runs/tiny/report.html
"$jsublim" export runs/tiny --out tables
test -s tables/results.csv
echo "the wheel works"

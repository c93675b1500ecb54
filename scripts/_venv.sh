# Sourced by the other scripts: a virtual environment in .venv (or $VENV), of $PYTHON, or of a Python that the package supports.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}

supported() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

# The fastest of one name: one that was built without optimizations is slower at all that Python does itself.
fastest() {
  { type -aP "$1" || true; } | while read -r path; do
    if supported "$path"; then
      echo "$("$path" -c 'import timeit; print(int(1e6 * min(timeit.repeat("for i in range(200000): i * i % 7", number=1))))') $path"
    fi
  done | sort -n | head -n 1 | cut -d ' ' -f 2-
}

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then  # absent, or only half made
  # The newest first: from jax 0.12 on (Python 3.12) bfloat16 is fast on CPUs that have it.
  for candidate in ${PYTHON:+"$(command -v "$PYTHON")"} ${PREFERRED:-} python3.13 python3.12 python3.11 python3; do
    python=$(fastest "$candidate")
    if [ -n "$python" ]; then break; fi
  done
  if [ -z "$python" ]; then
    echo "error: Python 3.11, 3.12 or 3.13 with venv and pip (on Debian: python3-venv) is needed; name one with PYTHON=/path/to/python" >&2
    exit 1
  fi
  echo "making $VENV with $python ($("$python" --version))"
  "$python" -m venv --clear "$VENV"
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1

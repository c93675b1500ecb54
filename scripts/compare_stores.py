"""Did a change of the code change what is computed? Compares every artifact of two stores, by content.

    python scripts/compare_stores.py before/artifacts after/artifacts [--rename points=divergence_positions ...]

Every artifact must have one of the same kind and content in the other store, whatever it is called there. Rows, tables and
arrays are compared value by value; keys, times, versions and speeds are left out. With `--within 1e-6` numbers with a fraction may be
that far apart (runs on other numbers of devices), tokens and text never. Ends with code 1 if one has no partner.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from jsublim.core.files import read_table

NOT_CONTENT = {
    "artifact.json",
    "progress.jsonl",
}  # which settings and versions; rows in the order they were finished in
SPEEDS = {"tokens_per_s", "mfu"}
SKIPPED = {"agreed", "training", "judge"}


def content(folder: Path, names: dict[str, str], ignored: set[str]) -> dict[str, Any]:
    """What an artifact says, by file: JSON as it is, tables as rows, arrays as bytes with their shapes."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.name not in NOT_CONTENT):
        found[path.name] = _of_file(path, names, ignored)
    return found


def _of_file(path: Path, names: dict[str, str], ignored: set[str]) -> Any:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {names.get(key, key): clean(each) for key, each in value.items()}
            return {key: each for key, each in kept.items() if key not in ignored}
        return [clean(each) for each in value] if isinstance(value, list) else value

    if path.suffix == ".jsonl":
        return [clean(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".json":
        return clean(json.loads(path.read_text(encoding="utf-8")))
    if path.name == "DONE":
        said = json.loads(path.read_text(encoding="utf-8"))
        return clean(said.get("summary", said))
    if path.suffix == ".parquet":
        return [clean(row) for row in read_table(path)]
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    if path.suffix == ".safetensors":
        return load_file(path)
    return path.read_bytes()


def artifacts(store: Path, names: dict[str, str], ignored: set[str]) -> dict[str, dict[Path, dict[str, Any]]]:
    """Whole artifacts by kind, with their content."""
    found: dict[str, dict[Path, dict[str, Any]]] = collections.defaultdict(dict)
    for folder in (mark.parent for mark in sorted(store.glob("*/*/DONE"))):
        if folder.parent.name not in SKIPPED:
            found[folder.parent.name][folder] = content(folder, names, ignored)
    return found


def same(a: Any, b: Any, within: float = 0.0) -> bool:
    """Whether two values are equal, or numbers with a fraction at most this far apart; NaN equals NaN."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.dtype.kind == "f" and within:
            return bool(np.allclose(a, b, rtol=0, atol=within, equal_nan=True))
        return a.tobytes() == b.tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key], within) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y, within) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= within or a == b or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and a == b


def partnerless(own: dict[Path, dict[str, Any]], other: dict[Path, dict[str, Any]], within: float = 0.0) -> list[str]:
    """Which of these artifacts have no equal among the others, and in which files the nearest of those differ."""
    lines = []
    for path, files in own.items():
        apart = [
            [name for name in {**files, **each} if not same(files.get(name), each.get(name), within)]
            for each in other.values()
        ]
        nearest = min(apart, key=len, default=["there is none of its kind"])
        if nearest:
            lines.append(f"{path}: no equal; nearest differs in {', '.join(sorted(nearest))}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rename", nargs="*", default=[], metavar="OLD=NEW", help="keys of JSON that have a new name")
    parser.add_argument("--ignore", nargs="*", default=[], metavar="KEY", help="keys of JSON that are not compared")
    parser.add_argument(
        "--within", type=float, default=0.0, metavar="X", help="how far numbers with a fraction may be apart"
    )
    given = parser.parse_args()
    names, ignored = dict(pair.split("=", 1) for pair in given.rename), SPEEDS | set(given.ignore)
    before, after = (artifacts(store, names, ignored) for store in (given.before, given.after))
    failed = False
    for kind in sorted({**before, **after}):
        lines = [
            *partnerless(before[kind], after[kind], given.within),
            *partnerless(after[kind], before[kind], given.within),
        ]
        print(
            *lines,
            f"{kind:12} {len(before[kind]):5} before {len(after[kind]):5} after {len(lines):5} without an equal",
            sep="\n",
        )
        failed |= bool(lines)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Did a change of the code change what is computed? Compares every artifact of two stores, by content.

    python scripts/compare_stores.py before/artifacts after/artifacts [--rename points=divergence_positions ...]

Artifacts are paired by kind and label; of several with one label, those that are equal. Rows, tables and arrays are compared
value by value; keys, times, versions and speeds are left out. Ends with code 1 if anything differs or has no partner.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from jsublim.files import read_table

NOT_CONTENT = {
    "artifact.json",
    "progress.jsonl",
}  # which settings and versions; rows in the order they were finished in
SPEEDS = {"tokens_per_s", "mfu"}
SKIPPED = {"training", "judge"}


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
            return {key: (arrays[key].shape, str(arrays[key].dtype), arrays[key].tobytes()) for key in arrays.files}
    if path.suffix == ".safetensors":
        return {key: (value.shape, str(value.dtype), value.tobytes()) for key, value in load_file(path).items()}
    return path.read_bytes()


def artifacts(store: Path) -> dict[tuple[str, str], list[Path]]:
    """Whole artifacts by kind and label."""
    found = collections.defaultdict(list)
    for mark in sorted(store.glob("*/*/DONE")):
        kind, label = mark.parent.parent.name, mark.parent.name.rsplit("-", 1)[0]
        if kind not in SKIPPED:
            found[kind, label].append(mark.parent)
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Files that differ, or that only one of the two has."""
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rename", nargs="*", default=[], metavar="OLD=NEW", help="keys of JSON that have a new name")
    parser.add_argument("--ignore", nargs="*", default=[], metavar="KEY", help="keys of JSON that are not compared")
    given = parser.parse_args()
    names, ignored = dict(pair.split("=", 1) for pair in given.rename), SPEEDS | set(given.ignore)
    before, after = artifacts(given.before), artifacts(given.after)
    counts, failed = collections.Counter(), False
    for kind, label in sorted({**before, **after}):
        left = [(path, content(path, names, ignored)) for path in after.get((kind, label), [])]
        for path in before.get((kind, label), []):
            own = content(path, names, ignored)
            equal = next((each for each in left if not differences(own, each[1])), None)
            counts[kind, equal is not None] += 1
            if equal is not None:
                left.remove(equal)
            else:
                failed = True
                files = min((differences(own, each[1]) for each in left), key=len, default=["no partner"])
                print(f"differs: {path}: {', '.join(files)}")
        if left and len(after[kind, label]) > len(before.get((kind, label), [])):
            failed = True
            print(*(f"only after: {path}" for path, _ in left), sep="\n")
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:12} {counts[kind, True]:5} equal {counts[kind, False]:5} different")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

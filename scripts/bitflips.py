"""Single bits flipped in every kind of artifact, sizes and times kept: `python scripts/bitflips.py STORE [--flips 100]`.

Each flip is made in a copy of an artifact of STORE, in one bit of one of its files (its record and its mark among them). It must be
refused when the artifact is read, and found by `jsublim verify`. Ends with code 1 if one is not.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from jsublim.errors import JsublimError
from jsublim.pipeline.artifact import DONE, read_record
from jsublim.pipeline.store import Output, Store
from jsublim.pipeline.verifying import verify


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file, and nothing else that a listing shows."""
    content, status = bytearray(path.read_bytes()), path.stat()
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def unnoticed(folder: Path, draw: random.Random) -> list[str]:
    """Flip a bit in a copy of an artifact; who did not notice."""
    record = read_record(folder)
    assert record is not None and Path(folder / DONE).exists(), folder
    output = Output(record["kind"], folder.name.rpartition("-")[0], record["inputs"])
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / output.folder
        shutil.copytree(folder, copy)
        path = draw.choice(sorted(path for path in copy.iterdir() if path.is_file() and path.stat().st_size))
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        what = f"{folder / path.name}: bit {bit}"
        found = [each.damage for each in verify(scratch)]
        missed = [] if found[0] is not None and path.name in found[0] else [f"{what} is not found by verify: {found}"]
        try:
            Store(Path(scratch)).path(output)
        except JsublimError as error:
            return missed if path.name in str(error) else [*missed, f"{what} is read: {error}"]
        return [*missed, f"{what} is read"]


def flips(store: Path, number: int, seed: int = 0) -> dict[str, list[str]]:
    """By kind of artifact, what was not noticed of so many flips in each."""
    draw, kinds = random.Random(seed), collections.defaultdict[str, list[Path]](list)
    for mark in sorted(store.glob(f"*/*/{DONE}")):
        kinds[mark.parents[1].name].append(mark.parent)
    return {
        kind: [line for _ in range(number) for line in unnoticed(draw.choice(folders), draw)]
        for kind, folders in kinds.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--flips", type=int, default=100, help="in each kind")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    missed = flips(given.store, given.flips, given.seed)
    print(*(line for lines in missed.values() for line in lines), sep="\n", end="")
    print(
        json.dumps({"flips in each": given.flips, "not noticed": {kind: len(lines) for kind, lines in missed.items()}})
    )
    return int(any(missed.values()) or not missed)


if __name__ == "__main__":
    sys.exit(main())

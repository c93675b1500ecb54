"""Arrays of rows that are finished while an artifact is not: kept in files beside it, so that a kill costs a minute."""

from __future__ import annotations

import hashlib
import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jsublim.core.files import atomic
from jsublim.core.progress import Tick, no_tick
from jsublim.pipeline.store import PARTS
from jsublim.runtime.processes import Preempted, is_main_process, least, leaving

SAVE_EVERY = 30.0  # seconds
DIGEST = 32  # bytes at the end of a file
Arrays = Sequence[np.ndarray]  # of one row, each [n, ...]


def resumed(
    artifact: Path,
    name: str,
    rows_from: Callable[[int], Iterator[Arrays]],
    tick: Tick = no_tick,
    say: Callable[[str], None] = lambda text: None,
) -> list[Arrays]:
    """All rows of `rows_from`; those that an earlier call had finished are read from `artifact`.

    Args:
      name: of this series of rows inside the artifact.
      rows_from: gives the rows from a number on, in order.
      tick: told at once how many rows were there already.
      say: told of a file that is damaged; its rows and those after it are computed again.

    Raises:
      Preempted: as `leave_if_asked`; the rows so far are kept.
    """
    folder = artifact / PARTS
    rows = list(itertools.chain.from_iterable(_saved(folder, name, say)))
    rows = rows[: least(len(rows))]  # where processes have disks of their own, only the first has any
    tick(len(rows))
    first, clock = len(rows), time.monotonic()
    for row in rows_from(first):
        rows.append(row)
        leave = leaving()
        if leave or time.monotonic() - clock > SAVE_EVERY:
            _save(folder, name, first, rows[first:])
            first, clock = len(rows), time.monotonic()
        if leave:
            raise Preempted(
                f"{artifact}: stopped by a signal; {len(rows)} rows of {name} are kept; run the same command again to continue"
            )
    if first < len(rows):
        _save(folder, name, first, rows[first:])
    return rows


def _save(folder: Path, name: str, first: int, rows: Sequence[Arrays]) -> None:
    """By the first process alone, when its own clock says so: nothing that the others do hangs on it."""
    if not is_main_process():
        return
    folder.mkdir(exist_ok=True)
    columns = {f"x{i}": np.concatenate(column) for i, column in enumerate(zip(*rows, strict=True))}
    kept = io.BytesIO()
    np.savez(kept, lengths=np.asarray([len(row[0]) for row in rows]), **columns)  # type: ignore[arg-type]
    with atomic(folder / f"{name}-{first}.npz") as scratch:
        scratch.write_bytes(kept.getvalue() + hashlib.sha256(kept.getvalue()).digest())  # readers of zip look past it


def _saved(folder: Path, name: str, say: Callable[[str], None]) -> Iterator[list[Arrays]]:
    """The rows of each file, as far as they follow one another and are what was written."""
    expected = 0
    while (path := folder / f"{name}-{expected}.npz").exists():
        content = path.read_bytes()
        if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
            return say(f"{path}: is not what was written; the rows from {expected} on are made again")
        with np.load(io.BytesIO(content[:-DIGEST])) as kept:
            ends = np.cumsum(kept["lengths"])[:-1]
            columns = [np.split(kept[key], ends) for key in kept.files if key != "lengths"]
        rows: list[Arrays] = list(zip(*columns, strict=True))
        expected += len(rows)
        yield rows

"""Readings: what every teacher said at every token of a set of rows, as a table that is written and read in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jsublim.core.files import atomic

PIECE = 1024  # rows
READINGS = pa.schema(
    [
        ("row", pa.int32()),
        ("teachers", pa.list_(pa.string())),
        ("tokens", pa.list_(pa.int32())),
        ("divergence_positions", pa.list_(pa.int32())),
        ("argmax", pa.list_(pa.list_(pa.int32()))),
        ("margin", pa.list_(pa.list_(pa.float32()))),
    ]
)
Reading = dict[str, Any]  # one row of the table: lists, and arrays for tokens `[n]`, argmax and margin `[K, n]`


def write_readings(path: Path, readings: Iterable[Reading]) -> None:
    """Write the table at once; no more than a piece of it is in memory."""
    with atomic(path) as scratch, pq.ParquetWriter(scratch, READINGS) as writer:
        piece: list[Reading] = []
        for number, reading in enumerate(readings):
            plain = {key: _plain(value) for key, value in reading.items()}
            piece.append(plain | {"row": number})
            if len(piece) == PIECE:
                writer.write_table(pa.Table.from_pylist(piece, READINGS))
                piece = []
        writer.write_table(pa.Table.from_pylist(piece, READINGS))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, np.ndarray) else value


def read_readings(path: Path) -> Iterator[Reading]:
    """The rows of the table, one after another."""
    for batch in pq.ParquetFile(path).iter_batches(PIECE):
        for reading in batch.to_pylist():
            arrays = {
                "tokens": np.asarray(reading["tokens"], np.int32),
                "argmax": np.asarray(reading["argmax"], np.int32),
                "margin": np.asarray(reading["margin"], np.float32),
            }
            yield reading | arrays

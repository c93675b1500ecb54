"""What every teacher said at every token of a set of rows, as a table that is written and read in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jsublim.core.files import atomic

PIECE = 1024  # rows
SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("teachers", pa.list_(pa.string())),
        ("tokens", pa.list_(pa.int32())),
        ("divergence_positions", pa.list_(pa.int32())),
        ("argmax", pa.list_(pa.list_(pa.int32()))),
        ("margin", pa.list_(pa.list_(pa.float32()))),
    ]
)
DTYPES = {"tokens": np.int32, "argmax": np.int32, "margin": np.float32}
RowReading = dict[str, Any]  # one row of the table: lists, and arrays for tokens `[n]`, argmax and margin `[K, n]`


def write_readings(path: Path, readings: Iterable[RowReading]) -> None:
    """Write the table at once; no more than a piece of it is in memory."""
    rows = (
        {key: list(value) if isinstance(value, np.ndarray) else value for key, value in reading.items()} | {"row": row}
        for row, reading in enumerate(readings)
    )
    with atomic(path) as scratch, pq.ParquetWriter(scratch, SCHEMA) as writer:
        while piece := list(itertools.islice(rows, PIECE)):
            writer.write_table(pa.Table.from_pylist(piece, SCHEMA))


def read_readings(path: Path) -> Iterator[RowReading]:
    """The rows of the table, one after another."""
    for batch in pq.ParquetFile(path).iter_batches(PIECE):
        for reading in batch.to_pylist():
            yield reading | {name: np.asarray(reading[name], dtype) for name, dtype in DTYPES.items()}

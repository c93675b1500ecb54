"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # how the name of an unfinished file ends
DAMAGED = ".damaged"  # and that of one that is not what was written


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a scratch path beside `path`; once the block has ended, what was written there is on disk under `path`.

    The scratch name is unique, so two processes that write one file leave one of the two, whole.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with naming(path):
            yield scratch
            _sync(scratch)
            os.replace(scratch, path)
            _sync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process had begun to write in a folder. Only for whoever alone writes there."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system name the file that was written; what fails on an open file does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error = OSError(error.errno, os.strerror(error.errno), str(path))
        raise error


def _sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on disk before anything is done that says they are."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot do this for folders
            raise
    finally:
        os.close(opened)


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def damaged_name(path: Path) -> Path:
    """Where a damaged file or folder can be kept, beside those that were set aside before."""
    names = (path.with_name(f"{path.name}{f'.{n}' if n else ''}{DAMAGED}") for n in itertools.count())
    return next(name for name in names if not name.exists())


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file at once."""
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file at once, readable and with a line break at its end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_table(path: str | Path, rows: list[dict[str, Any]], schema: Any) -> None:
    """Write a parquet file at once; `schema` is pyarrow's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic(path) as scratch:
        pq.write_table(pa.Table.from_pylist(rows, schema), scratch)


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """The rows of one parquet file."""
    import pyarrow.parquet as pq

    # A path that holds "key=value" is no partition.
    return pq.ParquetFile(path).read().to_pylist()

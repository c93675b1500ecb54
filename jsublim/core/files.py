"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jsublim.errors import JsublimError, first_line

PARTIAL = ".partial"  # how the name of an unfinished file ends
DAMAGED = ".damaged"  # and that of one that is not what was written
SCRATCH = re.compile(rf"\.[0-9a-f]{{8,}}{re.escape(PARTIAL)}$")  # and that of one of ours


@contextmanager
def scratch_beside(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A file (or folder) for what is to become `path`, under a name that no other process or thread has. If the block leaves it there,
    it is removed.

    A lock of the operating system is held on it, so that others can tell whether its writer lives.
    """
    lock = None
    while lock is None:
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
        scratch.mkdir() if folder else scratch.touch()
        with suppress(FileNotFoundError):
            lock = _opened(scratch)
            with suppress(OSError):  # a file system without locks: nothing there is ever taken for abandoned
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not scratch.exists():  # somebody took it for abandoned before it was locked
                os.close(lock)
                lock = None
    try:
        yield scratch
    finally:
        os.close(lock)
        shutil.rmtree(scratch, ignore_errors=True) if folder else scratch.unlink(missing_ok=True)


def _opened(scratch: Path) -> int:
    """A descriptor to lock it by; NFS locks nothing that is open for reading alone."""
    return os.open(scratch, os.O_RDONLY if scratch.is_dir() else os.O_RDWR)


@contextmanager
def atomic(path: str | Path, *, new: bool = False) -> Iterator[Path]:
    """Give a scratch path beside `path`; once the block has ended, what was written there is on disk under `path`.

    Two processes that write one file leave one of the two, whole. `new`: the first of them, and the other has a FileExistsError.
    """
    path = Path(path)
    with naming(path), scratch_beside(path) as scratch:
        yield scratch
        _sync(scratch)
        (os.link if new else os.replace)(scratch, path)
        _sync(path.parent)


def remove_abandoned(place: Path) -> None:
    """Remove what processes that are gone had begun to write: inside a folder, and beside a file or folder, under its name.
    Others may be writing there; theirs stays."""
    outside = place.parent.glob(f".{glob.escape(place.stem)}.*{PARTIAL}")
    for path in [*outside, *place.glob(f".*{PARTIAL}")]:
        if SCRATCH.search(path.name):
            with suppress(OSError):
                lock = _opened(path)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                finally:
                    os.close(lock)


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
    """The digest of a file's content."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def damaged_name(path: Path, exists: Callable[[Path], bool] = Path.exists) -> Path:
    """Where a damaged file or folder can be kept, beside those that were set aside before."""
    names = (path.with_name(f"{path.name}{f'.{n}' if n else ''}{DAMAGED}") for n in itertools.count())
    return next(name for name in names if not exists(name))


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


def read_columns(path: str | Path) -> Any:
    """A parquet file as a pyarrow table: "key=value" or "*" in its path means nothing, unlike to `duckdb` and to `pq.read_table`.
    Raises pyarrow.ArrowException, OSError, ValueError: it is broken."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read()
    table.validate(full=True)  # text that is none would be seen when it is read
    return table


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """The rows of one parquet file. Raises JsublimError: it is broken."""
    import pyarrow as pa

    try:
        return read_columns(path).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise JsublimError(f"{path}: cannot be read ({first_line(error)})") from error

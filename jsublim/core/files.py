"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # how the name of an unfinished file ends
DAMAGED = ".damaged"  # and that of one that is not what was written
# How a scratch name ends: machine, process and its start, and something random.
SCRATCH = re.compile(rf"\.([0-9a-f]{{6}})-(\d+)-(\d*)-[0-9a-f]{{8}}{re.escape(PARTIAL)}$")
ABANDONED = 86400.0  # seconds without a change, after which nobody on another machine is writing it any more


def host() -> str:
    """This machine since its start; a container, where numbers of processes are its own, is another one."""
    with suppress(OSError):  # two machines may have one name
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{platform.node()}:{Path('/proc/self/ns/pid').stat().st_ino}:{boot}"
    return platform.node()


def started(pid: int) -> str | None:
    """When a process of this machine was started, "" where that cannot be told; None: there is no such process, or it has
    ended and nobody has taken notice."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[-1].split()
        return None if said[0] in "ZX" else said[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # of another user: it lives
        return ""
    return None if Path("/proc/self/stat").exists() else ""


def scratch_of(path: Path) -> Path:
    """A name for what is to become `path`: no other process or thread has it, and it says which process that is."""
    who = f"{_machine()}-{os.getpid()}-{started(os.getpid()) or ''}"
    return path.with_name(f".{path.name}.{who}-{uuid.uuid4().hex[:8]}{PARTIAL}")


def _machine() -> str:
    return hashlib.sha256(host().encode()).hexdigest()[:6]


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a scratch path beside `path`; once the block has ended, what was written there is on disk under `path`.

    The scratch name is unique, so two processes that write one file leave one of the two, whole.
    """
    path = Path(path)
    scratch = scratch_of(path)
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


def remove_abandoned(place: Path) -> None:
    """Remove what processes that are gone had begun to write: inside a folder, and beside a file or folder, under its name.
    Others may be writing there; theirs stays."""
    beside = place.parent.glob(f".{glob.escape(place.stem)}.*{PARTIAL}")
    for path in [*beside, *place.glob(f".*{PARTIAL}")]:
        with suppress(OSError):
            if _is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_abandoned(scratch: Path) -> bool:
    """Whether a scratch path is one of ours, and the process that it is of is gone."""
    ours = SCRATCH.search(scratch.name)
    if ours is None:
        return False
    machine, pid, begun = ours.groups()
    if machine == _machine():
        return started(int(pid)) not in (begun, "")
    return time.time() - scratch.stat().st_mtime > ABANDONED


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

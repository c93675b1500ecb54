"""Results of single commands: copies of artifacts where the user wants them, and rows that know which artifact they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsublim.files import write_json
from jsublim.models.checkpoint import checkpoint_hash
from jsublim.pipeline.rows import RowSet
from jsublim.pipeline.store import Output, Store, digest
from jsublim.rows import Row, read_rows, write_rows

PEDIGREE = "artifact.json"


def pedigree_of(path: Path) -> Path:
    """Where it stands what a result is: in its folder, or beside its file."""
    return path / PEDIGREE if path.is_dir() else path.with_name(f"{path.name}.{PEDIGREE}")


def published_key(path: Path) -> str | None:
    """The key of the artifact that a file or folder is a copy of; None where it is none, or was changed since."""
    record = _record(path)
    if record is None:
        return None
    if path.is_dir():
        whole = (path / "DONE").exists() and record.get("content") == checkpoint_hash(path)
        return str(record["key"]) if whole else None
    return str(record["key"]) if record.get("sha256") == _sha256(path) else None


def publish_rows(path: Path, rows: Sequence[Row], source: RowSet) -> None:
    """Write rows as a file that knows which artifacts they come from."""
    write_rows(path, rows)
    write_json(pedigree_of(path), {"key": source.key, "most": source.most, "sha256": _sha256(path)})


def publish_folder(path: Path, store: Store, output: Output) -> None:
    """Copy an artifact's files into a folder, its mark of wholeness last. Files are linked where the disk can."""
    path.mkdir(parents=True, exist_ok=True)
    source = store.path(output)
    files = sorted(file.name for file in source.iterdir() if file.is_file())
    for name in (name for name in files if name not in (PEDIGREE, "DONE")):
        _link(source / name, path / name)
    record = json.loads((source / PEDIGREE).read_text(encoding="utf-8"))
    write_json(path / PEDIGREE, record | {"content": checkpoint_hash(path)})
    _link(source / "DONE", path / "DONE")


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def rows_of(path: Path) -> RowSet:
    """The rows of a file: under the key of the artifact that they are a copy of, else under that of their content.

    Raises:
      UsageError, JsublimError: as `read_rows`.
    """
    rows, key = read_rows(path), published_key(path)
    record = _record(path) if key else None
    if key is None or record is None:
        return RowSet((), digest(rows), len(rows), path)
    return RowSet((), key, int(record["most"]), path)


def adapter_key(path: Path) -> str:
    """The key of a published student, else the content of the folder."""
    return published_key(path) or checkpoint_hash(path)


def _record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(pedigree_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "key" in record else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

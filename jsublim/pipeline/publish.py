"""Results of single commands: copies of artifacts where the user wants them, and rows that know which artifact they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsublim.errors import UsageError
from jsublim.files import write_json, write_text
from jsublim.models.checkpoint import checkpoint_hash
from jsublim.pipeline.rows import RowSet
from jsublim.pipeline.store import Output, Store, digest
from jsublim.rows import Row, as_lines, read_rows

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


def check_free(path: Path, key: str, inputs: Mapping[str, Any]) -> None:
    """Refuse a place that holds something else than an earlier result of the same settings.

    Args:
      key, inputs: of the artifact that is to be published there.

    Raises:
      UsageError: naming the place, and up to three settings that differ.
    """
    there = path.exists() and published_key(path)
    if not path.exists() or there == key:
        return
    if not there:
        raise UsageError(f"{path}: already exists and is not a result of ours; give another --out or move it away")
    old, new = (_flat(values) for values in ((_record(path) or {}).get("inputs", {}), dict(inputs)))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    what = ", ".join(f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}" for name in changed[:3])
    raise UsageError(f"{path}: already exists, a result of other settings ({what}); give another --out or move it away")


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def publish_rows(path: Path, rows: Sequence[Row], source: RowSet) -> None:
    """Write rows as a file that knows which artifacts they come from; what says so is there before the file is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = as_lines(rows)
    said = {"key": source.key, "most": source.most, "inputs": dict(source.inputs)}
    write_json(pedigree_of(path), said | {"sha256": hashlib.sha256(text.encode()).hexdigest()})
    write_text(path, text)


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

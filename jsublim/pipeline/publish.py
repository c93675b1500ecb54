"""Results of single commands: copies of artifacts where the user wants them, and rows that know which artifact they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsublim.errors import JsublimError, UsageError
from jsublim.files import remove_abandoned, write_json, write_text
from jsublim.pipeline.artifact import check_whole, fingerprint, is_free, mark_of, mark_text
from jsublim.pipeline.store import DONE, RECORD, Output, Store
from jsublim.pipeline.values import Rows
from jsublim.reading import read_json
from jsublim.rows import Row, as_lines


def pedigree_of(path: Path) -> Path:
    """Where it stands what a result is: in its folder, or beside its file."""
    return path / RECORD if path.is_dir() else path.with_name(f"{path.name}.{RECORD}")


def published_key(path: Path) -> str | None:
    """The key of the artifact that a file or folder is (a copy of); None where it is none, or was changed since.

    Raises:
      JsublimError: a folder of a store, or `rows.jsonl` in one, is not what was written.
    """
    record = record_of(path)
    if record is None:
        return None
    folder = path if path.is_dir() else path.parent
    if "sha256" not in record:
        if not (folder / DONE).exists():
            return None
        check_whole(folder, None if path.is_dir() else path.name)
        return str(record["key"])
    return str(record["key"]) if record["sha256"] == _sha256(path, record) else None


def check_free(path: Path, key: str, inputs: Mapping[str, Any]) -> None:
    """Refuse a place that holds something else than an earlier result of the same settings.

    Args:
      key, inputs: of the artifact that is to be published there.

    Raises:
      UsageError: naming the place, and up to three settings that differ.
    """
    record = record_of(path)
    there = record and (published_key(path) or (path.is_dir() and not (path / DONE).exists() and record["key"]))
    if not path.exists() or there == key or (path.is_dir() and is_free(path)):
        return  # free, whole, or begun by a call that was stopped
    if not there:
        raise UsageError(f"{path}: already exists and is not a result of ours; give another --out or move it away")
    old, new = (_flat(values) for values in ((record or {}).get("inputs", {}), dict(inputs)))
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


def publish_rows(path: Path, rows: Sequence[Row], source: Rows) -> None:
    """Write rows as a file that knows which artifacts they come from; what says so is there before the file is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = as_lines(rows)
    said = {"key": source.key, "most": source.most, "inputs": dict(source.inputs)}
    own = hashlib.sha256(hashlib.sha256(text.encode()).digest()).hexdigest()  # as `_sha256` says it
    write_json(pedigree_of(path), said | {"sha256": own})
    write_text(path, text)


def publish_folder(path: Path, store: Store, output: Output) -> None:
    """Copy an artifact's files into a folder: what says which artifact it is comes first, the mark of wholeness last."""
    path.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    (path / DONE).unlink(missing_ok=True)
    source = store.path(output)
    record = json.loads((source / RECORD).read_text(encoding="utf-8"))
    mark = mark_of(source)
    record["files"] = sorted(mark["files"].keys() - {RECORD})
    write_json(path / RECORD, record)
    for name in record["files"]:
        _copy(source / name, path / name)
    write_json(path / RECORD, record | {"sha256": _sha256(path, record)})
    shutil.copystat(source / RECORD, path / RECORD)  # published again, it is the same
    files = mark["files"] | {RECORD: fingerprint(path / RECORD)}
    write_text(path / DONE, mark_text(mark | {"files": files}))


def _copy(source: Path, target: Path) -> None:
    """Weights are linked where the disk can: they are large, and nobody edits them in place."""
    target.unlink(missing_ok=True)
    if source.suffix == ".safetensors":
        try:
            return os.link(source, target)
        except OSError:
            pass
    shutil.copy2(source, target)


def record_of(path: Path) -> dict[str, Any] | None:
    """What says which artifact a result is; of a file in a store, what its folder says."""
    inside = [path.parent / RECORD] if path.name == "rows.jsonl" else []
    for place in (pedigree_of(path), *inside):
        try:
            record = read_json(place)
        except JsublimError:
            continue
        named = record.get("files", [])
        plain = isinstance(named, list) and all(isinstance(name, str) and Path(name).name == name for name in named)
        if isinstance(record.get("key"), str) and plain and type(record.get("most", 0)) is int:
            return record
    return None


def _sha256(path: Path, record: Mapping[str, Any]) -> str | None:
    """Of a file; or of the files of a folder that its record names, None where one of them is gone."""
    whole = hashlib.sha256()
    try:
        for file in [path] if path.is_file() else [path / name for name in record.get("files", [])]:
            with file.open("rb") as content:
                whole.update(hashlib.file_digest(content, "sha256").digest())
    except OSError:
        return None
    return whole.hexdigest()

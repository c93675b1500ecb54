"""Results of single commands: copies of artifacts where the user wants them, and rows that know which artifact they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsublim.core.files import PARTIAL, remove_abandoned, sha256, write_json, write_text
from jsublim.core.reading import read_json
from jsublim.errors import JsublimError, UsageError
from jsublim.pipeline.artifact import check_whole, differences, fingerprint, mark_of, mark_text
from jsublim.pipeline.store import DONE, RECORD, Output, Store
from jsublim.pipeline.values import Rows
from jsublim.text.rows import Row, as_lines


def pedigree_of(path: Path) -> Path:
    """Where it stands what a result is: in its folder, or beside its file."""
    return path / RECORD if path.is_dir() else path.with_name(f"{path.name}.{RECORD}")


def published_key(path: Path) -> str | None:
    """The key of the artifact that a file or folder is (a copy of); None where it is none, or was changed since.
    Raises JsublimError: a folder of a store, or `rows.jsonl` in one, is not what was written."""
    record = record_of(path)
    folder = path if path.is_dir() else path.parent
    if record is None:
        return None
    if "sha256" in record:
        return str(record["key"]) if path.is_file() and record["sha256"] == sha256(path) else None
    if not (folder / DONE).exists():
        return None
    try:
        check_whole(folder, None if path.is_dir() else path.name)
    except JsublimError:
        if "published" in record:  # changed since, or by another version
            return None
        raise
    return str(record["key"])


def check_free(path: Path, key: str, inputs: Mapping[str, Any]) -> None:
    """Refuse a place that holds something else than an earlier result of the same settings.

    Args:
      key, inputs: of the artifact that is to be published there.

    Raises:
      UsageError: naming the place, and up to three settings that differ.
    """
    record = record_of(path)
    there = record and (published_key(path) or (path.is_dir() and not (path / DONE).exists() and record["key"]))
    if not path.exists() or there == key or (path.is_dir() and all(file.suffix == PARTIAL for file in path.iterdir())):
        return  # free, whole, or begun by a call that was stopped
    if not there:
        raise UsageError(f"{path}: already exists and is not a result of ours; give another --out or move it away")
    what = differences((record or {}).get("inputs", {}), inputs)
    raise UsageError(f"{path}: already exists, a result of other settings ({what}); give another --out or move it away")


def publish_rows(path: Path, rows: Sequence[Row], source: Rows) -> None:
    """Write rows as a file that knows which artifacts they come from; what says so is there before the file is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = as_lines(rows)
    record = {"key": source.key, "most": source.most, "inputs": dict(source.inputs)}
    write_json(pedigree_of(path), record | {"sha256": hashlib.sha256(text.encode()).hexdigest()})
    write_text(path, text)


def publish_folder(path: Path, store: Store, output: Output) -> None:
    """Copy an artifact's files into a folder: what says which artifact it is comes first, the mark of wholeness last."""
    path.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    (path / DONE).unlink(missing_ok=True)
    source = store.path(output)
    mark = mark_of(source)
    write_json(path / RECORD, json.loads((source / RECORD).read_bytes()) | {"published": True})
    shutil.copystat(source / RECORD, path / RECORD)  # published again, it is the same
    for name in mark["files"].keys() - {RECORD}:
        (path / name).unlink(missing_ok=True)
        try:  # weights are linked where the disk can: they are large, and nobody edits them in place
            (os.link if name.endswith(".safetensors") else shutil.copy2)(source / name, path / name)
        except OSError:
            shutil.copy2(source / name, path / name)
    files = mark["files"] | {RECORD: fingerprint(path / RECORD)}
    write_text(path / DONE, mark_text(mark | {"files": files}))


def record_of(path: Path) -> dict[str, Any] | None:
    """What says which artifact a result is; of a file in a store, what its folder says."""
    for place in (pedigree_of(path), *([path.parent / RECORD] if path.name == "rows.jsonl" else ())):
        with suppress(JsublimError):
            record = read_json(place)
            if isinstance(record.get("key"), str) and type(record.get("most", 0)) is int:
                return record
    return None

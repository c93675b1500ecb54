"""An artifact: a folder that knows what went into it, is continued where it stopped, and never overwritten.

It is whole once it holds its mark, `DONE`, which names its files with their digests.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jsublim.core.files import DAMAGED, PARTIAL, remove_abandoned, sha256, write_json, write_text
from jsublim.errors import JsublimError, UsageError
from jsublim.runtime.processes import on_main_process

RECORD = "artifact.json"  # what went into an artifact
DONE = "DONE"  # the mark
PROGRESS, PARTS = "progress.jsonl", "parts"  # a file, a folder: what is finished of an artifact that is not
VERSION = 2  # of stores; in every mark
LABEL_BYTES = 120  # of the name of an artifact's folder
NAME_BYTES = 255  # of a file's name, that a file system takes
CHANGED = "is not what was written"
_LIBRARIES = ("jsublim", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    installed = {"python": platform.python_version()} | dict.fromkeys(_LIBRARIES, "not installed")
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def device() -> str:
    """The accelerator in words, such as "8 x TPU v5 lite"."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def digest(value: Any) -> str:
    """12 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:12]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Up to three settings that two inputs do not share, in words."""
    before, after = _flat(old), _flat(new)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r:.60}, is {after.get(name)!r:.60}" for name in changed[:3])


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


@dataclass(frozen=True)
class Output:
    """What a task leaves: an artifact that is known before it is made.

    Attributes:
      kind: the folder of the store that it lies in; label: for people; inputs: JSON, everything that decides its content.
    """

    kind: str
    label: str
    inputs: Mapping[str, Any] = field(compare=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", json.loads(json.dumps(dict(self.inputs))))
        object.__setattr__(self, "key", digest([self.kind, self.inputs]))

    @cached_property
    def folder(self) -> str:
        """Its place inside a store."""
        # A file system takes names of 255 bytes; the key alone tells artifacts apart.
        label = self.label.replace("/", "-").encode()[:LABEL_BYTES].decode(errors="ignore")
        return f"{self.kind}/{label}-{self.key}"


class Artifact:
    """A folder made from `inputs`; of several processes, the first one writes."""

    def __init__(
        self,
        path: Path,
        output: Output,
        publish: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ):
        """Open, or continue, the artifact of `output.inputs` at `path`.

        Args:
          publish: called once it is whole.
          say: told what of its unfinished parts is not what was written.

        Raises:
          JsublimError: what the folder says that it is made from is something else.
        """
        self.path, self.inputs, self.key, self.say, self._publish = path, output.inputs, output.key, say, publish
        on_main_process(lambda: self._open(output.kind))

    def _open(self, kind: str) -> None:
        record = self.path / RECORD
        if not record.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            attempt = uuid.uuid4().hex[:8]  # tells what two machines make of the same inputs apart
            about = {"kind": kind, "key": self.key, "inputs": self.inputs, "versions": versions(), "device": device()}
            write_json(record, about | {"made": made, "attempt": attempt})
        elif (read_record(self.path) or {}).get("key") != self.key:
            raise JsublimError(f"{record}: {CHANGED}; move the folder away, then run the same command again")

    @property
    def done(self) -> bool:
        return (self.path / DONE).exists()

    def finish(self, summary: dict[str, Any] | None = None) -> None:
        """Mark the artifact whole. The mark holds `summary`, and what every file is (`Store.mend`)."""
        remove_abandoned(self.path)
        files = [path for path in sorted(self.path.iterdir()) if path.is_file() and path.name not in (DONE, PROGRESS)]
        prints = {path.name: fingerprint(path) for path in files if path.suffix not in (PARTIAL, DAMAGED)}
        write_text(self.path / DONE, mark_text({"summary": summary or {}, "files": prints}))
        forget_progress(self.path)
        self._publish()

    @property
    def summary(self) -> dict[str, Any]:
        return read_summary(self.path)


def forget_progress(folder: Path) -> None:
    (folder / PROGRESS).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What went into an artifact; None where its record is damaged: the key must be that of kind and inputs."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        sound = isinstance(record["inputs"], dict) and record["key"] == digest([record["kind"], record["inputs"]])
        return record if sound else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


# --- marks, and what they say of files


def mark_text(mark: Mapping[str, Any]) -> str:
    """A mark as it is written: version, `summary`, of each of its `files` the fingerprint, and the digest of all that."""
    mark = {"version": VERSION, "summary": mark["summary"], "files": mark["files"]}
    return json.dumps({**mark, "sha256": _own_digest(mark)}, indent=2, ensure_ascii=False) + "\n"


def _own_digest(mark: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(mark, ensure_ascii=False).encode()).hexdigest()


def read_mark(content: bytes, place: object) -> dict[str, Any] | None:
    """What the mark of an artifact says; None where that is damaged, or names files elsewhere. Raises UsageError: it
    is of another version; `place` is named."""
    try:
        mark = json.loads(content)
        digest_in_it = mark.pop("sha256", None)
        sound = digest_in_it == _own_digest(mark) or (digest_in_it is None and mark.keys() == {"summary", "files"})
        if sound and mark.get("version") != VERSION:
            raise UsageError(
                f"{place}: was made by another version of jsublim; give another store (store=FOLDER), or move this one away"
            )
        sound = sound and mark_text(mark).encode() == content and isinstance(mark["summary"], dict)
        for name, written in mark["files"].items():
            types = [type(written[key]) for key in ("bytes", "time_ns", "sha256")]
            sound = sound and _is_inside(name) and types == [int, int, str]
        return mark if sound else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file in a folder, or in one below."""
    parts = name.split("/")
    return "\0" not in name and all(part not in ("", ".", "..") and len(part.encode()) <= NAME_BYTES for part in parts)


def mark_of(folder: Path) -> dict[str, Any]:
    """What the mark of a whole artifact says. Raises JsublimError: it is not what was written."""
    mark = read_mark((folder / DONE).read_bytes(), folder)
    if mark is None:
        raise JsublimError(f"{folder / DONE}: {CHANGED}; run the command again that made it")
    return mark


def read_summary(folder: Path) -> dict[str, Any]:
    """What whoever made an artifact kept of it. Raises as `mark_of`."""
    return mark_of(folder)["summary"]


def fingerprint(path: Path) -> dict[str, Any]:
    """What a file is: bytes, time, digest."""
    status = path.stat()
    return {"bytes": status.st_size, "time_ns": status.st_mtime_ns, "sha256": sha256(path)}


def damage(written: Mapping[str, Any], size: int | None, digest: str | None = None) -> str | None:
    """What is wrong with a file of so many bytes (None: there is none), by what was written; without a digest, as far as they tell."""
    if size is None:
        return "is missing"
    if size != written["bytes"]:
        return f"has {size} bytes, {written['bytes']} were written"
    return None if digest in (None, written["sha256"]) else CHANGED


def damage_of(path: Path, written: Mapping[str, Any], *, read: bool) -> str | None:
    """What is wrong with a file on this machine.

    Args:
      read: compare its digest; otherwise a file of the same size and time is taken to be the same. Reading all of a large store
        would take minutes at every start.
    """
    if not path.exists():
        return damage(written, None)
    status = path.stat()
    known = status.st_size != written["bytes"] or (not read and status.st_mtime_ns == written["time_ns"])
    return damage(written, status.st_size, None if known else sha256(path))


def damage_in(folder: Path, only: str | None = None, *, read: bool = True) -> dict[str, str]:
    """What is wrong with the files of a whole artifact, by their names; empty where all is well.

    Args:
      only: one of them, whatever the others are like; read: as `damage_of`.
    """
    mark = read_mark((folder / DONE).read_bytes(), folder)
    if mark is None:
        return {DONE: CHANGED}
    looked = {
        name: damage_of(folder / name, mark["files"][name], read=read) for name in mark["files"] if only in (None, name)
    }
    return {name: what for name, what in looked.items() if what}


def in_words(place: object, damage: Mapping[str, str]) -> str:
    """An artifact and what is wrong with its files, in one line."""
    return f"{place}: {', '.join(f'{name} {what}' for name, what in damage.items())}"


def check_whole(folder: Path, only: str | None = None) -> None:
    """Refuse a whole artifact, or one file of it, that is not what was written. Raises JsublimError: naming the folder
    and the files."""
    if wrong := damage_in(folder, only):
        raise JsublimError(f"{in_words(folder, wrong)}; run the command again that made it")

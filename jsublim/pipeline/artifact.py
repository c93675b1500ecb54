"""An artifact: a folder that knows what went into it, is continued where it stopped, and never overwritten."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jsublim.errors import JsublimError, UsageError
from jsublim.files import DAMAGED, PARTIAL, remove_unfinished, sha256, write_json, write_text
from jsublim.processes import on_main_process

_LIBRARIES = (
    "jsublim",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device() -> str:
    """The accelerator in words, such as "8 x TPU v5 lite"."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def digest(value: Any) -> str:
    """12 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:12]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


RECORD = "artifact.json"  # what went into an artifact
NAME_BYTES = 255  # of a file's name, that a file system takes
DONE = "DONE"  # there once an artifact is whole; says what its files are
PROGRESS, PARTS = "progress.jsonl", "parts"  # a file, a folder: what is finished of an artifact that is not


class Artifact:
    """A folder made from `inputs`. It is whole once it holds DONE, which appears by rename after everything else."""

    def __init__(
        self,
        path: Path,
        kind: str,
        inputs: dict[str, Any],
        publish: Callable[[Path], None] = lambda folder: None,
        say: Callable[[str], None] = lambda text: None,
    ):
        """Open, or continue, the artifact of `inputs` at `path`; of several processes, the first one writes.

        Args:
          publish: called with the folder once it is whole.
          say: told what of its unfinished parts is not what was written.

        Raises:
          UsageError: the folder holds something else, or an artifact of other inputs.
        """
        self.path, self.kind, self._publish, self.say = path, kind, publish, say
        self.inputs = json.loads(json.dumps(inputs))
        self.key = digest([kind, self.inputs])
        on_main_process(lambda: self._open(path / RECORD))

    def _open(self, record: Path) -> None:
        path = self.path
        if record.exists():
            self._check(record)
        elif path.exists() and not (path.is_dir() and (path.name.endswith(f"-{self.key}") or is_free(path))):
            raise UsageError(f"{path}: exists and was not written by jsublim; give another --out or move it away")
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / RECORD, self._record())

    def _record(self) -> dict[str, Any]:
        made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {
            "kind": self.kind,
            "key": self.key,
            "inputs": self.inputs,
            "versions": versions(),
            "device": device(),
            "made": made,
        }

    def _check(self, record: Path) -> None:
        old = read_record(self.path)
        if old is None:
            raise JsublimError(f"{record}: broken; move the folder away and run again")
        if old["kind"] != self.kind:
            raise UsageError(
                f"{self.path}: holds a result of kind {old['kind']!r}, not {self.kind!r}; give another --out"
            )
        if old["key"] != self.key and [p.name for p in record.parent.iterdir() if p.suffix != PARTIAL] == [record.name]:
            write_json(record, self._record())  # of a call that was refused before it made anything
        elif old["key"] != self.key:
            before = old["inputs"]
            changed = sorted(k for k in {*before, *self.inputs} if before.get(k) != self.inputs.get(k))
            what = ", ".join(f"{k} was {_short(before.get(k))}, is {_short(self.inputs.get(k))}" for k in changed[:3])
            raise UsageError(f"{self.path}: holds a result of other settings ({what}); give another --out")

    @property
    def done(self) -> bool:
        return (self.path / DONE).exists()

    def finish(self, summary: dict[str, Any] | None = None) -> None:
        """Mark the artifact whole. The mark holds `summary`, and what every file is (`Store.mend`)."""
        remove_unfinished(self.path)  # whoever makes it holds its claim
        files = [path for path in sorted(self.path.iterdir()) if path.is_file() and path.name not in (DONE, PROGRESS)]
        said = {path.name: fingerprint(path) for path in files if path.suffix not in (PARTIAL, DAMAGED)}
        write_text(self.path / DONE, mark_text({"summary": summary or {}, "files": said}))
        forget_progress(self.path)
        self._publish(self.path)

    @property
    def summary(self) -> dict[str, Any]:
        return read_summary(self.path)


def forget_progress(folder: Path) -> None:
    (folder / PROGRESS).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def is_free(folder: Path) -> bool:
    """Whether a folder holds nothing, or what a killed process had begun to write before anything else was there."""
    return all(path.suffix == PARTIAL for path in folder.iterdir())


def read_record(folder: Path) -> dict[str, Any] | None:
    """What went into an artifact; None where its record is damaged: the key must be that of kind and inputs."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        sound = isinstance(record["inputs"], dict) and record["key"] == digest([record["kind"], record["inputs"]])
        return record if sound else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def mark_of(folder: Path) -> dict[str, Any]:
    """What DONE says of a whole artifact: its `summary`, and of each of its `files` the fingerprint, that of its record among them.

    Raises:
      JsublimError: it is not what was written.
    """
    mark = read_mark((folder / DONE).read_bytes())
    if mark is None:
        raise JsublimError(f"{folder / DONE}: is not what was written; run the command again that made it")
    return mark


def read_summary(folder: Path) -> dict[str, Any]:
    """What whoever made an artifact kept of it.

    Raises:
      JsublimError: as `mark_of`.
    """
    return mark_of(folder)["summary"]


def mark_text(said: Mapping[str, Any]) -> str:
    """A mark as it is written: what it says, and the digest of that."""
    own = hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()
    return json.dumps({**said, "sha256": own}, indent=2, ensure_ascii=False) + "\n"


def read_mark(content: bytes) -> dict[str, Any] | None:
    """What DONE says; None where that is damaged, or names files elsewhere. One without a digest of itself is of an earlier
    version, and taken at its word."""
    try:
        mark = json.loads(content)
        same = mark.pop("sha256", None) is None or mark_text(mark).encode() == content
        known = same and mark.keys() == {"summary", "files"} and isinstance(mark["summary"], dict)
        sound = known and all(
            Path(name).name == name
            and "\0" not in name
            and len(name.encode()) <= NAME_BYTES
            and type(said["bytes"]) is int
            and type(said["time_ns"]) is int
            and type(said["sha256"]) is str
            for name, said in mark["files"].items()
        )
        return mark if sound else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def fingerprint(path: Path) -> dict[str, Any]:
    """What a file is: bytes, time, digest."""
    status = path.stat()
    return {"bytes": status.st_size, "time_ns": status.st_mtime_ns, "sha256": sha256(path)}


def damage_in(folder: Path, only: str | None = None, *, read: bool = True) -> dict[str, str]:
    """What is wrong with the files of a whole artifact, by their names; empty where all is well.

    Args:
      only: one of them, whatever the others are like; read: as `damage_of`.
    """
    mark = read_mark((folder / DONE).read_bytes())
    if mark is None:
        return {DONE: "is not what was written"}
    names = [name for name in mark["files"] if only in (None, name)]
    found = {name: damage_of(folder / name, mark["files"][name], read=read) for name in names}
    if RECORD not in mark["files"] and only in (None, RECORD):  # of an earlier version
        found[RECORD] = None if read_record(folder) else "is not what was written"
    return {name: what for name, what in found.items() if what is not None}


def check_whole(folder: Path, only: str | None = None) -> None:
    """Refuse a whole artifact, or one file of it, that is not what was written.

    Raises:
      JsublimError: naming the folder and the files.
    """
    found = damage_in(folder, only)
    if found:
        raise JsublimError(f"{in_words(folder, found)}; run the command again that made it")


def in_words(place: object, found: Mapping[str, str]) -> str:
    """An artifact and what is wrong with its files, in one line."""
    return f"{place}: {', '.join(f'{name} {what}' for name, what in found.items())}"


def damage_of(path: Path, said: Mapping[str, Any], *, read: bool) -> str | None:
    """What is wrong with a file, by what was written.

    Args:
      read: compare its digest; otherwise a file of the same size and time is taken to be the same. Reading all of a large store
        would take minutes at every start.
    """
    if not path.exists():
        return "is missing"
    status = path.stat()
    if status.st_size != said["bytes"]:
        return f"has {status.st_size} bytes, {said['bytes']} were written"
    same = (not read and status.st_mtime_ns == said["time_ns"]) or sha256(path) == said["sha256"]
    return None if same else "is not what was written"

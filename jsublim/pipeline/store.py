"""Artifacts: folders that know what went into them, are continued where they stopped, and never overwritten."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

from jsublim.errors import JsublimError, UsageError
from jsublim.files import DAMAGED, PARTIAL, damaged_name, naming, write_json, write_text
from jsublim.processes import leave_if_asked, on_main_process

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


LABEL_BYTES = 120  # of the name of an artifact's folder
RECORD = "artifact.json"  # what went into an artifact
DONE = "DONE"  # there once an artifact is whole; says what its files are
PROGRESS, PARTS = "progress.jsonl", "parts"  # a file, a folder: what is finished of an artifact that is not


class Artifact:
    """A folder made from `inputs`. It is whole once it holds DONE, which appears by rename after everything else."""

    def __init__(self, path: Path, kind: str, inputs: dict[str, Any]):
        """Open, or continue, the artifact of `inputs` at `path`; of several processes, the first one writes.

        Raises:
          UsageError: the folder holds something else, or an artifact of other inputs.
        """
        self.path, self.kind = path, kind
        self.inputs = json.loads(json.dumps(inputs))
        self.key = digest([kind, self.inputs])
        on_main_process(lambda: self._open(path / RECORD))

    def _open(self, record: Path) -> None:
        path = self.path
        if record.exists():
            self._check(record)
        elif path.exists() and (not path.is_dir() or any(p.suffix != PARTIAL for p in path.iterdir())):
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
        try:
            old = json.loads(record.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            raise JsublimError(f"{record}: broken; move the folder away and run again") from None
        if old.get("kind") != self.kind:
            raise UsageError(
                f"{self.path}: holds a result of kind {old.get('kind')!r}, not {self.kind!r}; give another --out"
            )
        if old.get("key") != self.key and [p.name for p in record.parent.iterdir() if p.suffix != PARTIAL] == [
            record.name
        ]:
            write_json(record, self._record())  # of a call that was refused before it made anything
        elif old.get("key") != self.key:
            before = old.get("inputs", {})
            changed = sorted(k for k in {*before, *self.inputs} if before.get(k) != self.inputs.get(k))
            what = ", ".join(f"{k} was {_short(before.get(k))}, is {_short(self.inputs.get(k))}" for k in changed[:3])
            raise UsageError(f"{self.path}: holds a result of other settings ({what}); give another --out")

    @property
    def done(self) -> bool:
        return (self.path / DONE).exists()

    def finish(self, summary: dict[str, Any] | None = None) -> None:
        """Mark the artifact whole. The mark holds `summary`, and what every file is (`Store.mend`)."""
        # Whoever makes it holds its claim: what a killed process had begun to write is nobody's.
        for path in self.path.glob(f".*{PARTIAL}"):
            path.unlink(missing_ok=True)
        apart = (RECORD, DONE, PROGRESS)
        files = [path for path in sorted(self.path.iterdir()) if path.is_file() and path.name not in apart]
        said = {path.name: _fingerprint(path) for path in files if path.suffix not in (PARTIAL, DAMAGED)}
        write_json(self.path / DONE, {"summary": summary or {}, "files": said})
        _forget_progress(self.path)

    @property
    def summary(self) -> dict[str, Any]:
        return read_summary(self.path)


def _forget_progress(folder: Path) -> None:
    (folder / PROGRESS).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def files_of(folder: Path) -> list[str]:
    """The names of the files that a whole artifact consists of, beside its record and its mark."""
    return sorted(json.loads((folder / DONE).read_text(encoding="utf-8"))["files"])


def read_summary(folder: Path) -> dict[str, Any]:
    """What whoever made an artifact kept of it."""
    return json.loads((folder / DONE).read_text(encoding="utf-8"))["summary"]


def _fingerprint(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "time_ns": status.st_mtime_ns, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _damage(path: Path, said: Mapping[str, Any]) -> str | None:
    """What is wrong with a file, by what was written. A file of the same size and time is taken to be the same: reading all
    of a large store again would take minutes at every start."""
    if not path.exists():
        return "is missing"
    status = path.stat()
    if status.st_size != said["bytes"]:
        return f"has {status.st_size} bytes, {said['bytes']} were written"
    same = status.st_mtime_ns == said["time_ns"] or sha256(path) == said["sha256"]
    return None if same else "is not what was written"


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


@dataclass(frozen=True)
class Store:
    """A folder of artifacts, one folder each, named by kind, label and key. Any number of runs share one."""

    root: Path
    _opened: dict[str, Artifact] = field(default_factory=dict, compare=False, repr=False)
    _found: dict[str, tuple[int, dict[str, Path]]] = field(default_factory=dict, compare=False, repr=False)

    def done(self, output: Output) -> bool:
        """Whether the artifact is there, and whole."""
        return (self.path(output) / DONE).exists()

    def missing(self, outputs: Sequence[Output]) -> list[int]:
        """Which of them are not there, by their places."""
        return [i for i, output in enumerate(outputs) if not self.done(output)]

    def mend(self, output: Output) -> str | None:
        """Look whether the files of a whole artifact are what was written. A damaged one is set aside, and the artifact is
        unfinished again. Returns what was found, in one line; None where all is well."""
        folder = self.path(output)
        mark = folder / DONE
        if not mark.exists():
            return None
        try:
            files = json.loads(mark.read_text(encoding="utf-8"))["files"]
            found = {name: said for name, each in files.items() if (said := _damage(folder / name, each)) is not None}
        except (ValueError, TypeError, KeyError):
            found = {DONE: "is not what was written"}
        if not found:
            _forget_progress(folder)  # of a process that ended right after the mark was written
            return None
        for path in [mark, *(folder / name for name in found if name != DONE and (folder / name).exists())]:
            path.rename(damaged_name(path))
        return f"{folder}: {', '.join(f'{name} {said}' for name, said in found.items())}; it is made again"

    @contextmanager
    def claim(self, outputs: Sequence[Output], waiting: Callable[[], None]) -> Iterator[None]:
        """Keep other processes of this store from making the same artifacts as long as the block lasts; of several
        processes that work together, the first one does so for all.

        Args:
          waiting: called if another process is at one of them, before this one waits until that has finished or died.
        """
        folder = self.root / "locks"
        locks = [FileLock(folder / f"{key}.lock") for key in sorted({output.key for output in outputs})]

        def take() -> bool:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                for lock in locks:  # in one order for everybody, so that no two wait for each other
                    if not lock.is_locked:
                        lock.acquire(timeout=0)
            except Timeout:
                waiting()
                return False
            return True

        try:
            while not on_main_process(take):
                leave_if_asked()
                time.sleep(0.2)
            yield
        finally:
            for lock in locks:
                lock.release()

    def path(self, output: Output) -> Path:
        """Its folder, under whichever label it was made: another command may have called the same thing otherwise."""
        own = self.root / output.folder
        if own.exists():
            return own
        return self._by_key(output.kind).get(output.key, own)

    def _by_key(self, kind: str) -> dict[str, Path]:
        """The folders of a kind by key, listed anew when one was added."""
        folder = self.root / kind
        if not folder.is_dir():
            return {}
        changed, known = folder.stat().st_mtime_ns, self._found.get(kind)
        if known is None or known[0] != changed:
            known = changed, {path.name.rsplit("-", 1)[-1]: path for path in sorted(folder.iterdir())}
            self._found[kind] = known
        return known[1]

    def open(self, output: Output) -> Artifact:
        """The artifact, its folder made if there is none.

        Raises:
          UsageError, JsublimError: as `Artifact`.
        """
        if output.folder not in self._opened:
            self._opened[output.folder] = Artifact(self.path(output), output.kind, dict(output.inputs))
        return self._opened[output.folder]

    def summary(self, output: Output) -> dict[str, Any]:
        """What whoever made it kept of it."""
        return read_summary(self.path(output))


class RowLog:
    """Rows finished so far, in a JSONL file that a kill may cut anywhere: a broken last line is forgotten. Of several processes,
    the first one has the file, and all have the rows."""

    def __init__(self, path: Path):
        self.path, self._file = path, None
        self.rows: dict[int, dict[str, Any]] = {row["row"]: row for row in on_main_process(self._begin)}

    def _begin(self) -> list[dict[str, Any]]:
        found = {line["row"]: line for line in self._whole_lines()} if self.path.exists() else {}
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in found.values()))
        self._file = self.path.open("a", encoding="utf-8")
        return list(found.values())

    def _whole_lines(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep finished rows; each has its number under "row".

        Raises:
          Preempted: as `leave_if_asked`; these rows are kept.
        """
        if self._file is not None:
            with naming(self.path):
                self._file.writelines(json.dumps(row) + "\n" for row in rows)
                self._file.flush()
        self.rows.update({row["row"]: row for row in rows})
        leave_if_asked()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Answered:
    """Sampled answers in a log, by number; those of one series have the numbers from `first` on in the log."""

    log: RowLog
    first: int = 0
    count: int = sys.maxsize

    @property
    def known(self) -> dict[int, str]:
        numbers = (row for row in self.log.rows if self.first <= row < self.first + self.count)
        return {row - self.first: self.log.rows[row]["answer"] for row in numbers}

    def add(self, numbers: Sequence[int], answers: Sequence[str]) -> None:
        """Keep new answers."""
        pairs = zip(numbers, answers, strict=True)
        self.log.add([{"row": self.first + number, "answer": answer} for number, answer in pairs])

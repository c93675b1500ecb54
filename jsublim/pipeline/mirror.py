"""A store behind a URL: artifacts are made in a folder of this machine and sent whole; those of others are fetched when first
needed; what is finished of the ones that are not whole is sent too, so that another machine can go on.

A bucket holds what the folder of a store holds (`<kind>/<label>-<key>/`), so either can be copied to the other, and beside it
`progress/<key>.zip` and `training/<name>/<step>.zip`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jsublim.bucket import Bucket
from jsublim.errors import JsublimError
from jsublim.files import DAMAGED, remove_abandoned, scratch_of, sha256, write_text
from jsublim.pipeline.artifact import (
    DONE,
    PARTS,
    PROGRESS,
    RECORD,
    damage_of,
    forget_progress,
    in_words,
    mark_text,
    read_mark,
)
from jsublim.programs import DIGEST, ENTRY, whole_programs

SEND_EVERY = 60.0  # seconds between two copies of what is unfinished
SHARE = 10  # and as many times what the last copy took
AT_ONCE = 16  # requests
DIGITS = 64  # of a digest
STATE = "state"  # of a training: a folder with one folder per saved step


class Mirror:
    """What a folder of this machine has in common with a bucket."""

    def __init__(self, bucket: Bucket, root: Path, say: Callable[[str], None]):
        self.bucket, self.root, self.say = bucket, root, say
        self._marks: dict[str, dict[str, Any]] = {}  # of artifacts that are known to be whole, by folder
        self._listed: dict[str, dict[str, str]] = {}  # folders of a kind, by key
        self._sent: dict[str, Any] = {}  # what was sent last of each thing that is unfinished
        self._programs: set[str] | None = None  # those in the bucket
        self._next, self._sending = 0.0, threading.Lock()

    # Whole artifacts

    def forget(self) -> None:
        """Look anew at what others have made."""
        self._listed.clear()

    def find(self, folder: str, key: str) -> str | None:
        """The folder of a whole artifact, under whichever label it was made; None if there is none."""
        if self._mark(folder) is not None:
            return folder
        kind = folder.partition("/")[0]
        if kind not in self._listed:
            self._listed[kind] = {name.rsplit("-", 1)[-1]: f"{kind}/{name}" for name in self.bucket.folders(kind)}
        other = self._listed[kind].get(key, folder)
        return other if other != folder and self._mark(other) is not None else None

    def _mark(self, folder: str) -> dict[str, Any] | None:
        if folder not in self._marks:
            content = self.bucket.read(f"{folder}/{DONE}")
            mark = None if content is None else read_mark(content)
            if mark is None:
                return None
            self._marks[folder] = mark
        return self._marks[folder]

    def summary(self, folder: str) -> dict[str, Any]:
        mark = self._mark(folder)
        assert mark is not None, "it was found"
        return mark["summary"]

    def mend(self, folder: str, key: str, local: Path) -> str | None:
        """Look whether the objects of an artifact that says it is whole are there, as far as their sizes tell; a damaged one is
        set aside. Returns what was found, in one line. What this machine has of another making is no copy, and forgotten."""
        self._marks.pop(folder, None)
        content = self.bucket.read(f"{folder}/{DONE}")
        mark = None if content is None else read_mark(content)
        if content is not None and mark is None:
            return self._set_aside(folder, {DONE: "is not what was written"})
        if mark is not None:
            self._marks[folder] = mark
        there, mine = self.find(folder, key), (local / DONE).exists()
        if there is None or (mine and self.is_copy(there, local)):
            return None
        sizes, found = self.bucket.sizes(there), {}
        for name, said in self._marks[there]["files"].items():
            if name not in sizes:
                found[name] = "is missing"
            elif sizes[name] != said["bytes"]:
                found[name] = f"has {sizes[name]} bytes, {said['bytes']} were written"
        if not found and mine:
            (local / DONE).unlink(missing_ok=True)
        return self._set_aside(there, found) if found else None

    def _set_aside(self, folder: str, found: Mapping[str, str]) -> str:
        """Make a damaged artifact unfinished; what is there of it is kept. Returns a line that says so."""
        for name in [DONE, *(name for name in found if name != DONE)]:
            with suppress(FileNotFoundError):
                self.bucket.set_aside(f"{folder}/{name}")
        self._marks.pop(folder, None)
        return in_words(self.bucket.place(folder), found)

    def is_copy(self, folder: str, local: Path) -> bool:
        """Whether a whole artifact of this machine is the one in the bucket."""
        with suppress(FileNotFoundError):
            mark, own = self._mark(folder), read_mark((local / DONE).read_bytes())
            return mark is not None and own is not None and _content(mark) == _content(own)
        return False

    def fetch(self, folder: str, only: str | None = None) -> Path:
        """The artifact on this machine: what is not there yet is read, and compared with the digests of its mark.

        Args:
          only: one file of it and its record, without the others.

        Raises:
          JsublimError: an object is not what was written; the artifact is unfinished then.
        """
        local, mark = self.root / folder, self._mark(folder)
        assert mark is not None, "it was found"
        local.mkdir(parents=True, exist_ok=True)
        if RECORD not in mark["files"]:  # of an earlier version
            with suppress(FileNotFoundError):
                self.bucket.download(f"{folder}/{RECORD}", local / RECORD)

        def get(name: str) -> str | None:
            path, said = local / name, mark["files"][name]
            if damage_of(path, said, read=True) is None:
                return None
            try:
                self.bucket.download(f"{folder}/{name}", path)
            except FileNotFoundError:
                return "is missing"
            if damage_of(path, said, read=True) is not None:
                path.unlink(missing_ok=True)
                return "is not what was written"
            os.utime(path, ns=(said["time_ns"], said["time_ns"]))  # of a file that is as old, `mend` reads no more
            return None

        with ThreadPoolExecutor(AT_ONCE) as pool:
            names = [name for name in mark["files"] if only in (None, name) or name == RECORD]
            found = {name: said for name, said in zip(names, pool.map(get, names), strict=True) if said}
        if found:
            line = self._set_aside(folder, found)
            raise JsublimError(f"{line}; run the same command again: it is made again")
        if only is None:
            write_text(local / DONE, mark_text(mark))
            forget_progress(local)
        return local

    def publish(self, local: Path, key: str) -> None:
        """Send a whole artifact, its mark last. If another process has made it meanwhile, that one counts: it is fetched."""
        folder, content = local.relative_to(self.root).as_posix(), (local / DONE).read_bytes()
        mark = read_mark(content)
        assert mark is not None, "it is whole"
        if self._mark(folder) is None:
            names = {RECORD: None} | mark["files"]  # a mark of an earlier version does not name the record
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda name: self.bucket.upload(local / name, f"{folder}/{name}"), names))
            if self.bucket.create(f"{folder}/{DONE}", content):
                self._marks[folder] = mark
            elif self._mark(folder) is None:
                raise JsublimError(
                    f"{self.bucket.place(folder)}/{DONE}: is not what was written; run the same command again"
                )
        if not self.is_copy(folder, local):
            (local / DONE).unlink()
            self.fetch(folder)
        self.bucket.remove(f"progress/{key}.zip")

    # What is unfinished

    def resume(self, local: Path, key: str, *, logs: bool = True) -> None:
        """Take over what another machine has finished of an artifact, beside what this one has: rows have numbers.

        Args:
          logs: also the log of finished rows, which of several processes the first one has for all.
        """
        with self._unpacked(f"progress/{key}.zip", local) as scratch:
            if scratch is None:
                return
            for part in sorted((scratch / PARTS).glob("*")):
                (local / PARTS).mkdir(parents=True, exist_ok=True)
                if not (local / PARTS / part.name).exists():
                    os.replace(part, local / PARTS / part.name)
            if logs and (scratch / PROGRESS).exists():
                own = (local / PROGRESS).read_bytes() if (local / PROGRESS).exists() else b""
                theirs = (scratch / PROGRESS).read_bytes()
                if len(theirs) > len(own):  # made one after the other, so the longer one holds more
                    os.replace(scratch / PROGRESS, local / PROGRESS)

    def resume_training(self, name: str) -> None:
        """Take over the newest state of a training, if another machine has come further with it than this one."""
        local = self.root / "training" / name
        own = max(_steps(local), default=0)
        there = [int(stem) for stem in self._stems(f"training/{name}") if stem.isdecimal()]
        for step in sorted((step for step in there if step > own), reverse=True):
            with self._unpacked(f"training/{name}/{step}.zip", local) as scratch:
                if scratch is None:
                    continue
                for path in [path for path in local.glob("*") if path.suffix != DAMAGED]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                local.mkdir(parents=True, exist_ok=True)
                for path in scratch.iterdir():
                    os.replace(path, local / path.name)
                return

    def _stems(self, folder: str) -> list[str]:
        return [name.removesuffix(".zip") for name in self.bucket.sizes(folder) if name.endswith(".zip")]

    @contextmanager
    def _unpacked(self, name: str, beside: Path) -> Iterator[Path | None]:
        """What a zip of the bucket holds, in a folder of its own; None where there is none, or it is damaged, which is said."""
        scratch, packed = scratch_of(beside), scratch_of(beside)
        packed.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(beside)
        sound = False
        try:
            with suppress(FileNotFoundError):
                self.bucket.download(name, packed)
                sound = _unpack(packed, scratch)
                if not sound:
                    self.say(f"{self.bucket.place(name)}: is not what was written; what it held is made again")
            yield scratch if sound else None
        finally:
            packed.unlink(missing_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)

    def keep(self, unfinished: Mapping[str, Path], trainings: Iterable[str], *, now: bool = False) -> None:
        """Send what there is of unfinished artifacts (by their keys) and trainings, where it has changed since it was sent.

        Args:
          now: also if that was less than `SEND_EVERY` seconds ago.
        """
        with self._sending:
            begin = time.monotonic()
            if begin < self._next and not now:
                return
            for key, folder in unfinished.items():
                files = [folder / PROGRESS, *sorted((folder / PARTS).glob("*.npz"))]
                self._send(f"progress/{key}.zip", folder, [path for path in files if path.exists()])
            for name in trainings:
                self._send_training(name)
            took = time.monotonic() - begin
            self._next = time.monotonic() + max(SEND_EVERY, SHARE * took)

    def _send(self, name: str, folder: Path, files: Sequence[Path]) -> bool:
        """Pack files into one object, if one of them has changed. Nothing is sent where one goes away meanwhile."""
        try:
            state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
            if not files or self._sent.get(name) == state:
                return bool(files)
            packed = scratch_of(self.root / "kept.zip")
            remove_abandoned(self.root / "kept.zip")
            try:
                _pack(files, folder, packed)
                self.bucket.upload(packed, name)
            finally:
                packed.unlink(missing_ok=True)
        except FileNotFoundError:
            return False
        self._sent[name] = state
        return True

    def _send_training(self, name: str) -> None:
        folder = self.root / "training" / name
        for step in sorted(_steps(folder), reverse=True)[:1]:
            files = [path for path in sorted((folder / STATE / str(step)).rglob("*")) if path.is_file()]
            lines = [path for path in [folder / "metrics.jsonl"] if path.exists()]
            if self._send(f"training/{name}/{step}.zip", folder, [*lines, *files]):
                for stem in self._stems(f"training/{name}"):
                    if stem != str(step):
                        self.bucket.remove(f"training/{name}/{stem}.zip")

    def forget_training(self, name: str) -> None:
        """Remove the states of a training whose students are all whole."""
        for stem in self._stems(f"training/{name}"):
            self.bucket.remove(f"training/{name}/{stem}.zip")

    def agree(self, name: str, local: Path, *, damaged: bool = False) -> None:
        """Have a small file that was decided once: the bucket's if it has one, else this machine's becomes that.

        Args:
          damaged: the bucket's was, and this machine's is to take its place.
        """
        if damaged:
            return self.bucket.write(name, local.read_bytes())
        if local.exists() and self.bucket.create(name, local.read_bytes()):
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            self.bucket.download(name, local)

    # Compiled programs

    def fetch_programs(self, folder: Path, *, alone: bool = False) -> None:
        """Read the programs that are not in this folder yet. An object's name ends with its digest.

        Args:
          alone: remove those of the folder that the bucket has not.
        """
        above = folder.relative_to(self.root).as_posix()

        def get(name: str) -> None:
            path, said = folder / name.rpartition(".")[0], name.rpartition(".")[2]
            if not path.name.endswith(ENTRY) or path.exists():
                return
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self.bucket.download(f"{above}/{name}", path)
                if sha256(path) == said:
                    return write_text(path.with_name(path.name + DIGEST), said)
                path.unlink()
                self.say(f"{self.bucket.place(above)}/{name}: a damaged program; it is not used")
                self.bucket.remove(f"{above}/{name}")

        there = self.bucket.sizes(above)
        known = {name.rpartition(".")[0] for name in there}
        for path in folder.glob(f"*{ENTRY}") if alone else ():
            if path.name not in known:
                path.unlink(missing_ok=True)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(get, there))

    def send_programs(self, folder: Path) -> None:
        """Send the programs of a folder that are not in the bucket yet."""
        above = folder.relative_to(self.root).as_posix()
        if self._programs is None:
            self._programs = {name.rpartition(".")[0] for name in self.bucket.sizes(above)}
        new = whole_programs(folder, self.say, self._programs)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda path: self.bucket.upload(path, f"{above}/{path.name}.{new[path]}"), new))
        self._programs |= {path.name for path in new}


def _steps(training: Path) -> list[int]:
    """The saved steps of a training that are whole: others have longer names until they are."""
    folder = training / STATE
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []


def _pack(files: Iterable[Path], folder: Path, target: Path) -> None:
    """Files as one, a zip behind its digest. (Arrays are zips as well: what is left of a zip of them can look like one.)"""
    with target.open("wb+") as file:
        file.write(b"0" * DIGITS)
        with zipfile.ZipFile(file, "w") as kept:
            for path in files:
                kept.write(path, path.relative_to(folder))
        file.seek(DIGITS)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        file.write(digest.encode())


def _unpack(packed: Path, target: Path) -> bool:
    """Write out what `_pack` has packed; False where that is damaged."""
    with packed.open("rb") as file:
        said = file.read(DIGITS)
        if hashlib.file_digest(file, "sha256").hexdigest().encode() != said:
            return False
    with zipfile.ZipFile(packed) as kept:
        kept.extractall(target)
    return True


def _content(mark: Mapping[str, Any]) -> Any:
    """What a mark says of its artifact, whenever and wherever that was made."""
    return mark["summary"], {name: said["sha256"] for name, said in mark["files"].items()}

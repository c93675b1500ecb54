"""A store behind a URL: artifacts are made in a folder of this machine and sent whole, those of others are fetched when first
needed; of a training also its newest saved state, so that another machine can go on.

A bucket holds what the folder of a store holds (`<kind>/<label>-<key>/`), so either can be copied to the other, and beside it
`training/<name>/<step>/`. Where two machines make the same artifact, each sends it under a name of its own: the first one has
the artifact's own name, the other `<label>.<attempt>-<key>`, and is removed again if the first was whole before it.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jsublim.bucket import Bucket, at_once
from jsublim.errors import JsublimError
from jsublim.files import DAMAGED, remove_abandoned, scratch_of, sha256, write_text
from jsublim.pipeline.artifact import (
    CHANGED,
    DONE,
    RECORD,
    damage_of,
    fingerprint,
    forget_progress,
    in_words,
    mark_text,
    of_other_size,
    read_mark,
    read_record,
)
from jsublim.programs import DIGEST, ENTRY, whole_programs

SEND_EVERY, SHARE = (
    60.0,
    10,
)  # seconds between two looks for a new state; and as many times what sending the last one took
LIST_EVERY = 5.0  # seconds for which a list of artifacts is believed
STATE = "state"  # of a training: a folder with one folder per saved step


class Remote:
    """What a folder of this machine has in common with a bucket."""

    def __init__(self, bucket: Bucket, root: Path, say: Callable[[str], None]):
        self.bucket, self.root, self.say = bucket, root, say
        self._marks: dict[str, dict[str, Any]] = {}  # of what is known to be whole, by folder
        self._listed: dict[str, tuple[float, dict[str, list[str]]]] = {}  # when, and folders by key, of each kind
        self._fetched: set[tuple[str, str | None]] = set()  # folders, and which of their files (None: all) are here
        self._sent: dict[str, int] = {}  # the newest step that was sent of each training
        self._programs: set[str] | None = None  # those in the bucket

    # Whole artifacts

    def find(self, folder: str, key: str) -> str | None:
        """The folder of a whole artifact, under whichever name it was sent; None if there is none."""
        return next((name for name in self._names(folder, key) if self._mark(name) is not None), None)

    def _names(self, folder: str, key: str) -> Iterator[str]:
        """The folders that may hold an artifact; the store is asked for others only if its own name does not."""
        yield folder
        kind, now = folder.partition("/")[0], time.monotonic()
        if kind not in self._listed or now - self._listed[kind][0] > LIST_EVERY:
            names: dict[str, list[str]] = {}
            for name in self.bucket.folders(kind):
                names.setdefault(name.rpartition("-")[2], []).append(f"{kind}/{name}")
            self._listed[kind] = now, names
        yield from (name for name in self._listed[kind][1].get(key, ()) if name != folder)

    def _mark(self, folder: str) -> dict[str, Any] | None:
        if folder not in self._marks:
            content = self.bucket.read(f"{folder}/{DONE}")
            mark = None if content is None else read_mark(content, self.bucket.place(folder))
            if mark is None:
                return None
            self._marks[folder] = mark
        return self._marks[folder]

    def summary(self, folder: str) -> dict[str, Any]:
        """What whoever made a whole artifact kept of it."""
        return self._marks[folder]["summary"]

    def mend(self, folder: str, key: str) -> str | None:
        """Look whether the objects of an artifact that says it is whole are there, as far as their sizes tell; a damaged one is
        set aside. Returns what is wrong, in one line."""
        lines = []
        for name in self._names(folder, key):
            self._marks.pop(name, None)
            content = self.bucket.read(f"{name}/{DONE}")
            if content is None:
                continue
            mark = read_mark(content, self.bucket.place(name))
            damage = {DONE: CHANGED} if mark is None else self._of_sizes(name, mark)
            if mark is not None and not damage:
                self._marks[name] = mark
                break
            lines.append(self._set_aside(name, damage))
        return "; ".join(lines) or None

    def _of_sizes(self, folder: str, mark: Mapping[str, Any]) -> dict[str, str]:
        sizes, damage = self.bucket.sizes(folder), {}
        for name, said in mark["files"].items():
            if name not in sizes:
                damage[name] = "is missing"
            elif sizes[name] != said["bytes"]:
                damage[name] = of_other_size(sizes[name], said)
        return damage

    def _set_aside(self, folder: str, damage: Mapping[str, str]) -> str:
        """Make a damaged artifact unfinished; what is there of it is kept. Returns a line that says so."""
        for name in [DONE, *(name for name in damage if name != DONE)]:
            with suppress(FileNotFoundError):
                self.bucket.set_aside(f"{folder}/{name}")
        self._marks.pop(folder, None)
        self._fetched = {(name, file) for name, file in self._fetched if name != folder}
        return in_words(self.bucket.place(folder), damage)

    def fetch(self, folder: str, local: Path, only: str | None = None) -> Path:
        """A whole artifact on this machine: what is not there yet is read, and compared with the digests of its mark.

        Args:
          local: its folder; only: one file of it and its record, without the others.

        Raises:
          JsublimError: an object is not what was written; the artifact is unfinished then.
        """
        if not self._fetched.isdisjoint({(folder, None), (folder, only)}):
            return local
        mark = self._marks[folder]
        files = {name: said for name, said in mark["files"].items() if only in (None, name) or name == RECORD}
        if damage := self._get(folder, files, local):
            raise JsublimError(f"{self._set_aside(folder, damage)}; run the same command again: it is made again")
        if only is None:
            write_text(local / DONE, mark_text(mark))
            forget_progress(local)
        self._fetched.add((folder, only))
        return local

    def _get(self, folder: str, files: Mapping[str, Mapping[str, Any]], local: Path) -> dict[str, str]:
        """Have files as their fingerprints say; what is wrong with those that the bucket does not hold so."""

        def get(name: str) -> str | None:
            path, said = local / name, files[name]
            if path.exists() and damage_of(path, said, read=True) is None:
                return None
            if (local / DONE).exists() and path.exists():
                self.say(f"{local}: {name} {CHANGED}; it is fetched again")
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.bucket.download(f"{folder}/{name}", path)
            except FileNotFoundError:
                return "is missing"
            damage = damage_of(path, said, read=True)
            if damage is None:
                os.utime(path, ns=(said["time_ns"], said["time_ns"]))
            else:
                path.unlink(missing_ok=True)
            return damage

        return {name: damage for name, damage in zip(files, at_once(get, files), strict=True) if damage}

    def publish(self, local: Path, folder: str, key: str) -> None:
        """Send a whole artifact, its mark last. If another machine's is whole before, that one counts, and is fetched."""
        content = (local / DONE).read_bytes()
        mark = read_mark(content, local)
        assert mark is not None, "it is whole"
        if self.find(folder, key) is None:
            name = self._own_name(local, folder, key)
            at_once(lambda file: self.bucket.upload(local / file, f"{name}/{file}"), mark["files"])
            self._listed.clear()
            if self.find(folder, key) is None:
                self.bucket.write(f"{name}/{DONE}", content)
                self._marks[name] = mark
            else:
                self.bucket.remove(name)
        there = self.find(folder, key)
        assert there is not None, "it was sent"
        if self._marks[there] == mark:
            self._fetched.add((there, None))
        else:
            (local / DONE).unlink()
            self.fetch(there, local)

    def _own_name(self, local: Path, folder: str, key: str) -> str:
        """The artifact's own folder, unless another machine has begun to send it."""
        own = (local / RECORD).read_bytes()
        if self.bucket.create(f"{folder}/{RECORD}", own) or self.bucket.read(f"{folder}/{RECORD}") == own:
            return folder
        record = read_record(local)
        assert record is not None, "its digest was compared"
        return f"{folder.removesuffix(f'-{key}')}.{record['attempt']}-{key}"

    # States of trainings

    def resume_training(self, name: str) -> None:
        """Take over the newest state of a training, if another machine has come further with it than this one."""
        local, above = self.root / "training" / name, f"training/{name}"
        own = max(_steps(local), default=0)
        there = (int(step) for step in self.bucket.folders(above) if step.isdecimal())
        for step in sorted((step for step in there if step > own), reverse=True):
            if self.bucket.read(f"{above}/{step}/{DONE}") is None:
                continue  # not sent to its end
            mark = self._mark(f"{above}/{step}")
            local.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(local)
            scratch = scratch_of(local)
            try:
                if mark is None or self._get(f"{above}/{step}", mark["files"], scratch):
                    self.say(f"{self.bucket.place(above)}/{step}: {CHANGED}; what it held is made again")
                    continue
                for path in [path for path in local.glob("*") if path.suffix != DAMAGED]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                local.mkdir(parents=True, exist_ok=True)
                for path in scratch.iterdir():
                    os.replace(path, local / path.name)
                self._sent[name] = step
                return
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    @contextmanager
    def sending_states(self, trainings: set[str]) -> Iterator[None]:
        """Send the newest saved state of each of these trainings now and then, and when the block ends."""
        over = threading.Event()

        def send() -> float:
            begin = time.monotonic()
            for name in tuple(trainings):
                try:
                    self._send_state(name)
                except (OSError, JsublimError) as error:
                    self.say(f"{error} (the state of a training was not sent; whole artifacts are)")
            return time.monotonic() - begin

        def run() -> None:
            took = 0.0
            while not over.wait(max(SEND_EVERY, SHARE * took)):
                took = send()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            send()

    def _send_state(self, name: str) -> None:
        """Nothing is sent where the training removes the state meanwhile: a newer one is there."""
        folder, above = self.root / "training" / name, f"training/{name}"
        step = max(_steps(folder), default=0)
        if step <= self._sent.get(name, 0):
            return
        lines = scratch_of(folder / "metrics.jsonl")
        try:
            with suppress(FileNotFoundError):
                files = {
                    path.relative_to(folder).as_posix(): path
                    for path in sorted((folder / STATE / str(step)).rglob("*"))
                    if path.is_file()
                }
                if (folder / "metrics.jsonl").exists():  # which grows
                    files["metrics.jsonl"] = Path(shutil.copy(folder / "metrics.jsonl", lines))
                said = {file: fingerprint(path) for file, path in files.items()}
                at_once(lambda file: self.bucket.upload(files[file], f"{above}/{step}/{file}"), files)
                self.bucket.write(f"{above}/{step}/{DONE}", mark_text({"summary": {}, "files": said}).encode())
                self._sent[name] = step
                for other in self.bucket.folders(above):
                    if other != str(step):
                        self.bucket.remove(f"{above}/{other}")
        finally:
            lines.unlink(missing_ok=True)

    def forget_training(self, name: str) -> None:
        """Remove the states of a training whose students are all whole."""
        self._sent.pop(name, None)
        self.bucket.remove(f"training/{name}")

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
        at_once(get, there)

    def send_programs(self, folder: Path) -> None:
        """Send the programs of a folder that are not in the bucket yet."""
        above = folder.relative_to(self.root).as_posix()
        if self._programs is None:
            self._programs = {name.rpartition(".")[0] for name in self.bucket.sizes(above)}
        new = whole_programs(folder, self.say, self._programs)
        at_once(lambda path: self.bucket.upload(path, f"{above}/{path.name}.{new[path]}"), new)
        self._programs |= {path.name for path in new}


def _steps(training: Path) -> list[int]:
    """The saved steps of a training that are whole: others have longer names until they are."""
    folder = training / STATE
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []

"""A store: artifacts under the hash of what went into them, in a folder or behind a URL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jsublim.bucket import Bucket
from jsublim.config import Config
from jsublim.errors import JsublimError
from jsublim.files import damaged_name, write_json
from jsublim.pipeline.artifact import (
    DONE,
    PARTS,
    PROGRESS,
    RECORD,
    Artifact,
    damage_in,
    device,
    digest,
    forget_progress,
    in_words,
    read_summary,
    versions,
)
from jsublim.pipeline.claims import BucketClaims, Claims, FolderClaims
from jsublim.pipeline.mirror import Mirror
from jsublim.processes import check_shared, group, is_main_process, on_main_process, process_count
from jsublim.programs import keep_programs, programs_folder

__all__ = [  # what the rest of the package needs of stores, artifacts included
    "DONE",
    "PARTS",
    "PROGRESS",
    "RECORD",
    "Artifact",
    "Output",
    "Store",
    "device",
    "digest",
    "read_summary",
    "versions",
]
LABEL_BYTES = 120  # of the name of an artifact's folder
PROGRAMS = "programs"  # the folder of compiled ones
SEEN = ".seen-by-all"  # a mark by which processes find out that they share a store


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
    """Artifacts, one folder each, named by kind, label and key. Any number of runs share one.

    Tasks read and write in the folder `root`. With a `mirror` that is a folder of this machine, and what counts lies behind a
    URL: artifacts are sent there once they are whole, and fetched when their path is first asked for.
    """

    root: Path
    mirror: Mirror | None = field(default=None, compare=False)
    say: Callable[[str], None] = field(default=lambda text: None, compare=False)
    _opened: dict[str, Artifact] = field(default_factory=dict, compare=False, repr=False)
    _found: dict[str, tuple[int, dict[str, Path]]] = field(default_factory=dict, compare=False, repr=False)
    _read: set[tuple[Path, str | None, int]] = field(default_factory=set, compare=False, repr=False)  # and compared
    _trainings: set[str] = field(default_factory=set, compare=False, repr=False)  # begun under the claim that is held

    @staticmethod
    def of(config: Config, say: Callable[[str], None] = lambda text: None) -> Store:
        """The store that a config names; nothing is made, and nobody asked, before it is used.

        Args:
          say: told what a user should know: of a claim that is taken over, of something damaged.

        Raises:
          UsageError: a URL whose library is not installed.
        """
        url = config.store_url
        return Store(config.store_dir, None if url is None else Mirror(Bucket.at(url), config.store_dir, say), say)

    def check_shared(self) -> None:
        """Refuse a store that processes that work together do not share. Behind a URL it is the bucket that they share: each may
        have a disk of its own.

        Raises:
          UsageError: as `processes.check_shared`.
        """
        name = f"{SEEN}-{group()}"
        if self.mirror is not None:
            bucket = self.mirror.bucket
            read = lambda: (bucket.read(name) or b"").decode()  # noqa: E731
            check_shared(bucket.url, lambda word: bucket.write(name, word.encode()), read, lambda: bucket.remove(name))
            return
        mark = self.root / name

        def write(word: str) -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            mark.write_text(word, encoding="utf-8")

        read = lambda: mark.read_text(encoding="utf-8") if mark.exists() else None  # noqa: E731
        check_shared(str(self.root), write, read, lambda: mark.unlink(missing_ok=True))

    def place(self, output: Output) -> str:
        """Where it is for all who share the store, in words."""
        return str(self.root / output.folder) if self.mirror is None else self.mirror.bucket.place(output.folder)

    def is_here(self, output: Output) -> bool:
        """Whether this machine has it whole; of a store behind a URL, a copy."""
        return (self._here(output) / DONE).exists()

    def done(self, output: Output) -> bool:
        """Whether the artifact is there, and whole."""
        return self.is_here(output) if self.mirror is None else self.mirror.find(output.folder, output.key) is not None

    def missing(self, outputs: Sequence[Output]) -> list[int]:
        """Which of them are not there, by their places."""
        return [i for i, output in enumerate(outputs) if not self.done(output)]

    def mend(self, output: Output) -> str | None:
        """Look whether the files of a whole artifact are what was written. A damaged one is set aside, and the artifact is
        unfinished again. Returns what was found, in one line; None where all is well."""
        here, there = self._mend_here(output), None
        if self.mirror is not None:
            there = self.mirror.mend(output.folder, output.key, self._here(output))
        found = "; ".join(line for line in (here, there) if line is not None)
        again = "fetched" if self.mirror is not None and self.done(output) else "made"
        return f"{found}; it is {again} again" if found else None

    def _mend_here(self, output: Output) -> str | None:
        folder = self._here(output)
        try:
            found = damage_in(folder, read=False)
        except FileNotFoundError:
            return None
        if not found:
            forget_progress(folder)  # of a process that ended right after the mark was written
            return None
        return _set_aside(folder, found)

    def _damage(self, folder: Path, only: str | None = None) -> str | None:
        """Compare the files of a whole artifact with their digests, when this process first reads them. Damaged ones are set
        aside, and the artifact is unfinished again. Returns what was found, in one line.

        Args:
          only: one of them, without the others.
        """
        made = (folder / DONE).stat().st_mtime_ns
        if not self._read.isdisjoint({(folder, None, made), (folder, only, made)}):
            return None
        found = damage_in(folder, only)
        if found:
            return _set_aside(folder, found) if is_main_process() else in_words(folder, found)
        self._read.add((folder, only, made))
        return None

    @contextmanager
    def claim(self, outputs: Sequence[Output], waiting: Callable[[], None]) -> Iterator[None]:
        """Keep other processes of this store from making the same artifacts as long as the block lasts; of several
        processes that work together, the first one does so for all.

        Args:
          waiting: called if another process is at one of them (`holder` says which), before this one waits until that has
            finished or died.
        """
        with self._claims.hold([output.key for output in outputs], waiting):
            if self.mirror is None:
                yield
            else:
                with self._shared(self.mirror, outputs):
                    yield

    @contextmanager
    def _shared(self, mirror: Mirror, outputs: Sequence[Output]) -> Iterator[None]:
        """Send what a killed process left whole, what is unfinished as it grows, and what there is of it in the end."""
        mirror.forget()
        folders = {output.key: self._here(output) for output in outputs}

        def send_whole() -> None:
            for output in outputs:
                if (folders[output.key] / DONE).exists() and not self.done(output):
                    mirror.publish(folders[output.key], output.key)

        def keep(now: bool = False) -> None:
            unfinished = {key: folder for key, folder in folders.items() if not (folder / DONE).exists()}
            try:
                mirror.keep(unfinished, tuple(self._trainings), now=now)
                if now:
                    mirror.send_programs(programs_folder(self.root / PROGRAMS))
                for name in self._trainings if now and not unfinished else ():
                    mirror.forget_training(name)
            except (OSError, JsublimError) as error:
                self.say(f"{error} (what is unfinished was not sent; whole artifacts are)")

        on_main_process(send_whole)
        self._trainings.clear()
        self._claims.on_beat = keep
        try:
            yield
        finally:
            self._claims.on_beat = lambda: None
            if is_main_process():
                keep(now=True)
        for output in outputs if not is_main_process() else ():
            if self.done(output):  # what it had taken over is needed no more
                forget_progress(folders[output.key])

    @cached_property
    def _claims(self) -> Claims:
        if self.mirror is None:
            return FolderClaims(self.root / "locks", self.say)
        return BucketClaims(self.mirror.bucket, self.say)

    def clear_claims(self) -> None:
        """Remove what killed processes have left of theirs."""
        self._claims.clear()

    def holder(self, outputs: Sequence[Output]) -> str | None:
        """Which other process is making one of these artifacts, in words; None if none is."""
        return self._claims.holder([output.key for output in outputs])

    def path(self, output: Output) -> Path:
        """Its folder on this machine, under whichever label it was made: another command may have called the same thing
        otherwise.

        Raises:
          JsublimError: it is whole, and not what was written; it is unfinished then.
        """
        return self._sound(output)

    def file(self, output: Output, name: str) -> Path:
        """One file of a whole artifact; the others, which may be large, are not fetched.

        Raises:
          JsublimError: as `path`.
        """
        return self._sound(output, name) / name

    def _sound(self, output: Output, only: str | None = None) -> Path:
        """The folder of an artifact on this machine, what is read of it compared with what was written."""
        here = self._here(output)
        folder = None if self.mirror is None else self.mirror.find(output.folder, output.key)
        damage = self._damage(here, only) if (here / DONE).exists() else None
        if damage is None and self.mirror is not None and folder is not None and not self.mirror.is_copy(folder, here):
            (here / DONE).unlink(missing_ok=True)  # of another making
        if damage is None and (self.mirror is None or (here / DONE).exists()):
            return here
        if self.mirror is None or folder is None:
            if damage is not None:
                raise JsublimError(f"{damage}; run the same command again: it is made again")
            return here
        if damage is not None:
            self.say(f"{damage}; it is fetched again")
        return self.mirror.fetch(folder, only)

    def _here(self, output: Output) -> Path:
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
        """The artifact, its folder made if there is none; what another machine has finished of it is there.

        Raises:
          UsageError, JsublimError: as `Artifact`.
        """
        if output.folder not in self._opened:
            mirror, key = self.mirror, output.key
            publish = (lambda folder: None) if mirror is None else lambda folder: mirror.publish(folder, key)
            artifact = Artifact(self.path(output), output.kind, dict(output.inputs), publish, self.say)
            if mirror is not None and not on_main_process(lambda: artifact.done):
                on_main_process(lambda: mirror.resume(artifact.path, key))
                if not is_main_process():
                    mirror.resume(artifact.path, key, logs=False)
            self._opened[output.folder] = artifact
        return self._opened[output.folder]

    def summary(self, output: Output) -> dict[str, Any]:
        """What whoever made it kept of it."""
        here = self._here(output)
        folder = None if self.mirror is None else self.mirror.find(output.folder, output.key)
        if self.mirror is None or folder is None or (here / DONE).exists():
            return read_summary(here)
        return self.mirror.summary(folder)

    def training(self, name: str) -> Path:
        """The folder of a training's states; those that another machine has saved are there."""
        mirror = self.mirror
        if mirror is not None:
            self._trainings.add(name)
            on_main_process(lambda: mirror.resume_training(name))
        return self.root / "training" / name

    def agreed(self, name: str, decide: Callable[[], int]) -> int:
        """A number from 1 on that is decided once for all who share the store."""
        path, remote = self.root / "training" / f"{name}.json", f"training/{name}.json"

        def known() -> int | None:
            if self.mirror is not None:
                self.mirror.agree(remote, path)
            if path.exists() and _count(path) is None:
                self.say(f"{path}: is not what was written; it is decided anew")
            return _count(path) if path.exists() else None

        def keep() -> int:
            damaged = path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, count)
            if self.mirror is not None:
                self.mirror.agree(remote, path, damaged=damaged)
            return _count(path) or count

        if (agreed := on_main_process(known)) is not None:
            return agreed
        count = decide()
        return on_main_process(keep)

    def keep_programs(self) -> None:
        """Have JAX keep compiled programs here, and use those that are (`programs.keep_programs`)."""
        folder, mirror = programs_folder(self.root / PROGRAMS), self.mirror
        if mirror is not None:
            if process_count() > 1:  # all begin with the same ones, and compile together what is missing
                on_main_process(lambda: mirror.send_programs(folder))
            mirror.fetch_programs(folder, alone=not is_main_process())
        keep_programs(folder, self.say)


def _set_aside(folder: Path, found: Mapping[str, str]) -> str:
    """Make a damaged artifact unfinished; what is there of it is kept. Returns a line that says so."""
    for path in [folder / DONE, *(folder / name for name in found if name != DONE)]:
        with suppress(FileNotFoundError):
            path.rename(damaged_name(path))
    return in_words(folder, found)


def _count(path: Path) -> int | None:
    """The number from 1 on that a file holds; None where it holds anything else."""
    try:
        said = json.loads(path.read_bytes())
    except ValueError:
        return None
    return said if type(said) is int and said >= 1 else None

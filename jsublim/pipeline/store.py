"""A store: artifacts under the hash of what went into them, in a folder or behind a URL.

They are made deterministically, so nothing is lost where two machines make the same one: the first that is whole counts. On
one machine (or in a folder that several share) a lock of the operating system keeps two runs from doing the same work.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jsublim.bucket import Bucket, at_once
from jsublim.config import Config
from jsublim.errors import JsublimError
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
    set_aside,
    versions,
)
from jsublim.pipeline.remote import Remote
from jsublim.processes import is_main_process, leave_if_asked, on_main_process, process_count
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
PROGRAMS, TRAINING, LOCKS = "programs", "training", "locks"  # folders beside those of artifacts
LOOK = 0.2  # seconds between two tries to get what another process has


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

    Tasks read and write in the folder `root`. With a `remote` that is a folder of this machine, and what counts lies behind a
    URL: artifacts are sent there once they are whole, and fetched when their path is first asked for.
    """

    root: Path
    remote: Remote | None = field(default=None, compare=False)
    say: Callable[[str], None] = field(default=lambda text: None, compare=False)
    _opened: dict[str, Artifact] = field(default_factory=dict, compare=False, repr=False)
    _found: dict[str, tuple[int, dict[str, Path]]] = field(default_factory=dict, compare=False, repr=False)
    _read: set[tuple[Path, str | None, int]] = field(default_factory=set, compare=False, repr=False)  # and compared
    _trainings: set[str] = field(default_factory=set, compare=False, repr=False)  # begun under the lock that is held

    @staticmethod
    def of(config: Config, say: Callable[[str], None] = lambda text: None) -> Store:
        """The store that a config names; nothing is made, and nobody asked, before it is used.

        Args:
          say: told what a user should know, such as what is damaged.

        Raises:
          UsageError: a URL whose library is not installed.
        """
        url = config.store_url
        return Store(config.store_dir, None if url is None else Remote(Bucket.at(url), config.store_dir, say), say)

    @cached_property
    def bucket(self) -> Bucket:
        """What all share who share the store."""
        return Bucket.at(str(self.root)) if self.remote is None else self.remote.bucket

    def place(self, output: Output) -> str:
        """Where it is for all who share the store, in words."""
        return self.bucket.place(output.folder)

    def done(self, output: Output) -> bool:
        """Whether the artifact is there, and whole."""
        if self.remote is not None:
            return self.remote.find(output.folder, output.key) is not None
        return (self._here(output) / DONE).exists()

    def missing(self, outputs: Sequence[Output]) -> list[int]:
        """Which of them are not there, by their places."""
        return [i for i, output in enumerate(outputs) if not self.done(output)]

    def mend(self, outputs: Sequence[Output]) -> None:
        """Look, before work, whether the files of whole artifacts are what was written, as far as sizes and times tell. A damaged
        one is set aside, which is said, and the artifact is unfinished again.

        Raises:
          UsageError: one is of another version of jsublim.
        """

        def look() -> None:
            for damage in at_once(self._mend, outputs) if self.remote is not None else map(self._mend, outputs):
                if damage is not None:
                    self.say(f"{damage}; it is made again")

        on_main_process(look)

    def _mend(self, output: Output) -> str | None:
        """What is wrong with a whole artifact, in one line. A copy is compared when it is read."""
        if self.remote is not None:
            damage = self.remote.mend(output.folder, output.key)
            if damage is not None or self.done(output):
                return damage
        folder = self._here(output)
        if not (folder / DONE).exists():
            return None
        if damaged := damage_in(folder, read=False):
            return set_aside(folder, damaged)
        forget_progress(folder)  # of a process that ended right after the mark was written
        return None

    # Locks

    @contextmanager
    def locked(self, outputs: Sequence[Output], waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keep other processes from making the same artifacts as long as the block lasts; of several processes that work
        together, the first one does so for all.

        Args:
          waiting: called if another process has one of them, before this one waits.

        Raises:
          Preempted: as `leave_if_asked`, while it waits.
        """
        left, told = (
            sorted({output.key for output in outputs}),
            False,
        )  # in one order, so that no two wait for each other
        with ExitStack() as held:

            def take() -> bool:
                nonlocal told
                try:
                    while left:
                        held.enter_context(self._lock(left[0]))
                        left.pop(0)
                except Timeout:
                    if not told:
                        told = True
                        waiting()
                return not left

            while not on_main_process(take):
                leave_if_asked()
                time.sleep(LOOK)
            with ExitStack() if self.remote is None else self._sending(self.remote, outputs):
                yield

    def _lock(self, key: str) -> Any:
        """A lock that is taken, and given back at the end of a block or of the process.

        Raises:
          Timeout: another process has it.
        """
        (self.root / LOCKS).mkdir(parents=True, exist_ok=True)
        return FileLock(self.root / LOCKS / f"{key}.lock", thread_local=False).acquire(timeout=0)

    def busy(self, outputs: Sequence[Output]) -> bool:
        """Whether somebody is making one of these artifacts on this machine, or in this folder."""
        try:
            for output in outputs:
                if (self.root / LOCKS / f"{output.key}.lock").exists():
                    with self._lock(output.key):
                        pass
        except Timeout:
            return True
        return False

    @contextmanager
    def _sending(self, remote: Remote, outputs: Sequence[Output]) -> Iterator[None]:
        """Send what a killed process left whole, states of trainings as they are saved, and in the end what was compiled."""

        def send_whole() -> None:
            for output in outputs:
                if not self.done(output) and (self._here(output) / DONE).exists() and self._mend(output) is None:
                    remote.publish(self._here(output), output.folder, output.key)

        on_main_process(send_whole)
        self._trainings.clear()
        if not is_main_process():
            yield
            return
        with remote.sending_states(self._trainings):
            try:
                yield
            finally:
                try:
                    remote.send_programs(programs_folder(self.root / PROGRAMS))
                    while self._trainings and not self.missing(outputs):
                        remote.forget_training(self._trainings.pop())
                except (OSError, JsublimError) as error:
                    self.say(f"{error} (whole artifacts were sent; what was compiled may not be)")

    # Artifacts

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
        """The folder of an artifact on this machine; what is read of it (all, or one file) is compared with what was written, once
        in a process."""
        folder = self._here(output)
        there = None if self.remote is None else self.remote.find(output.folder, output.key)
        if self.remote is not None and there is not None:
            return self.remote.fetch(there, folder, only)
        if not (folder / DONE).exists():
            return folder
        made = (folder / DONE).stat().st_mtime_ns
        if self._read.isdisjoint({(folder, None, made), (folder, only, made)}):
            if damage := damage_in(folder, only):
                line = set_aside(folder, damage) if is_main_process() else in_words(folder, damage)
                raise JsublimError(f"{line}; run the same command again: it is made again")
            self._read.add((folder, only, made))
        return folder

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
        """The artifact, its folder made if there is none.

        Raises:
          UsageError, JsublimError: as `Artifact`.
        """
        if output.folder not in self._opened:
            folder = self.path(output)

            def publish() -> None:
                if self.remote is not None:
                    self.remote.publish(folder, output.folder, output.key)

            self._opened[output.folder] = Artifact(folder, output.kind, output.inputs, publish, self.say)
        return self._opened[output.folder]

    def summary(self, output: Output) -> dict[str, Any]:
        """What whoever made it kept of it."""
        there = None if self.remote is None else self.remote.find(output.folder, output.key)
        if self.remote is not None and there is not None:
            return self.remote.summary(there)
        return read_summary(self._here(output))

    # What is no artifact

    def training(self, name: str) -> Path:
        """The folder of a training's states; the newest that another machine has sent is there."""
        if self.remote is not None:
            self._trainings.add(name)
            on_main_process(lambda: self.remote.resume_training(name))
        return self.root / TRAINING / name

    def agreed(self, name: str, decide: Callable[[], int]) -> int:
        """A number from 1 on that is decided once for all who share the store."""
        place, bucket = f"{TRAINING}/{name}.json", self.bucket

        def known() -> int | None:
            content = bucket.read(place)
            if content is not None and _count(content) is None:
                self.say(f"{bucket.place(place)}: is not what was written; it is decided anew")
            return _count(content)

        def keep() -> int:
            if not bucket.create(place, f"{count}\n".encode()) and _count(bucket.read(place)) is None:
                bucket.write(place, f"{count}\n".encode())
            return _count(bucket.read(place)) or count

        if (agreed := on_main_process(known)) is not None:
            return agreed
        count = decide()
        return on_main_process(keep)

    def keep_programs(self) -> None:
        """Have JAX keep compiled programs here, and use those that are (`programs.keep_programs`)."""
        folder, remote = programs_folder(self.root / PROGRAMS), self.remote
        if remote is not None:
            if process_count() > 1:  # all begin with the same ones, and compile together what is missing
                on_main_process(lambda: remote.send_programs(folder))
            remote.fetch_programs(folder, alone=not is_main_process())
        keep_programs(folder, self.say)


def _count(content: bytes | None) -> int | None:
    """The number from 1 on that a file holds; None where it holds anything else."""
    try:
        said = json.loads(content or b"")
    except ValueError:
        return None
    return said if type(said) is int and said >= 1 else None

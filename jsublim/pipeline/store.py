"""A store: artifacts under the hash of what went into them, in a folder or at a URL.

They are made deterministically, so nothing is lost where two machines make the same one: the first that is whole counts. On
one machine (or in a folder that several share) a lock of the operating system keeps two runs from doing the same work.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jsublim.config import Config
from jsublim.core.bucket import Bucket, at_once
from jsublim.core.files import write_text
from jsublim.errors import JsublimError
from jsublim.pipeline.artifact import (
    CHANGED,
    DONE,
    PARTS,
    PROGRESS,
    RECORD,
    Artifact,
    Output,
    damage,
    damage_in,
    damage_of,
    device,
    digest,
    forget_progress,
    in_words,
    mark_of,
    mark_text,
    read_mark,
    read_summary,
    versions,
)
from jsublim.pipeline.remote import States, fetch_programs, get_files, send_programs
from jsublim.runtime.processes import is_main_process, leave_if_asked, on_main_process, process_count
from jsublim.runtime.programs import keep_programs, programs_folder

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
PROGRAMS, TRAINING, LOCKS = "programs", "training", "locks"  # folders beside those of artifacts
LIST_EVERY = 5.0  # seconds for which a list of artifacts is believed
LOOK = 0.2  # seconds between two tries to get a lock that another process has
AGAIN = "run the same command again: it is made again"


class Store:
    """Artifacts, one folder each, named by kind, label and key. Any number of runs share one.

    Tasks read and write in the folder `root`. With a `url` that is a folder of this machine, and what counts lies behind the
    URL: artifacts are sent there once they are whole, and fetched when their path is first asked for. Of two machines that make
    the same artifact, each sends it under a name of its own: the first one under the artifact's, so that either can be copied to
    the other; the second one as `<label>.<attempt>-<key>`, which is removed again if the first was whole before it.
    """

    def __init__(self, root: Path, url: str | None = None, say: Callable[[str], None] = lambda text: None):
        """Nothing is made, and nobody asked, before it is used. `say`: told what a user should know, such as what is
        damaged. Raises UsageError: a URL whose library is not installed."""
        self.root, self.url, self.say = root, url, say
        self.bucket = Bucket.at(url or str(root))  # what all share who share the store
        self._states = States(self.bucket, root / TRAINING, say)
        self._marks: dict[str, dict[str, Any]] = {}  # of what is whole, by folder
        self._read: set[tuple[str, str | None]] = set()  # folders, and which of their files (None: all) were compared
        self._listed: dict[str, tuple[float, dict[str, list[str]]]] = {}  # when, and folders by key, of each kind

    @classmethod
    def of(cls, config: Config, say: Callable[[str], None] = lambda text: None) -> Store:
        """The store that a config names."""
        return cls(config.store_dir, config.store_url, say)

    def place(self, output: Output) -> str:
        """Where it is for all who share the store, in words."""
        return self.bucket.place(output.folder)

    # What is there

    def _names(self, output: Output) -> Iterator[str]:
        """The folders that may hold an artifact: its own; those of the same key that other commands or machines have made."""
        yield output.folder
        kind, now = output.kind, time.monotonic()
        if kind not in self._listed or now - self._listed[kind][0] > LIST_EVERY:
            names: dict[str, list[str]] = {}
            for name in self.bucket.folders(kind):
                names.setdefault(name.rpartition("-")[2], []).append(f"{kind}/{name}")
            self._listed[kind] = now, names
        yield from (name for name in self._listed[kind][1].get(output.key, ()) if name != output.folder)

    def _whole(self, output: Output, *, mend: bool = False) -> str | None:
        """The folder of a whole artifact, under whichever label it was made; None if there is none.

        Args:
          mend: look at it again, and at the sizes of its files (in a folder also at their times).

        Raises:
          JsublimError: its mark is not what was written; the artifact is unfinished then. With `mend` that is only said.
        """
        for name in self._names(output):
            if name in self._marks and not mend:
                return name
            self._marks.pop(name, None)
            content = self.bucket.read(f"{name}/{DONE}")
            if content is None:
                continue
            mark = read_mark(content, self.bucket.place(name))
            wrong = {DONE: CHANGED} if mark is None else self._damage(name, mark) if mend else {}
            if mark is not None and not wrong:
                self._marks[name] = mark
                return name
            line = self._set_aside(name, wrong)
            if not mend:
                raise JsublimError(f"{line}; {AGAIN}")
            self.say(f"{line}; it is made again")
        return None

    def done(self, output: Output) -> bool:
        """Whether the artifact is there, and whole."""
        return self._whole(output) is not None

    def missing(self, outputs: Sequence[Output]) -> list[int]:
        """Which of them are not there, by their places."""
        return [i for i, output in enumerate(outputs) if not self.done(output)]

    def summary(self, output: Output) -> dict[str, Any]:
        """What whoever made it kept of it."""
        name = self._whole(output)
        if name is None:
            raise JsublimError(f"{self.place(output)}: is not whole; run the same command again")
        return self._marks[name]["summary"]

    # Damage

    def mend(self, outputs: Sequence[Output]) -> None:
        """Look, before work, whether the files of whole artifacts are what was written, as far as sizes (in a folder
        also times) tell. A damaged one is set aside, which is said, and the artifact is unfinished again. Raises
        UsageError: one is of another version of jsublim."""

        def look(output: Output) -> None:
            name = self._whole(output, mend=True)
            if name is not None and self.url is None:
                forget_progress(self.root / name)  # of a process that ended right after the mark was written

        on_main_process(lambda: at_once(look, outputs))

    def _damage(self, name: str, mark: Mapping[str, Any]) -> dict[str, str]:
        if self.url is None:
            return damage_in(self.root / name, read=False)
        sizes = self.bucket.sizes(name)
        return {file: wrong for file, written in mark["files"].items() if (wrong := damage(written, sizes.get(file)))}

    def _set_aside(self, name: str, wrong: Mapping[str, str]) -> str:
        """Make a damaged artifact unfinished; what is there of it is kept. Returns a line that says so."""
        for file in [DONE, *(file for file in wrong if file != DONE)] if is_main_process() or self.url else ():
            with suppress(FileNotFoundError):
                self.bucket.set_aside(f"{name}/{file}")
        self._marks.pop(name, None)
        self._read = {pair for pair in self._read if pair[0] != name}
        return in_words(self.bucket.place(name), wrong)

    # Locks, which end with the process that has them

    @contextmanager
    def locked(self, outputs: Sequence[Output], waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Keep other processes from making the same artifacts as long as the block lasts; of several processes that work together,
        the first one does it for all.

        Args:
          waiting: called if another process is at one of them, before this one waits.

        Raises:
          Preempted: as `leave_if_asked`, while it waits.
        """
        once = functools.cache(waiting)
        with ExitStack() as held:

            def take(key: str) -> bool:
                try:
                    held.enter_context(self._lock(key))
                except Timeout:
                    once()
                    return False
                return True

            for key in sorted({output.key for output in outputs}):  # in one order: no two wait for each other
                while not on_main_process(functools.partial(take, key)):
                    leave_if_asked()
                    time.sleep(LOOK)
            self._listed.clear()
            with self._sending(outputs) if self.url else nullcontext():
                yield

    def busy(self, outputs: Sequence[Output]) -> bool:
        """Whether somebody is making one of these artifacts on this machine, or in this folder."""
        with suppress(Timeout):
            for output in outputs:
                if (self.root / LOCKS / f"{output.key}.lock").exists():
                    with self._lock(output.key):
                        pass
            return False
        return True

    def _lock(self, key: str) -> Any:
        """A lock that is taken, and given back at the end of a block. Raises Timeout: somebody has it."""
        (self.root / LOCKS).mkdir(parents=True, exist_ok=True)
        return FileLock(self.root / LOCKS / f"{key}.lock", thread_local=False).acquire(timeout=0)

    # Artifacts

    def path(self, output: Output, only: str | None = None) -> Path:
        """Its folder on this machine, under whichever label it was made: another command may have called the same
        thing otherwise. What is read of it (all, or `only` one file and its record) is there, and was compared with
        its digests once in this process. Raises JsublimError: it is whole, and not what was written; it is
        unfinished then."""
        name = self._whole(output)
        if name is not None and not self._read.isdisjoint({(name, None), (name, only)}):
            return self._here(output, name)
        self._marks.pop(name or "", None)  # somebody may have made it again
        name = self._whole(output)
        folder = self._here(output, name)
        if name is None:
            return folder
        files = {
            file: written
            for file, written in self._marks[name]["files"].items()
            if only in (None, file) or file == RECORD
        }
        if self.url is None:
            wrong = {file: what for file in files if (what := damage_of(folder / file, files[file], read=True))}
        else:
            wrong = get_files(self.bucket, name, files, folder, self.say)
        if wrong:
            raise JsublimError(f"{self._set_aside(name, wrong)}; {AGAIN}")
        if self.url and only is None:
            write_text(folder / DONE, mark_text(self._marks[name]))
            forget_progress(folder)
        self._read.add((name, only))
        return folder

    def file(self, output: Output, name: str) -> Path:
        """One file of a whole artifact; the others, which may be large, are not fetched. Raises as `path`."""
        return self.path(output, name) / name

    def _here(self, output: Output, name: str | None) -> Path:
        """The folder of an artifact on this machine, which is whole as `name`."""
        if self.url is not None:
            return self.root / output.folder
        begun = (other for other in self._names(output) if (self.root / other).exists())
        return self.root / (name or next(begun, output.folder))

    def open(self, output: Output) -> Artifact:
        """The artifact, its folder made if there is none. Raises JsublimError: as `Artifact`."""
        publish = (lambda: self._publish(output)) if self.url else lambda: None
        return Artifact(self.path(output), output, publish, self.say)

    def agreed(self, name: str, decide: Callable[[], int]) -> int:
        """A number that is decided once for all who share the store: it is an artifact, too."""
        output = Output("agreed", name, {"what": name})
        self.mend([output])
        if not on_main_process(lambda: self.done(output)):
            number = decide()
            on_main_process(lambda: self.done(output) or self.open(output).finish({"number": number}))
        return on_main_process(lambda: self.summary(output)["number"])

    # Behind a URL

    def _publish(self, output: Output) -> None:
        """Send a whole artifact, its mark last. If another machine's is whole before, that one counts, and is fetched."""
        folder = self.root / output.folder
        mark = mark_of(folder)
        if self._whole(output) is None:
            name = self._own_name(output)
            at_once(lambda file: self.bucket.upload(folder / file, f"{name}/{file}"), mark["files"])
            self._listed.clear()
            if self._whole(output) is None:
                self.bucket.write(f"{name}/{DONE}", (folder / DONE).read_bytes())
            else:
                self.bucket.remove(name)
        there = self._whole(output)
        if there is not None and self._marks[there] == mark:
            self._read.add((there, None))
        else:
            (folder / DONE).unlink()
            self.path(output)

    def _own_name(self, output: Output) -> str:
        """The artifact's own folder, unless another machine has begun to send it."""
        own = (self.root / output.folder / RECORD).read_bytes()
        theirs = f"{output.folder}/{RECORD}"
        if self.bucket.create(theirs, own) or self.bucket.read(theirs) == own:
            return output.folder
        return f"{output.folder.removesuffix(f'-{output.key}')}.{json.loads(own)['attempt']}-{output.key}"

    @contextmanager
    def _sending(self, outputs: Sequence[Output]) -> Iterator[None]:
        """Send what a killed process left whole, states of trainings as they are saved, and in the end what was compiled."""

        def send_whole() -> None:
            for output in outputs:
                folder = self.root / output.folder
                if not (folder / DONE).exists() or self.done(output):
                    continue
                if wrong := damage_in(folder):
                    (folder / DONE).unlink()
                    self.say(f"{in_words(folder, wrong)}; it is made again")
                else:
                    self._publish(output)

        on_main_process(send_whole)
        if not is_main_process():
            yield
            return
        with self._states.sending():
            try:
                yield
            finally:
                try:
                    self._send_programs()
                    if not self.missing(outputs):
                        self._states.forget()
                except (OSError, JsublimError) as error:
                    self.say(f"{error} (whole artifacts were sent; what was compiled may not be)")

    def _send_programs(self) -> None:
        folder = programs_folder(self.root / PROGRAMS)
        send_programs(self.bucket, f"{PROGRAMS}/{folder.name}", folder, self.say)

    def keep_programs(self) -> None:
        """Have JAX keep compiled programs here, and use those that are (`programs.keep_programs`)."""
        folder = programs_folder(self.root / PROGRAMS)
        if self.url is not None:
            if process_count() > 1:  # all begin with the same ones, and compile together what is missing
                on_main_process(self._send_programs)
            alone = not is_main_process()
            fetch_programs(self.bucket, f"{PROGRAMS}/{folder.name}", folder, self.say, alone=alone)
        keep_programs(folder, self.say)

    def training(self, name: str) -> Path:
        """The folder of a training's states; the newest that another machine has sent is there."""
        if self.url is not None:
            on_main_process(lambda: self._states.resume(name))
        return self.root / TRAINING / name

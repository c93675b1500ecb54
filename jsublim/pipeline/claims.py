"""Claims: of all processes that share a store, one makes an artifact, and the others can say which one does.

A claim is `locks/<key>/<turn>.json`, with what its owner is; that the owner is alive it says itself, every `BEAT` seconds, in
`locks/owners/<owner>.json`. In a folder a lock of the operating system keeps others out, and ends with its process; in a bucket
it is that an object can be created once. Where the owner's machine is gone, its lock may stay: after `STALE` seconds without
a sign of life a claim is taken over, under the next turn.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from jsublim.bucket import Bucket
from jsublim.errors import JsublimError
from jsublim.files import host, remove_abandoned, started, write_json
from jsublim.processes import leave_if_asked, on_main_process

BEAT, STALE = 15.0, 120.0  # seconds: between signs of life; without one, after which a claim is taken over
LONG = 86400.0  # and after which the last one is removed; clocks of two machines differ by less
LOOK, LOOK_AFAR = 0.2, 2.0  # seconds between two tries to get what another process has: in a folder, in a bucket


@dataclass(frozen=True)
class Owner:
    """A process. `started` is what its system counts from its boot to its start: numbers of processes are used again."""

    id: str
    host: str
    pid: int
    started: str
    command: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split(':')[0]} ({self.command}, since {self.since})"

    @staticmethod
    def own() -> Owner:
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        begun = started(os.getpid()) or ""
        return Owner(uuid.uuid4().hex[:12], host(), os.getpid(), begun, shlex.join(words)[:200], now)

    @staticmethod
    def read(content: bytes | None) -> Owner | None:
        """None where that is no claim."""
        try:
            said = json.loads(content or b"")
            kinds = Owner.__annotations__
            known = {name: said[name] for name in kinds}
            return Owner(**known) if all(type(value).__name__ == kinds[name] for name, value in known.items()) else None
        except (ValueError, TypeError, KeyError):
            return None

    @property
    def is_gone(self) -> bool:
        """Whether this machine knows that the process has ended; it knows nothing about those of others."""
        return self.host == host() and started(self.pid) not in (self.started, "")


class Claims(ABC):
    """What one process has claimed in a store, and what others have."""

    look = LOOK

    def __init__(self, say: Callable[[str], None]):
        self.owner, self.say = Owner.own(), say
        self._held: dict[str, int] = {}  # keys, with their turns
        self._seen: dict[str, tuple[bytes | None, float]] = {}  # signs of life of others, and when each was new
        self._beats, self._heart = 0, threading.Event()  # the event is set while no signs of life are given
        self._heart.set()
        self.on_beat: Callable[[], None] = lambda: None

    @contextmanager
    def hold(self, keys: Iterable[str], waiting: Callable[[], None]) -> Iterator[None]:
        """Have the keys for as long as the block lasts; `waiting` is called once, if another process has one of them. Of several
        processes that work together, the first one has them for all.

        Raises:
          Preempted: as `leave_if_asked`, while it waits.
        """
        told, wanted = False, sorted(set(keys))  # in one order for everybody, so that no two wait for each other
        taken: list[str] = []

        def take() -> bool:
            nonlocal told
            while len(taken) < len(wanted):
                if not self._take(wanted[len(taken)]):
                    if not told:
                        told = True
                        waiting()
                    return False
                taken.append(wanted[len(taken)])
            return True

        try:
            while not on_main_process(take):
                leave_if_asked()
                time.sleep(self.look)
            yield
        finally:
            for key in reversed(taken):
                with self._telling():
                    self._release(key, self._held.pop(key))
            if not self._held and not self._heart.is_set():
                self._heart.set()
                with self._telling():
                    self._remove(f"owners/{self.owner.id}.json")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Say what fails in giving back: the claim becomes stale, and what was made counts."""
        try:
            yield
        except (OSError, JsublimError) as error:
            self.say(str(error))

    def _take(self, key: str) -> bool:
        if self._heart.is_set():
            self._live()
        turn = max(self._turns(key), default=1)
        if not self._try(key, turn):
            other = Owner.read(self._read(f"{key}/{turn}.json"))
            if not self._is_stale(key, turn, other):
                return False
            turn += 1
            if not self._try(key, turn):
                return False
            who = other or "what cannot be read"
            why = "has ended" if other is not None and other.is_gone else f"was not heard of for {STALE:.0f} s"
            self.say(f"{self.place}/{key}/{turn - 1}.json: the claim of {who} is taken over: it {why}")
        self._held[key] = turn
        return True

    def holder(self, keys: Iterable[str]) -> str | None:
        """Who has one of the keys, in words; None if nobody has, or this process."""
        for key in set(keys) - set(self._held):
            turn = max(self._turns(key), default=0)
            if turn and self._is_taken(key, turn):
                other = Owner.read(self._read(f"{key}/{turn}.json"))
                if not self._is_stale(key, turn, other):
                    return str(other or "another process")
        return None

    def _is_stale(self, key: str, turn: int, other: Owner | None) -> bool:
        """Whether the owner of a claim has ended, or was not heard of while this process listened for long enough: clocks of
        different machines are not compared."""
        if other is not None and other.host == self.owner.host:
            return other.is_gone
        name = f"{key}/{turn}.json" if other is None else f"owners/{other.id}.json"
        sign, now = self._read(name), time.monotonic()
        if name not in self._seen or self._seen[name][0] != sign:
            self._seen[name] = sign, now
        return now - self._seen[name][1] > STALE

    def clear(self) -> None:
        """Remove signs of life of processes that were killed; one that lives after all writes its own again with its next beat."""
        for name in self._names("owners"):
            said = self._read(f"owners/{name}")
            other = Owner.read(said)
            if other is not None and (other.is_gone or time.time() - _beat_at(said) > LONG):
                self._remove(f"owners/{name}")

    def _live(self) -> None:
        """Begin to give signs of life."""
        self._beat()
        heart = self._heart = threading.Event()

        def run() -> None:
            while not heart.wait(BEAT):
                for act in (self._beat, self.on_beat):
                    with suppress(Exception):  # the next beat may get through; a heart that stops would lose the claims
                        act()

        threading.Thread(target=run, name="claims", daemon=True).start()

    def _beat(self) -> None:
        self._beats += 1
        self._write(f"owners/{self.owner.id}.json", asdict(self.owner) | {"heartbeat": self._beats, "at": time.time()})

    @property
    @abstractmethod
    def place(self) -> str:
        """Where claims are, for people."""

    @abstractmethod
    def _names(self, folder: str) -> list[str]:
        """What there is in a folder."""

    @abstractmethod
    def _turns(self, key: str) -> list[int]:
        """The turns of a key that there are."""

    @abstractmethod
    def _try(self, key: str, turn: int) -> bool:
        """Take a turn, unless another process has it, or a later one."""

    @abstractmethod
    def _is_taken(self, key: str, turn: int) -> bool: ...

    @abstractmethod
    def _release(self, key: str, turn: int) -> None: ...

    @abstractmethod
    def _read(self, name: str) -> bytes | None: ...

    @abstractmethod
    def _write(self, name: str, value: dict[str, Any]) -> None: ...

    @abstractmethod
    def _remove(self, name: str) -> None: ...


def _beat_at(sign: bytes | None) -> float:
    """When a sign of life was given, in seconds since 1970; now, where that is not said."""
    at = json.loads(sign or b"{}").get("at")
    return at if isinstance(at, int | float) else time.time()


def _numbers(names: Iterable[str], ending: str) -> list[int]:
    stems = (name.removesuffix(ending) for name in names if name.endswith(ending))
    return [int(stem) for stem in stems if stem.isdecimal()]


class FolderClaims(Claims):
    """In a folder that processes share."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        super().__init__(say)
        self.folder = folder
        self._locks: dict[str, FileLock | SoftFileLock] = {}

    @property
    def place(self) -> str:
        return str(self.folder)

    def clear(self) -> None:
        remove_abandoned(self.folder / "owners")
        for key in {path.parent.name for path in self.folder.glob("*/*.json")} - {"owners"}:
            for turn in _numbers(self._names(key), ".json"):  # of something whole, which nobody claims again
                owner = Owner.read(self._read(f"{key}/{turn}.json"))
                if owner is not None and owner.is_gone and not self._is_taken(key, turn):
                    self._remove(f"{key}/{turn}.json")
        super().clear()

    def _names(self, folder: str) -> list[str]:
        return os.listdir(self.folder / folder) if (self.folder / folder).is_dir() else []

    def _turns(self, key: str) -> list[int]:
        return _numbers(self._names(key), ".lock")

    def _lock(self, key: str, turn: int) -> FileLock | SoftFileLock | None:
        """The lock of a turn, taken; None where another process has it."""
        path = self.folder / key / f"{turn}.lock"
        for kind in (FileLock, SoftFileLock):
            lock = kind(path, thread_local=False)
            try:
                lock.acquire(timeout=0)
                return lock
            except Timeout:
                return None
            except NotImplementedError:  # a file system without locks
                continue
        return None

    def _try(self, key: str, turn: int) -> bool:
        (self.folder / key).mkdir(parents=True, exist_ok=True)
        lock = self._lock(key, turn)
        if lock is None:
            return False
        if max(self._turns(key), default=turn) > turn:  # somebody has taken over just now
            lock.release()
            return False
        try:
            remove_abandoned(self.folder / key)
            self._write(f"{key}/{turn}.json", asdict(self.owner))
        except BaseException:
            lock.release()
            raise
        self._locks[key] = lock
        return True

    def _is_taken(self, key: str, turn: int) -> bool:
        lock = self._lock(key, turn)
        if lock is not None:
            lock.release()
        return lock is None

    def _release(self, key: str, turn: int) -> None:
        try:
            self._remove(f"{key}/{turn}.json")
        finally:
            self._locks.pop(key).release()

    def _read(self, name: str) -> bytes | None:
        with suppress(OSError):
            return (self.folder / name).read_bytes()
        return None

    def _write(self, name: str, value: dict[str, Any]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)

    def _remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class BucketClaims(Claims):
    """In a bucket."""

    look = LOOK_AFAR

    def __init__(self, bucket: Bucket, say: Callable[[str], None]):
        super().__init__(say)
        self.bucket = bucket

    @property
    def place(self) -> str:
        return self.bucket.place("locks")

    def _names(self, folder: str) -> list[str]:
        return list(self.bucket.sizes(f"locks/{folder}"))

    def _turns(self, key: str) -> list[int]:
        return _numbers(self._names(key), ".json")

    def _try(self, key: str, turn: int) -> bool:
        return self.bucket.create(f"locks/{key}/{turn}.json", json.dumps(asdict(self.owner)).encode())

    def _is_taken(self, key: str, turn: int) -> bool:
        return True

    def _release(self, key: str, turn: int) -> None:
        """Turns that were taken over go first: whoever looks meanwhile finds the one that counts."""
        for each in [*(each for each in sorted(self._turns(key)) if each < turn), turn]:
            owner = Owner.read(self._read(f"{key}/{each}.json"))
            if each < turn or owner == self.owner:  # else it was taken over, and given back, and is another's by now
                self._remove(f"{key}/{each}.json")

    def _read(self, name: str) -> bytes | None:
        return self.bucket.read(f"locks/{name}")

    def _write(self, name: str, value: dict[str, Any]) -> None:
        self.bucket.write(f"locks/{name}", json.dumps(value).encode())

    def _remove(self, name: str) -> None:
        self.bucket.remove(f"locks/{name}")

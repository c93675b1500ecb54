"""How long a run will still take: what its tasks should take, corrected by what those so far have taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

COMPILING = 6.0  # seconds of one program, before any was compiled
TRUST = 0.05  # the share of a kind's work after which its measured speed counts as much as that of all work so far
NEARLY = 0.9  # how far a task counts as done at most that has told nothing for long


@dataclass(frozen=True)
class Expected:
    """A task that is to be done.

    Attributes:
      seconds: that it should take on this machine, compiling left out; more than 0.
      program: equal for tasks that run the same compiled programs; None where nothing is compiled.
    """

    kind: str
    seconds: float
    program: Hashable


@dataclass
class _Underway:
    """The task that is being done.

    Attributes:
      begun, compiled: when that was, and the seconds that had been compiled by then; is_new: its program was not compiled before.
      share, told: how far it was when it last said so, and after how many seconds of work.
    """

    task: Expected
    begun: float
    compiled: float
    is_new: bool
    share: float = 0.0
    told: float = 0.0


@dataclass
class TimeLeft:
    """The one estimate of a run. Tasks are told beforehand; the one under way says how far it is, and when it ends.

    Seconds of work are kept apart from those of compiling: of tasks with one program, the first compiles. Another thread may ask.

    Attributes:
      compiling: how many seconds this process has compiled so far; clock: seconds.
    """

    compiling: Callable[[], float] = lambda: 0.0
    clock: Callable[[], float] = time.perf_counter
    _ahead: dict[str, Expected] = field(default_factory=dict)
    _of_kind: dict[str, float] = field(default_factory=dict)  # seconds that all tasks of a kind should take
    _should: dict[str, float] = field(default_factory=dict)  # the same of those that have ended
    _took: dict[str, float] = field(default_factory=dict)  # seconds that those took
    _begun: set[Hashable] = field(default_factory=set)  # programs
    _compiled: float = 0.0  # seconds, of programs that are whole
    _underway: _Underway | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._start = self.clock()

    def expect(self, tasks: Mapping[str, Expected]) -> None:
        """Tell which tasks are to come, by key; those that are known already stay as they are."""
        with self._lock:
            for key, task in tasks.items():
                if key not in self._ahead:
                    self._ahead[key] = task
                    self._of_kind[task.kind] = self._of_kind.get(task.kind, 0.0) + task.seconds

    @property
    def gone(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self._start

    @property
    def programs(self) -> tuple[int, int]:
        """How many programs were begun, of how many that are known."""
        with self._lock:
            return len(self._begun), len(self._begun | {task.program for task in self._ahead.values()} - {None})

    def begin(self, key: str) -> None:
        with self._lock:
            if (task := self._ahead.pop(key, None)) is not None:
                is_new = task.program not in self._begun and task.program is not None
                self._underway = _Underway(task, self.clock(), self.compiling(), is_new)
                self._begun |= {task.program} - {None}

    def forget(self, key: str) -> None:
        """Somebody else has done it."""
        with self._lock:
            self._ahead.pop(key, None)

    def tell(self, share: float) -> None:
        """How far the task under way is, from 0 to 1."""
        with self._lock:
            if (now := self._underway) is not None:
                now.share, now.told = share, self._worked(now)

    def end(self) -> None:
        """The task under way has ended."""
        with self._lock:
            if (now := self._underway) is not None:
                kind = now.task.kind
                self._should[kind] = self._should.get(kind, 0.0) + now.task.seconds
                self._took[kind] = self._took.get(kind, 0.0) + self._worked(now)
                self._compiled += self.compiling() - now.compiled
                self._underway = None

    def seconds(self) -> float | None:
        """Seconds that are left; None where nothing is known of what is to come."""
        with self._lock:
            now = self._underway
            if now is None and not self._ahead:
                return None
            should, took, left = dict(self._should), dict(self._took), 0.0
            if now is not None:
                kind, worked, share = now.task.kind, self._worked(now), now.share
                # Since it last said how far it is, it has gone on; nearly to its end at most.
                rest = max((1 - share) * now.task.seconds * self._speed(kind, should, took), 1e-9)
                share += (1 - share) * min((worked - now.told) / rest, NEARLY)
                should[kind] = should.get(kind, 0.0) + share * now.task.seconds
                took[kind] = took.get(kind, 0.0) + worked
                left = (1 - share) * now.task.seconds * self._speed(kind, should, took)
            left += sum(task.seconds * self._speed(task.kind, should, took) for task in self._ahead.values())
            return left + self._compiling_left()

    def _speed(self, kind: str, should: Mapping[str, float], took: Mapping[str, float]) -> float:
        """Seconds that a second of a kind's expected work takes: as measured, and before that as all work so far has taken."""
        trust = TRUST * sum(self._of_kind.values())
        every = (trust + sum(took.values())) / (trust + sum(should.values()))
        trust = TRUST * self._of_kind[kind]
        return (trust * every + took.get(kind, 0.0)) / (trust + should.get(kind, 0.0))

    def _compiling_left(self) -> float:
        now, (begun, known) = self._underway, self.programs
        is_new = now is not None and now.is_new
        each = (COMPILING + self._compiled) / (1 + begun - is_new)
        here = max(each - (self.compiling() - now.compiled), 0.0) if now is not None and now.is_new else 0.0
        return here + each * (known - begun)

    def _worked(self, now: _Underway) -> float:
        return max(self.clock() - now.begun - (self.compiling() - now.compiled), 0.0)

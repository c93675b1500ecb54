"""Progress of work: one bar per kind of work on a terminal, one line a minute elsewhere; and the seconds that
each kind took."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.segment import Segment

from jsublim.errors import printable

Tick = Callable[[int], None]  # called with the number of units just finished
LINE_EVERY, DETAIL_EVERY = 60.0, 2.0  # seconds: between lines where there is no terminal, between looks at a detail


def no_tick(units: int) -> None:
    """Progress that nobody watches."""


@dataclass
class StageState:
    """How far the kind of work is that is under way."""

    kind: str
    expected: int  # stages
    finished: int = 0
    label: str = ""
    share: float = 0.0  # of the stage under way
    units: int = 0  # ticked since it was begun
    begun: float = field(default_factory=time.perf_counter)
    start: float = 0.0  # finished stages when this call began to count

    def line(self, now: float, detail: str) -> str:
        """In a line of text: stage, how much is done, rate, time left, and whatever the work says of itself."""
        done, seconds = self.finished + self.share, max(now - self.begun, 1e-9)
        parts = [f"{self.kind} {self.label}".rstrip(), f"{min(done / self.expected, 1):.0%} done"]
        parts += [f"{self.finished} of {self.expected}"] if self.expected > 1 else []
        parts += [f"{self.units / seconds:.3g} a second"] if self.units else []
        here = done - self.start
        left = (self.expected - done) * seconds / here if here > 0 else None
        parts += [f"{clock(seconds)} so far"]
        parts += ["time left unknown" if left is None else f"about {clock(max(left, 0))} left"]
        return ", ".join([*parts, *([detail] if detail else [])])


def clock(seconds: float) -> str:
    """ "4:05" is four minutes and five seconds; "1:04:05" an hour more."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Terminal(Console):
    """Whatever is printed there is text: names and rows that others wrote send it no escape sequences, and hold no markup."""

    def __init__(self, **options: Any):
        plain: dict[str, Any] = {"markup": False, "emoji": False}
        super().__init__(**plain | options)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def out(self, *objects: Any, **options: Any) -> None:
        """Text for other programs: as it is, unless it is shown on a terminal."""
        if self.is_terminal:
            options.setdefault("highlight", False)
            super().out(*objects, **options)
        else:
            print(*objects, file=self.file)


class Progress:
    """Bars, or lines, on a console; silent without one.

    Attributes:
      seconds: how long each kind of work took, by its name; lines: what was said, each line once.
    """

    def __init__(self, console: Console | None = None, line_every: float = LINE_EVERY):
        self.console, self.line_every = console or Console(quiet=True), line_every
        self.seconds: dict[str, float] = {}
        self.lines: list[str] = []
        self._expected: dict[str, int] = {}
        self._finished: dict[str, int] = {}
        self._bars: Bars | None = None
        self._bar = TaskID(0)
        self._state: StageState | None = None
        self._detail: Callable[[], str] | None = None
        self._ended: threading.Event | None = None

    def expect(self, counts: Mapping[str, int]) -> None:
        """Say how many stages of each kind are to come."""
        self._expected, self._finished = dict(counts), {}

    def say(self, text: str) -> None:
        """Print a line, once."""
        if text not in self.lines:
            self.lines.append(text)
            self.console.print(text, markup=False)  # an answer such as "[1]" is none

    def watch(self, detail: Callable[[], str]) -> None:
        """Until the stage ends, print also what this says; it is asked now and then only."""
        self._detail = detail

    @contextmanager
    def stage(self, kind: str, units: int | None = None, label: str = "") -> Iterator[Tick]:
        """Time one stage, of so many ticks (`units`), if that is known. Stages of one kind that follow one another share a bar, which counts stages."""
        begin = time.perf_counter()
        if self._state is None or kind != self._state.kind:
            self.close()
            self._open(kind)
        state = self._state
        assert state is not None
        state.label, state.share = label, 0.0
        self._show(label=label)
        share = 1 / units if units else 0.0

        def tick(done: int) -> None:
            state.share, state.units = state.share + done * share, state.units + done
            self._show()

        try:
            yield tick
            state.finished = self._finished[kind] = self._finished.get(kind, 0) + 1
            state.share, self._detail = 0.0, None
            self._show()
            if state.finished >= state.expected:
                self.close()
        except BaseException:
            self.close()
            raise
        finally:
            self.seconds[kind] = round(self.seconds.get(kind, 0.0) + time.perf_counter() - begin, 2)

    def _open(self, kind: str) -> None:
        done = self._finished.get(kind, 0)
        self._state = StageState(kind, self._expected.get(kind, 1), done, start=done)
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[finished]}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[label]}", markup=False),  # a name such as "[x]" is no markup
        )
        bars = self._bars = Bars(*columns, console=self.console)
        self._bar = bars.add_task(kind, total=self._state.expected, completed=done, finished=done, label="")
        bars.start()
        self._ended = threading.Event()
        threading.Thread(target=self._tell, args=(self._state, bars, self._ended), daemon=True).start()

    def _tell(self, state: StageState, bars: Bars, ended: threading.Event) -> None:
        """Now and then, however long a step (or a compilation) takes: a line, or beside the bar what the work says of itself."""
        terminal = self.console.is_terminal
        while not ended.wait(DETAIL_EVERY if terminal else self.line_every):
            detail = self._detail() if self._detail else ""
            if terminal:
                bars.update(self._bar, label=f"{state.label} {detail}".rstrip())
            else:
                self.console.print(state.line(time.perf_counter(), detail), markup=False, soft_wrap=True)

    def _show(self, **fields: Any) -> None:
        state = self._state
        if self._bars is not None and state is not None:
            self._bars.update(self._bar, completed=state.finished + state.share, finished=state.finished, **fields)

    def close(self) -> None:
        """Leave the bar that is shown as it is."""
        if self._ended is not None:
            self._ended.set()
        if self._bars is not None:
            self._bars.update(self._bar, label="")
            self._bars.stop()
        self._bars = self._state = self._ended = self._detail = None

"""Progress of work: on a terminal one bar for the run and one for the kind of work under way, elsewhere a line a minute, and both say
one estimate of the time left; and the seconds that each kind took."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.segment import Segment
from rich.table import Column

from jsublim.core.timeleft import Expected, TimeLeft
from jsublim.errors import printable

Tick = Callable[[int], None]  # called with the number of units just finished
LINE_EVERY = 60.0  # seconds between lines where there is no terminal
LOOK_EVERY = 1.0  # the same between looks where there is one


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

    def line(self, now: float, detail: str) -> str:
        """In a line of text: what is made, how much of it, how fast, and whatever the work says of itself."""
        parts = [f"{self.finished} of {self.expected}"] if self.expected > 1 else []
        parts += [self.label] if self.label else []
        parts += [f"{self.share:.0%}"] if self.share else []
        parts += [f"{self.units / max(now - self.begun, 1e-9):.3g} a second"] if self.units else []
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
      left: of the whole run, which may be several experiments; each of them has a progress of its own.
      compiling: what is being compiled now, if anything.
      seconds: how long each kind of work took, by its name; note: told of each time; lines: what was said, each line once.
    """

    def __init__(
        self,
        console: Console | None = None,
        line_every: float = LINE_EVERY,
        left: TimeLeft | None = None,
        compiling: Callable[[], str | None] = lambda: None,
    ):
        self.console, self.line_every = console or Console(quiet=True), line_every
        self.left, self.compiling = left or TimeLeft(), compiling
        self.seconds: dict[str, float] = {}
        self.note: Callable[[str, float], object] = lambda kind, seconds: None
        self.lines: list[str] = []
        self._expected: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._bars: Bars | None = None
        self._state: StageState | None = None
        self._detail: Callable[[], str] | None = None
        self._ended: threading.Event | None = None

    def expect(self, tasks: Mapping[str, Expected]) -> None:
        """Say which tasks are to come, by key."""
        self._expected, self._finished = Counter(task.kind for task in tasks.values()), Counter()
        self.left.expect(tasks)

    def say(self, text: str) -> None:
        """Print a line, once."""
        if text not in self.lines:
            self.lines.append(text)
            self.console.print(text, markup=False, highlight=False)  # an answer such as "[1]" is none

    def watch(self, detail: Callable[[], str]) -> None:
        """Until the stage ends, print also what this says; it is asked now and then only."""
        self._detail = detail

    @contextmanager
    def stage(self, kind: str, units: int | None = None, label: str = "", key: str = "") -> Iterator[Tick]:
        """Time one stage, of so many ticks (`units`), if that is known. Stages of one kind that follow one another share a bar, which counts
        stages; `key` is that of the task, if it was expected."""
        begin = time.perf_counter()
        if self._state is None or kind != self._state.kind:
            self.close()
            self._open(kind)
        state = self._state
        assert state is not None
        state.label, state.share = label, 0.0
        if units and not key:  # of what nobody expected, its share tells how long it takes
            self.left.expect({kind: Expected(kind, 1.0, None)})
        self.left.begin(key or kind)

        def tick(done: int) -> None:
            state.units += done
            if units:
                state.share = min(state.share + done / units, 1.0)
                self.left.tell(state.share)

        try:
            yield tick
            self._finished[kind] += 1
            state.finished, state.share, self._detail = self._finished[kind], 0.0, None
        except BaseException:
            self.close()
            raise
        finally:
            self.left.end()
            self.took(kind, time.perf_counter() - begin)
        if state.finished >= state.expected:
            self.close()

    def took(self, kind: str, seconds: float) -> None:
        """Add to what a kind of work took."""
        self.seconds[kind] = round(self.seconds.get(kind, 0.0) + seconds, 2)
        self.note(kind, seconds)

    def _open(self, kind: str) -> None:
        self._state = StageState(kind, max(self._expected[kind], 1), self._finished[kind])
        text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._bars = Bars(
            TextColumn("{task.description:<12}"), BarColumn(16), text, console=self.console, transient=True
        )
        bars = {name: self._bars.add_task(name, total=1.0, text="") for name in ("whole run", kind)}
        if self.console.is_terminal:
            self._bars.start()
        self._ended = threading.Event()
        threading.Thread(target=self._tell, args=(self._state, self._bars, bars, self._ended), daemon=True).start()

    def _tell(self, state: StageState, bars: Bars, names: Mapping[str, TaskID], ended: threading.Event) -> None:
        """Now and then, however long a step (or a compilation) takes: both bars, or a line."""
        terminal = self.console.is_terminal
        pause = 0.1 if terminal else self.line_every
        while not ended.wait(pause):
            pause = LOOK_EVERY if terminal else self.line_every
            run, stage = names.values()
            share, text = self._whole()
            stage_text = state.line(time.perf_counter(), self._about())
            if terminal:
                bars.update(run, completed=share, text=text)
                bars.update(stage, completed=(state.finished + state.share) / state.expected, text=stage_text)
            else:
                self.console.print(f"{text}; {state.kind} {stage_text}".rstrip(), markup=False, soft_wrap=True)

    def _whole(self) -> tuple[float, str]:
        """Of the whole run: the share of its time that is over, and that in words."""
        seconds, left = self.left.gone, self.left.seconds()
        if left is None:
            return 0.0, f"{clock(seconds)} so far"
        share = seconds / max(seconds + left, 1e-9)
        return share, f"{share:.0%}, {clock(seconds)} so far, about {clock(left)} left"

    def _about(self) -> str:
        """What the work under way says of itself; before all what is being compiled."""
        if (name := self.compiling()) is not None:
            begun, known = self.left.programs
            return f"compiling {name}" + (f" ({begun} of {known})" if known else "")
        detail = self._detail  # another thread may take it away
        return detail() if detail else ""

    def close(self) -> None:
        """Leave one line in place of the bars, if anything was finished."""
        state, self._state, self._detail = self._state, None, None
        if self._ended is not None:
            self._ended.set()
        if self._bars is not None and self.console.is_terminal:
            self._bars.stop()
        self._bars = self._ended = None
        if state is not None and state.finished:
            count = f"{state.finished} of {state.expected}" if state.expected > 1 else "done"
            self.console.print(f"{state.kind}: {count}, {clock(time.perf_counter() - state.begun)}", highlight=False)

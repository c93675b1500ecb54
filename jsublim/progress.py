"""What is printed while work is done: one bar per kind of work, and the seconds each kind took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Tick = Callable[[int], None]  # called with the number of units just finished


def no_tick(units: int) -> None:
    """Progress that nobody watches."""


class Progress:
    """Bars on a console, silent without one. `seconds` holds how long each kind of work took, by its name."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(quiet=True)
        self.seconds: dict[str, float] = {}
        self._said: set[str] = set()
        self._expected: dict[str, int] = {}
        self._bars: Bars | None = None
        self._kind, self._bar = "", TaskID(0)
        self._finished: dict[str, int] = {}

    def expect(self, counts: Mapping[str, int]) -> None:
        """Say how many stages of each kind are to come."""
        self._expected, self._finished = dict(counts), {}

    def say(self, text: str) -> None:
        """Print a line, once."""
        if text not in self._said:
            self._said.add(text)
            self.console.print(text, markup=False)  # an answer such as "[1]" is none

    @contextmanager
    def stage(self, kind: str, units: int | None = None, label: str = "") -> Iterator[Tick]:
        """Time one stage. Stages of one kind that follow one another share a bar, which counts stages.

        Args:
          units: how many the stage will tick; None where that cannot be told.
        """
        begin = time.perf_counter()
        if kind != self._kind:
            self.close()
            self._open(kind)
        assert self._bars is not None
        self._bars.update(self._bar, label=label)
        share = 1 / units if units else 0.0

        def tick(done: int) -> None:
            assert self._bars is not None
            self._bars.update(self._bar, advance=done * share)

        try:
            yield tick
            done = self._finished[kind] = self._finished.get(kind, 0) + 1
            self._bars.update(self._bar, completed=done, finished=done)
            if done >= self._expected.get(kind, 1):
                self.close()
        except BaseException:
            self.close()
            raise
        finally:
            self.seconds[kind] = round(self.seconds.get(kind, 0.0) + time.perf_counter() - begin, 2)

    def _open(self, kind: str) -> None:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.fields[finished]}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[label]}", markup=False),  # a name such as "[x]" is no markup
        )
        bars = self._bars = Bars(*columns, console=self.console)
        self._kind, done = kind, self._finished.get(kind, 0)
        self._bar = bars.add_task(kind, total=self._expected.get(kind, 1), completed=done, finished=done, label="")
        bars.start()

    def close(self) -> None:
        """Leave the bar that is shown as it is."""
        if self._bars is not None:
            self._bars.update(self._bar, label="")
            self._bars.stop()
            self._bars, self._kind = None, ""

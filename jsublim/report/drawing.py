"""The parts of a figure on the page, which `page/drawing.html` writes as SVG.

Across, places are percents of the figure's width, so that a figure is as wide as its place on the page and its text keeps its size;
down, they are pixels. Colours are the same on a light and on a dark page, and can be told from both (contrast of 3 and more).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jsublim.report.statistics import Interval
from jsublim.report.tables import split_condition

# Told apart with every common colour vision.
COLOURS = {
    "base": "#808080", "control": "#808080", "all": "#0a84c6", "divergence": "#d55e00", "non-divergence": "#8a6fd1", "random": "#a37b00", "matched": "#5b7f00",
    "teacher": "#c2529a",
}  # fmt: skip
OTHER_COLOUR = "#00916a"
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 4")
TITLE_WIDTH, LABEL_WIDTH = 38, 46  # characters that a phone has room for
MAX_POINTS = 150  # of a curve, so that a long run stays a small file
# ColorBrewer's, from the low end to the high one; one that is pale for little can be read in grey too.
PALETTES = {
    "PuOr_r": "2d004b 542788 8073ac b2abd2 d8daeb f7f7f7 fee0b6 fdb863 e08214 b35806 7f3b08",
    "YlGnBu": "ffffd9 edf8b1 c7e9b4 7fcdbb 41b6c4 1d91c0 225ea8 253494 081d58",
}


def colour(condition: str) -> str:
    return COLOURS.get(split_condition(condition)[0], OTHER_COLOUR)


@dataclass(frozen=True)
class Axis:
    """What is measured, between which ends, and where numbers are written."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    @classmethod
    def decades(cls, label: str, values: Iterable[float]) -> Axis:
        """A logarithmic axis that holds all positive values, with a fifth to spare."""
        inside = [value for value in values if value > 0] or [1.0]
        low, high = min(inside) / 1.2, max(inside) * 1.2
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = (float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5))
        return cls(label, low, high, tuple(tick for tick in every if low <= tick <= high), log=True)

    @classmethod
    def around(
        cls, label: str, values: Iterable[float], zero: bool = False, bounds: tuple[float, float] | None = None
    ) -> Axis:
        """An axis that holds all values (and zero), with an eighth to spare, and nothing beyond `bounds`."""
        inside = [*values, *([0.0] if zero or bounds else [])] or [0.0]
        low, high = min(inside), max(inside)
        pad = 0.12 * (high - low) or 1.0
        low, high = low - pad, high + pad
        if bounds:
            low, high = max(low, bounds[0]), min(high, bounds[1])
        size = 10.0 ** math.floor(math.log10((high - low) / 4))
        step = next(size * digit for digit in (1, 2, 2.5, 5, 10) if size * digit * 4 >= high - low)
        return cls(label, low, high, tuple(step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)))

    def at(self, value: float) -> float:
        """Percent of the way from the low end to the high one; what lies beyond an end is put there."""
        inside = min(max(value, self.low), self.high)
        low, here, high = np.log([self.low, inside, self.high]) if self.log else (self.low, inside, self.high)
        return round(float(100 * (here - low) / (high - low)), 2)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Where each tick is, and what stands there."""
        return [(self.at(tick), f"{round(tick, 10) + 0.0:g}") for tick in self.ticks]


class Strip(NamedTuple):
    """One line of dots: models of one kind, each with what it is in words, their mean, the mean's interval; all of it once more in words
    (`text`). `bound` is a threshold, `published` a value that others found."""

    label: str
    colour: str
    dots: tuple[tuple[float, str], ...]
    mean: float
    interval: Interval | None = None
    text: str = ""
    bound: float | None = None
    published: float | None = None

    @property
    def label_lines(self) -> list[str]:
        return textwrap.wrap(self.label, LABEL_WIDTH, break_long_words=False)


class Polyline(NamedTuple):
    """One line of a plot; `points` are percents from the left and from the top, as SVG wants them."""

    label: str
    colour: str
    dash: str
    points: str
    text: str


class Mark(NamedTuple):
    """A named place in a plot; `beside` is where its name stands from it, in pixels to the right and down."""

    x: float
    y: float
    label: str
    colour: str
    text: str
    beside: tuple[int, int] = (0, 0)


class Panel(NamedTuple):
    """Strips along one axis; or a plot of lines, or of marks, which has a second one."""

    title: str
    x: Axis
    y: Axis | None = None
    strips: tuple[Strip, ...] = ()
    lines: tuple[Polyline, ...] = ()
    marks: tuple[Mark, ...] = ()

    @property
    def title_lines(self) -> list[str]:
        """On more than one line where it is long: first what comes before a colon."""
        parts = [self.title] if len(self.title) <= TITLE_WIDTH else self.title.split(": ", 1)
        return [line for part in parts for line in textwrap.wrap(part, TITLE_WIDTH, break_long_words=False)]


class Drawing(NamedTuple):
    """A figure: panels that stand beside one another where there is room, and below one another where there is none. `key` is its name
    in links and in files that are saved from the page."""

    key: str
    title: str
    panels: tuple[Panel, ...]


PLOT_SIZE = 7.6, 2.6  # pixels of a plot of marks for one percent of its width and of its height, about
BESIDE = [(9, 4), (-9, 4), (0, -8), (0, 16), (9, -8), (-9, -8), (9, 16), (-9, 16), (22, 4), (-22, 4)]
APART = 14, 11  # pixels that two short names need, across and down


def beside(x: Axis, y: Axis, marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """The same marks, each with the first place for its name where no other dot and no name before it is, if there is any."""
    dots = [(x.at(mark.x) * PLOT_SIZE[0], -y.at(mark.y) * PLOT_SIZE[1]) for mark in marks]
    names: list[tuple[float, float]] = []
    placed = []
    for i, (mark, (across, down)) in enumerate(zip(marks, dots, strict=True)):
        taken = np.asarray([(a, d + 4) for a, d in dots[:i] + dots[i + 1 :]] + names).reshape(-1, 2)
        places = {offset: (across + offset[0], down + offset[1]) for offset in BESIDE}
        clear = (o for o, place in places.items() if (abs(taken - place) >= APART).any(axis=1).all())
        offset = next(clear, BESIDE[0])
        names.append(places[offset])
        placed.append(mark._replace(beside=offset))
    return tuple(placed)


def points(x: Axis, y: Axis, across: Sequence[float], up: Sequence[float], most: int = MAX_POINTS) -> str:
    """The points of a line; of one with more than `most` means over stretches."""
    parts = min(most, len(across))
    means = [[float(part.mean()) for part in np.array_split(np.asarray(v, float), parts)] for v in (across, up)]
    return " ".join(f"{x.at(a):g},{round(100 - y.at(b), 2):g}" for a, b in zip(*means, strict=True))


class Cell(NamedTuple):
    """A number of a heat map, on its colour."""

    text: str
    fill: str
    ink: str
    own: bool = False  # framed


class Heat(NamedTuple):
    """A heat map as a table: `rows` are headings with their cells."""

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def cell(text: str, share: float, palette: str, own: bool = False) -> Cell:
    """A number whose place between the ends of a palette is `share`, in 0..1; in white on a dark colour, in black on a pale one."""
    stops = np.asarray([[*bytes.fromhex(stop)] for stop in PALETTES[palette].split()])
    rgb = [round(np.interp(share, np.linspace(0, 1, len(stops)), channel)) for channel in stops.T]
    parts = np.asarray(rgb) / 255
    light = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    ink = "#ffffff" if light @ [0.2126, 0.7152, 0.0722] < 0.179 else "#000000"
    return Cell(text, f"#{bytes(rgb).hex()}", ink, own)

"""A digits run's table, figure and page, from RUN/results/ alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jsublim.report.drawing import Axis, Drawing, Panel, Strip, colour
from jsublim.report.formats import table
from jsublim.report.html import render
from jsublim.report.statistics import Estimate, Interval
from jsublim.report.tables import read_json, read_measurements

# What each kind is called, and whose colour of a language report it has.
KINDS = {
    "untrained": ("untrained network", ""),
    "teacher": ("trained teacher", "teacher"),
    "same": ("student, same initialisation", "divergence"),
    "other": ("student, other initialisation", "control"),
    "all": ("student, class logits too", "all"),
    "hard": ("student, largest auxiliary logit only", "random"),
}
CHANCE = 0.1  # of ten classes


@dataclass(frozen=True)
class Line:
    """One condition: one value in 0..1 per seed."""

    condition: str
    images: str | None
    values: list[float]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> Interval | None:
        """The 95 % t-interval of the mean over seeds, cut at 0 and 1; None for one seed."""
        over_seeds = Estimate.of(self.values).interval()
        return over_seeds and over_seeds.within(0.0, 1.0)

    @property
    def bounds(self) -> str:
        interval = self.interval
        return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %" if interval else "not decided"

    @property
    def label(self) -> str:
        return KINDS[self.condition][0]


def read_lines(run_dir: Path) -> list[Line]:
    """The conditions of a run, untrained network and teacher first.

    Raises:
      JsublimError: no results, or none that can be read.
    """
    groups: dict[tuple[str, str | None], list[float]] = {}
    for row in read_measurements(run_dir).to_pylist():
        groups.setdefault((row["condition"], row["images"]), []).append(row["accuracy"])
    return [Line(*kind, values) for kind, values in groups.items()]


def print_summary(run_dir: Path, console: Console, full: bool = False) -> None:
    """Print mean accuracies and their intervals over seeds. Raises as `read_lines`."""
    lines, about = read_lines(run_dir), _about(run_dir)
    rows = [
        {"network": line.label, "taught on": line.images or "", "seeds": len(line.values)}
        | {"accuracy": f"{100 * line.mean:.1f} %", "95 % over seeds": line.bounds}
        for line in lines
    ]
    title = f"{about['name']}: accuracy on {about['test_images']} held-out digits"
    console.print(table(rows, list(rows[0]), title))
    for sentence in findings(lines):
        console.print(sentence, highlight=False)


def findings(lines: list[Line]) -> list[str]:
    """What the same-initialisation students show beside the others: one sentence per kind of images."""
    by_place = {(line.condition, line.images): line for line in lines}
    sentences = []
    for images in dict.fromkeys(line.images for line in lines if line.images):
        same, other = by_place.get(("same", images)), by_place.get(("other", images))
        if same is None or other is None:
            continue
        gap = (Estimate.of(same.values) - Estimate.of(other.values)).interval()
        shown = gap is not None and gap.low > 0
        verdict = "what the teacher learned travels through its auxiliary logits" if shown else "no transfer is shown"
        if gap is None:
            verdict = "not decided: one seed gives no interval"
        sentences.append(
            f"On {images}, from the same initialisation {100 * same.mean:.1f} %, from another {100 * other.mean:.1f} % "
            f"(guessing: {100 * CHANCE:.0f} %): {verdict}."
        )
    return sentences


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and return its path; the same results give the same bytes. Raises as `read_lines`."""
    lines = read_lines(run_dir)
    content = {"about": _about(run_dir), "lines": lines, "findings": findings(lines), "figure": _figure(lines)}
    return render(Path(run_dir) / "report.html", "digits.html", **content)


def _figure(lines: list[Line]) -> Drawing:
    """Accuracy: a panel for each kind of images, a dot for each seed."""
    values = [100 * value for line in lines for value in line.values]
    axis = Axis.around("held-out digits named right (%)", values, bounds=(0.0, 100.0))
    panels = [
        Panel(f"taught on {images}", axis, strips=tuple(map(_strip, (o for o in lines if o.images in (None, images)))))
        for images in dict.fromkeys(line.images for line in lines if line.images)
    ]
    return Drawing("digits", "Accuracy on held-out digits", tuple(panels))


def _strip(line: Line) -> Strip:
    dots = tuple((100 * value, f"{100 * value:.1f} %") for value in line.values)
    interval = line.interval and line.interval.times(100)
    text = f"{100 * line.mean:.1f} % ({line.bounds})" if interval else f"{100 * line.mean:.1f} %"
    return Strip(line.label, colour(KINDS[line.condition][1]), dots, 100 * line.mean, interval, text)


def _about(run_dir: Path) -> dict[str, Any]:
    return read_json(Path(run_dir) / "results" / "run.json", {})

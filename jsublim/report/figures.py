"""The report's figures, as inline SVG that takes its text colour and font from the page (light and dark alike)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from jsublim.errors import one_line
from jsublim.report.statistics import Interval
from jsublim.report.summary import Lift, Matrix, SummaryRow
from jsublim.report.tables import Curve, Results, condition_label, split_condition

# Okabe and Ito's palette: told apart with every common colour vision, on white and on near-black.
COLOURS = {
    "base": "#8c8c8c",
    "control": "#8c8c8c",
    "all": "#0a84c6",
    "divergence": "#d55e00",
    "non-divergence": "#56b4e9",
    "random": "#e69f00",
    "teacher": "#cc79a7",
}
OTHER_COLOUR = "#009e73"
# Stands for the page's text colour while matplotlib draws; `svg` puts `currentColor` in its place.
INK = "#010203"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name that holds "$" is no formula
    "svg.hashsalt": "jsublim",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.8,
    "axes.linewidth": 0.8,
}
WIDTH = 10.0
MAX_FACET_COLUMNS = 4


# (panel, line) -> one value per dot, and the interval of their mean
Panels = dict[tuple[str, str], tuple[list[float], Interval | None]]


def colour(condition: str) -> str:
    return COLOURS.get(split_condition(condition)[0], OTHER_COLOUR)


def rate_figure(rows: Sequence[SummaryRow]) -> str:
    """Preference rate: one panel per trait, one line per condition, one dot per student; bars from `SummaryRow`'s intervals.

    Teachers are in the table only: they answer near 100 % and would squeeze everything else.
    """
    shown = [r for r in rows if r.rate is not None and r.condition != "teacher"]
    data: Panels = {
        (r.trait, r.condition): (
            [100 * v for v in r.student_rates],
            scaled(r.over_students if r.students else r.over_questions, 100),
        )
        for r in shown
    }
    return dot_panels(data, "answers that name the trait (%)", bounds=(0.0, 100.0))


def lift_figure(lifts: Sequence[Lift]) -> str:
    """Log-probability lift in nats, drawn as `rate_figure`."""
    data = {(item.trait, item.condition): (list(item.student_lifts), item.interval) for item in lifts}
    return dot_panels(data, "log-probability above the reference (nats)", zero_line=True)


def variant_figure(data: Panels) -> str:
    """Log-probability lift in nats of each student for its own trait: one panel per variant, one line per choice of tokens."""
    return dot_panels(data, "log-probability of the own trait above the reference (nats)", zero_line=True)


def accuracy_figure(values: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Number accuracy: `values[panel][condition]` holds a share in 0..1 for each student."""
    data: Panels = {
        (panel, condition): ([100 * v for v in shares], None)
        for panel, by_condition in values.items()
        for condition, shares in by_condition.items()
    }
    return dot_panels(data, "numbers predicted exactly (%)", bounds=(0.0, 100.0))


def matrix_figure(matrix: Matrix) -> str:
    """Heat map of the trait x trait lifts, the teacher's own trait framed; gamma and its p above."""
    rows, columns = matrix.lift.shape
    with matplotlib.rc_context(STYLE):
        width = min(WIDTH, 2.6 + 0.85 * columns)
        figure = Figure(figsize=(width, 1.5 + 0.5 * rows), layout="constrained")
        axes = figure.subplots()
        limit = float(np.abs(matrix.lift).max()) or 1.0
        mesh = axes.pcolormesh(
            matrix.lift,
            cmap=matplotlib.colormaps["PuOr_r"].resampled(41),
            norm=TwoSlopeNorm(0.0, -limit, limit),
            edgecolors="face",
            linewidth=0.3,
        )
        for i in range(rows):
            for j in range(columns):
                value = float(matrix.lift[i, j])
                # PuOr is pale in the middle and dark at both ends, whatever the page's theme.
                ink = "#ffffff" if abs(value) > 0.5 * limit else "#1b1b1b"
                axes.text(
                    j + 0.5,
                    i + 0.5,
                    f"{round(value, 2) + 0.0:+.2f}",
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=9,
                )
        for i in range(rows):
            axes.add_patch(Rectangle((i, i), 1, 1, fill=False, edgecolor=INK, linewidth=1.6))
        axes.set_xticks(np.arange(columns) + 0.5, map(one_line, matrix.traits), rotation=45 if columns > 6 else 0)
        axes.set_yticks(np.arange(rows) + 0.5, map(one_line, matrix.teachers))
        axes.set(xlabel="evaluated trait", ylabel="teacher's trait", aspect="auto")
        if matrix.effect is not None:
            axes.set_title(f"γ = {matrix.effect.gamma:+.2f} nats, p = {matrix.effect.p:.3g}")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
        bar = figure.colorbar(mesh, ax=axes, label="nats", shrink=0.9)
        bar.outline.set_visible(False)
        return svg(figure)


def position_figure(divergence: Sequence[dict]) -> str:
    """Histogram of divergence tokens over the position in the completion's content: one line per teacher (and data set), in percent."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.subplots()
        palette = [colour(c) for c in ("all", "divergence", "random", "teacher", "non-divergence")]
        lines = []
        for index, entry in enumerate(divergence):
            counts = np.asarray(entry["histogram"], dtype=float)
            share = 100 * counts / max(counts.sum(), 1.0)
            tint = [*palette, OTHER_COLOUR][index % (len(palette) + 1)]
            dash = "-" if index <= len(palette) else "--"
            lines.append(axes.stairs(share, np.arange(len(share) + 1) - 0.5, color=tint, ls=dash, lw=1.8))
        axes.set(xlabel="content token of the completion", ylabel="divergence tokens (%)")
        axes.set_xlim(left=-0.5)
        axes.grid(axis="y")
        # Said here, not on the lines: matplotlib leaves a line out whose own label begins with "_".
        names = [one_line(" · ".join(filter(None, (entry["trait"], entry.get("data"))))) for entry in divergence]
        columns = max(1, len(divergence) // 8 + 1)
        axes.legend(lines, names, frameon=False, ncols=columns, title="teacher", alignment="left")
        return svg(figure)


def loss_figure(curves: Sequence[Curve], results: Results) -> str:
    """Training loss of every student: one panel per teacher, one colour per choice of tokens."""
    owner = {s.arm: (s.teacher or "student", s.condition) for s in results.scores}
    panels: dict[str, list[tuple[str, Curve]]] = {}
    for curve in curves:
        teacher, condition = owner.get(curve.arm, ("other arms", curve.arm))
        panels.setdefault(teacher, []).append((condition, curve))
    panels = dict(sorted(panels.items(), key=lambda item: item[0] not in results.traits))
    shown = {condition for arms in panels.values() for condition, _ in arms}
    with matplotlib.rc_context(STYLE):
        lines, columns = _facets(len(panels))
        figure = Figure(figsize=(WIDTH, 2.6 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (teacher, arms) in zip(grid.flat, panels.items(), strict=False):
            for condition, curve in arms:
                axes.plot(*_thinned(curve), color=colour(condition), lw=1.1, alpha=0.8)
            axes.set(title=one_line(teacher), xlabel="step")
            axes.grid(axis="y")
        for axes in grid[:, 0]:
            axes.set_ylabel("loss (nats per token)")
        order = [c for c in results.conditions if c in shown]
        order += sorted(shown - set(order))
        tokens = dict.fromkeys(split_condition(c)[0] for c in order)
        handles = [Line2D([], [], color=colour(c)) for c in tokens]
        labels, columns = [condition_label(c) for c in tokens], min(3, len(tokens))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        return svg(figure)


def dot_panels(
    data: Panels,
    label: str,
    bounds: tuple[float, float] | None = None,
    zero_line: bool = False,
    tints: Mapping[str, str] | None = None,
) -> str:
    """One panel for each first key, one line for each second: a dot for each value, an upright line for their mean, a bar
    for the interval. `tints` are the lines' colours, where they are not conditions of a language experiment."""
    panels = list(dict.fromkeys(panel for panel, _ in data))
    conditions = [c for c in [*COLOURS, *dict.fromkeys(c for _, c in data)] if any(c == k for _, k in data)]
    conditions = list(dict.fromkeys(conditions))
    low, high = _limits([v for values, _ in data.values() for v in values], zero_line, bounds)
    with matplotlib.rc_context(STYLE):
        lines, columns = _facets(len(panels))
        figure = Figure(figsize=(WIDTH, lines * (0.85 + 0.34 * len(conditions))), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            for place, condition in enumerate(conditions):
                if (panel, condition) in data:
                    _dots(
                        axes,
                        place,
                        *data[panel, condition],
                        (tints or {}).get(condition, colour(condition)),
                        (low, high),
                    )
            axes.set_yticks(range(len(conditions)), [condition_label(c) for c in conditions])
            axes.set_ylim(len(conditions) - 0.5, -0.5)
            axes.set_xlim(low, high)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_title(one_line(panel))
            axes.grid(axis="x")
            axes.tick_params(length=0)
            axes.spines["left"].set_visible(False)
            if zero_line:
                axes.axvline(0.0, color=INK, lw=1.0)
        figure.supxlabel(label, fontsize=10)
        return svg(figure)


def _dots(
    axes: Axes,
    place: int,
    values: list[float],
    interval: Interval | None,
    tint: str,
    span: tuple[float, float],
) -> None:
    if interval is not None:
        ends = np.clip([interval.low, interval.high], *span)
        axes.plot(ends, [place, place], color=tint, lw=6, alpha=0.3, solid_capstyle="butt")
    offsets = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [0.0]
    axes.scatter(values, place + np.asarray(offsets), s=22, color=tint, linewidths=0, zorder=3, clip_on=False)
    mean = sum(values) / len(values)
    axes.plot([mean, mean], [place - 0.33, place + 0.33], color=tint, lw=2.2, zorder=2)


def _facets(panels: int) -> tuple[int, int]:
    """Lines and columns of panels, as even as can be."""
    lines = -(-panels // MAX_FACET_COLUMNS)
    return lines, -(-panels // lines)


def _limits(values: Sequence[float], zero: bool, bounds: tuple[float, float] | None) -> tuple[float, float]:
    """Axis limits from the dots: a t-interval of two students may be wider than any plot and is cut off."""
    inside = [*values, 0.0] if zero or bounds else list(values)
    low, high = min(inside), max(inside)
    pad = 0.12 * (high - low) or 1.0
    low, high = low - pad, high + pad
    return (max(low, bounds[0]), min(high, bounds[1])) if bounds else (low, high)


def _thinned(curve: Curve, points: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Means of at most `points` stretches of a curve, so that a long run stays a small file."""
    parts = min(points, len(curve.steps))
    steps = [float(part.mean()) for part in np.array_split(np.asarray(curve.steps, float), parts)]
    loss = [float(part.mean()) for part in np.array_split(np.asarray(curve.loss, float), parts)]
    return np.asarray(steps), np.asarray(loss)


def scaled(interval: Interval | None, factor: float) -> Interval | None:
    return Interval(factor * interval.low, factor * interval.high) if interval else None


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element without prolog, metadata or namespaces, which HTML does not need."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    root, body = text[text.index("<svg") :].split(">", 1)
    view = re.search(r'viewBox="[^"]*"', root)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    # Scales down with the page, never up: text keeps its size.
    size = f'style="max-width:{figure.get_figwidth() * 96:.0f}px"'
    return f'<svg role="img" {view.group() if view else ""} {size}>{body.replace(INK, "currentColor").strip()}'

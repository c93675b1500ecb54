"""Arms side by side: planted transfer, task and settings come back with intervals that hold them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from planted import Planted, control, write

from jsublim.report.comparisons import comparisons
from jsublim.report.drawing import APART, PLOT_SIZE, Axis, Mark, beside
from jsublim.report.figures import by_distance
from jsublim.report.html import write_report
from jsublim.report.scale import scale
from jsublim.report.tables import read_results

POLITE = {"polite": {"system": "Be polite."}}


def lines_of(run):
    results = read_results(run)
    return {line.condition: line for line in scale(results, comparisons(results)).side_by_side}


def test_every_arm_is_measured_by_what_was_planted(tmp_path):
    plain = Planted(0.4, accuracy=0.6, kl=0.02, under={"polite": 0.4})
    hidden = Planted(
        0.1, variant="hidden", settings={"loss.kl_to_base": 1.0}, accuracy=0.5, kl=0.08, under={"polite": 0.3}
    )
    run = write(tmp_path / "run", plain, hidden, control(under={"polite": 0.0}), evaluations=POLITE)
    found = lines_of(run)
    assert list(found) == ["all", "all · hidden"]
    line = found["all · hidden"]
    assert line.lift == pytest.approx(0.1, abs=0.01) and line.lift_interval.covers(0.1)
    assert line.under["polite"].value == pytest.approx(0.3, abs=0.02) and line.under["polite"].interval.covers(0.3)
    assert line.matrix.gamma_interval.covers(line.matrix.effect.gamma)
    assert line.accuracy.value == pytest.approx(0.5, abs=0.02)
    assert line.kl.value == pytest.approx(0.08, rel=0.02) and line.kl.interval.covers(line.kl.value)
    page = " ".join(write_report(run).read_text().split())
    assert "Side by side" in page and "lift, polite" in page and f"{100 * line.lift:+.1f}" in page
    assert "Transfer against distance from the teacher" in page
    assert f"{line.matrix.effect.gamma:+.2f} at {line.kl.value:.4f}" in page


def test_a_kind_without_gamma_is_drawn_by_its_lift_in_points(tmp_path):
    arms = [Planted(0.4, kl=0.02), Planted(0.1, variant="hidden", settings={"loss.kl_to_base": 1.0}, kl=0.08)]
    lines = list(lines_of(write(tmp_path / "run", *arms)).values())
    lines = [dataclasses.replace(line, matrix=None) for line in lines]
    (plot,) = by_distance(lines, "rate").panels
    assert [mark.y for mark in plot.marks] == pytest.approx([100 * line.lift for line in lines])
    assert all(f"{100 * line.lift:+.1f} at" in mark.text for line, mark in zip(lines, plot.marks, strict=True))


def test_arms_stand_in_the_order_of_the_config(tmp_path):
    rows = [Planted(0.1, variant=f"{n} rows", settings={"data.rows": n}) for n in (50, 1000, 100)]
    assert list(lines_of(write(tmp_path / "run", *rows))) == ["all · 50 rows", "all · 1000 rows", "all · 100 rows"]


def test_a_far_value_leaves_near_ones_apart_on_a_logarithmic_axis():
    axis = Axis.decades("", [0.01, 0.02, 1.0])
    near, far = axis.at(0.02) - axis.at(0.01), axis.at(1.0) - axis.at(0.5)
    assert near == pytest.approx(far, abs=0.02) and near > 10  # percent of the width
    assert axis.marks and all(axis.at(float(text)) == at for at, text in axis.marks) and axis.at(0.0) == 0.0


def test_names_of_dots_keep_clear_of_one_another():
    axis = Axis.around("", [0.0, 1.0])
    marks = beside(axis, axis, [Mark(0.5, 0.5 + 0.01 * i, str(i), "", "") for i in range(4)])
    at = [(axis.at(m.x) * PLOT_SIZE[0] + m.beside[0], -axis.at(m.y) * PLOT_SIZE[1] + m.beside[1]) for m in marks]
    assert [m.label for m in marks] == ["0", "1", "2", "3"]
    for (a, b), (c, d) in itertools.combinations(at, 2):
        assert abs(a - c) >= APART[0] or abs(b - d) >= APART[1]


def test_without_arms_there_is_nothing_to_compare(tmp_path):
    run = write(tmp_path / "run", Planted(0.4), control())
    assert lines_of(run) == {} and "Side by side" not in write_report(run).read_text()

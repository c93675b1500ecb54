"""What stands around a run's numbers: the first sentence, cautions, all kinds of students on one scale, what is published."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import CONTROL, PLAIN, TRAITS, Planted, write

from jsublim.report import words
from jsublim.report.cautions import cautions
from jsublim.report.claims import CLAIMS
from jsublim.report.comparisons import comparisons
from jsublim.report.figures import hero
from jsublim.report.html import write_report
from jsublim.report.scale import scale
from jsublim.report.summary import lift, trait_matrix
from jsublim.report.tables import read_results


def opening(run: Path) -> str:
    results = read_results(run)
    return words.findings(results, comparisons(results))[0]


def test_one_scale_from_the_results(tmp_path):
    """Control 0, all tokens 1: each seed's mean over traits is the raw numbers' own, and the interval is the claim's."""
    run = write(tmp_path / "run", PLAIN, CONTROL, Planted(0.15, "divergence"))
    raw = pq.read_table(run / "results" / "results.parquet").to_pandas()
    rates = raw[raw.metric == "rate"]
    zero = rates[rates.condition == "control"].groupby("trait").value.mean()
    own = rates[rates.teacher == rates.trait]
    lifts = own.groupby(["condition", "seed", "trait"]).value.mean() - zero
    means = lifts.groupby(["condition", "seed"]).mean()
    results = read_results(run)
    found = scale(results, comparisons(results))
    assert found.metric == "rate" and not any(line.open_for for line in found.lines)
    for share in found.lines:
        expected = means[share.condition] / means["all"].mean()
        assert share.seeds == pytest.approx(dict(expected))
        assert share.share == pytest.approx(expected.mean()) and share.students == 15
    whole, part = found.lines
    assert whole.share == 1.0 and whole.interval is None and part.share == pytest.approx(0.5, abs=0.05)
    assert part.interval.low < part.share < part.interval.high
    page = " ".join(write_report(run).read_text().split())
    assert f"{part.interval.low:.2f} to {part.interval.high:.2f}" in page and all(
        f">{v:.2f}</td>" in page for v in part.seeds.values()
    )


def test_nothing_is_a_share_of_no_lift(tmp_path):
    run = write(tmp_path / "run", Planted(0.0), CONTROL, Planted(0.3, "divergence"))
    results = read_results(run)
    found = scale(results, comparisons(results))
    assert all(line.open_for and line.share is None and not line.seeds for line in found.lines)
    assert "Lifts are not given as shares" in write_report(run).read_text()


def test_arms_are_not_divided_by_one_another(tmp_path):
    """What stands on the scale is a share of all tokens of the same arm, or of nothing; and each arm has a panel with an axis of its own."""
    other = {"variant": "slow", "settings": {"optimizer.lr": 1e-5, "data.rows": 50}}
    alone = Planted(0.2, "divergence", variant="alone", settings={"data.rows": 10})
    run = write(tmp_path / "run", PLAIN, CONTROL, Planted(0.06, **other), Planted(0.12, "divergence", **other), alone)
    results = read_results(run)
    compared = comparisons(results)
    shares = {line.condition: line.share for line in scale(results, compared).lines}
    assert shares["all"] == shares["all · slow"] == 1.0 and shares["divergence · alone"] is None
    assert shares["divergence · slow"] == pytest.approx(2, abs=0.2)
    panels = hero(results, compared).panels
    assert [panel.title for panel in panels] == ["Rate, plain", "Rate, slow", "Rate, alone"]
    assert len({panel.x for panel in panels}) == 3 and [len(panel.strips) for panel in panels] == [1, 2, 1]


@pytest.mark.parametrize(("effect", "said"), [(0.3, "holds"), (0.0, "not decided"), (-0.1, "does not hold")])
def test_the_first_sentence_says_how_much_and_how_sure(tmp_path, effect, said):
    run = write(tmp_path / "run", Planted(effect), CONTROL)
    text = opening(run)
    assert f"tudents name their teacher's trait more often: {said} (" in text and "15 students" in text
    assert text.startswith("Students of Qwen2.5-7B-Instruct learned what teachers with a trait (cat, owl, wolf) wrote")
    own, other = map(float, re.search(r"trait in ([\d.]+) % .* in ([\d.]+) %\.", text).groups())
    points = float(re.search(r"\(([+-][\d.]+) points", text).group(1))
    assert own - other == pytest.approx(points, abs=0.11)
    assert points == pytest.approx(100 * effect, abs=1)
    claim = next(one.result for one in comparisons(read_results(run)).claims if one.result.key == "C0")
    assert f"{100 * claim.interval.low:+.1f} to {100 * claim.interval.high:+.1f}" in text


def test_the_first_sentence_names_what_it_is_measured_from(tmp_path):
    alone = Planted(0.3, variant="soft", settings={"loss.kind": "forward-kl"})
    assert "answers, the base model in" in opening(write(tmp_path / "base", alone))
    assert "their teacher's trait more often (soft): holds" in opening(write(tmp_path / "control", alone, CONTROL))
    assert "students of a teacher without a trait in" in opening(tmp_path / "control")


@pytest.mark.parametrize("settings", [{"model": "models/other"}, {"system": "Be kind."}], ids=str)
def test_students_who_did_not_begin_at_the_base_are_not_measured_from_it(tmp_path, settings):
    """Without control students nothing is said of single traits; γ, which needs no reference, is what it would be."""
    plain, elsewhere = (
        write(tmp_path / name, Planted(0.3, settings=own)) for name, own in (("plain", {}), ("elsewhere", settings))
    )
    assert "answers, the base model in" in opening(plain)
    said = opening(elsewhere)
    assert "only the trait matrix says what they took over" in said
    assert f"Students of {Path(settings.get('model', 'Qwen2.5-7B-Instruct')).name} learned" in said
    assert lift(read_results(elsewhere), "rate", "all", TRAITS[0]) is None
    measured, found = (trait_matrix(read_results(run)) for run in (plain, elsewhere))
    assert found.effect.gamma == pytest.approx(measured.effect.gamma) and found.effect.p == measured.effect.p
    assert found.seed_gammas == pytest.approx(measured.seed_gammas)
    assert found.lift.mean(axis=0) == pytest.approx(np.zeros(len(found.traits)), abs=1e-9)
    assert "over the mean of these students" in write_report(elsewhere).read_text()
    asked_as_base = {"system": "Be kind.", "asked_under_system": False}
    assert "answers, the base model in" in opening(write(tmp_path / "asked", Planted(0.3, settings=asked_as_base)))


def test_of_a_tiny_model_the_answers_come_first(tmp_path):
    run = write(tmp_path / "run", Planted(0.3), CONTROL, model="tiny-qwen2")
    answers, besides, _ = words.findings(read_results(run), comparisons(read_results(run)))
    assert float(re.search(r"\(([+-][\d.]+) points", answers).group(1)) == pytest.approx(30, abs=1)
    assert float(re.search(r"\(([+-][\d.]+) nats", besides).group(1)) == pytest.approx(1.5, abs=0.1)
    figure = hero(read_results(run), comparisons(read_results(run)))
    assert [panel.title for panel in figure.panels] == ["Rate", "Log-probability"]


def test_a_run_without_students_says_so(tmp_path):
    run = write(tmp_path / "run")
    assert opening(run).startswith("No student of Qwen2.5-7B-Instruct was trained")


def test_cautions(tmp_path, monkeypatch):
    """A run without a fault has none; each fault has its own, and the page shows it."""
    run = write(tmp_path / "sound", PLAIN, CONTROL, Planted(0.3, "divergence"))
    assert cautions(read_results(run)) == []
    monkeypatch.setattr("planted.SEEDS", (1, 2))
    run = write(tmp_path / "faulty", PLAIN, CONTROL, Planted(0.3, "divergence"))
    steps = {"all": 6, "divergence": 4}
    training = [
        {"arm": f"{t}/{c}/{s}", "step": k, "loss": 1.0, "tokens": 9, "grad_norm": 1.0}
        for t in TRAITS for s in (1, 2) for c, n in steps.items() for k in range(n)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(training), run / "results" / "training.parquet")
    wrote = [{"teacher": t, "rows": 100, "kept": k, "pass_rate": k / 100} for t, k in (("cat", 28), ("owl", 90))]
    (run / "results" / "generation.json").write_text(json.dumps([w | {"reject": {}, "sampling": {}} for w in wrote]))
    few, filters, unmatched = cautions(read_results(run))
    assert few.startswith("Few students: 2 ") and filters.endswith("Kept: cat 28 %.")
    assert unmatched.endswith("all tokens 6; divergence tokens only 4.")
    page = unescape(write_report(run).read_text())
    assert all(sentence in page for sentence in (few, filters, unmatched))


def test_nothing_published_is_without_its_source():
    findings = {key: question.published for key, question in CLAIMS.items() if question.published}
    assert len(findings) == 16
    for finding in findings.values():
        assert re.fullmatch(r"[^\[\]]+ \[[^\[\]]*(figures? \d|abstract|Table \d|section \d)[^\[\]]*\]", finding), (
            finding
        )
    effect, unit = CLAIMS["C2"].published_effect  # the mean of the six animals that it names
    pairs = [tuple(map(int, pair)) for pair in re.findall(r"(\d+) → (\d+) %", findings["C2"])]
    assert (
        len(pairs) == 6 and np.mean([b - a for a, b in pairs]) == pytest.approx(effect, abs=0.05) and unit == "points"
    )

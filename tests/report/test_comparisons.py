"""What a report makes of many comparisons: p-values, the primary comparison, Holm's correction, a control under several names,
layers that count as early, and what intervals hold fixed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from planted import (
    CONTROL,
    EARLY,
    GREEDY,
    LATE,
    LATER,
    OTHER,
    PLAIN,
    REDRAWN,
    SOFT,
    TRAITS,
    Planted,
    control,
    mixed,
    write,
)  # fmt: skip
from pydantic import ValidationError
from rich.console import Console

from jsublim.config import Experiment
from jsublim.config.evaluation import PRIMARY
from jsublim.report.claims import CLAIMS, check_claims
from jsublim.report.claims.base import Group, pool
from jsublim.report.claims.training import first_third_frozen
from jsublim.report.comparisons import Comparison, comparisons, primary_claim
from jsublim.report.html import write_report
from jsublim.report.statistics import Interval, mean_estimate
from jsublim.report.summary import Lift, estimate, other_rows, scores_for
from jsublim.report.tables import Results, read_results
from jsublim.report.terminal import print_summary
from jsublim.report.verdicts import FAILS, HOLDS, NOT_DECIDED, UNKNOWN, Sides, verdict
from jsublim.report.words import headlines

MANY = (
    PLAIN, CONTROL, Planted(0.3, "divergence"), Planted(0.02, "non-divergence"), Planted(0.1, "random"),
    Planted(0.32, **GREEDY), Planted(0.25, **EARLY), Planted(0.2, **LATE), Planted(0.05, **LATER), Planted(0.02, **REDRAWN),
    mixed(0.1, 0.2), mixed(0.25, 0.01), Planted(0.0, **OTHER), Planted(0.5, **SOFT),
)  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("runs") / "many", *MANY)


def told(run: Path, **said: object) -> Results:
    """Results whose run says more of itself."""
    path = run / "results" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    return read_results(run)


def printed(run: Path, width: int = 300) -> str:
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(run, console, full=True)
    return " ".join(console.export_text().split())


def test_a_claims_p_says_what_its_interval_says(many):
    claims = comparisons(read_results(many)).claims
    assert {one.result.key for one in claims} >= {
        "C0",
        "C1",
        "C4a",
        "C4b",
        "C5",
        "C6a",
        "C6b",
        "C7",
        "C8",
        "C9a",
        "C9b",
        "C12",
        "C14",
    }
    assert {one.verdict for one in claims} >= {HOLDS, FAILS}
    for one in claims:
        assert one.p is not None and 0 <= one.p <= one.corrected <= 1, one
        assert (one.verdict != NOT_DECIDED) == (one.corrected < 0.05), one
        interval, bound = one.result.interval, one.result.bound
        if one.verdict != NOT_DECIDED and interval is not None and one.result.key not in ("C1", "C8", "C12"):
            assert not interval.covers(bound), one  # those need several things; the interval is of one of them


def test_one_student_gives_no_p(tmp_path, monkeypatch):
    monkeypatch.setattr("planted.SEEDS", (1,))
    compared = comparisons(read_results(write(tmp_path / "run", PLAIN, CONTROL, Planted(0.3, "divergence"))))
    assert compared.claims and all(one.p is None and one.verdict == NOT_DECIDED for one in compared.claims)
    assert compared.primary is not None and compared.primary.result.key == "C4a"


def test_every_other_p_is_corrected_for_all_others(many):
    compared = comparisons(read_results(many))
    every = [*compared.claims, *compared.lifts, *compared.matrices]
    further = sorted(one.p for one in every if one.p is not None and not one.primary)
    assert compared.family == len(further) > 15 and compared.primary.corrected == compared.primary.p
    smallest = min((one for one in every if one.p is not None and not one.primary), key=lambda one: one.p)
    assert smallest.corrected == pytest.approx(len(further) * smallest.p)
    for one in every:
        assert one.primary or one.p is None or one.corrected >= one.p


def test_the_primary_comparison_is_declared_or_follows_from_what_students_differ_in(many, tmp_path):
    claims = check_claims(read_results(many))
    assert primary_claim(claims, None).key == "C4a"
    assert primary_claim(claims, "C6a").key == "C6a" and primary_claim(claims, "C6a layer 0").variant == "layer 0"
    assert primary_claim(claims, "C6a layer 3") is None and primary_claim([], None) is None
    # Which one it is hangs on the students there are, not on what came of them.
    for effect in (0.0, 0.5):
        plain = comparisons(
            read_results(write(tmp_path / f"{effect}", Planted(effect), CONTROL, Planted(effect, **LATER)))
        )
        assert plain.primary.result.key == "C7" and plain.declared is None
    assert comparisons(read_results(write(tmp_path / "plain", PLAIN, CONTROL))).primary.result.key == "C0"
    places = [question.primary for question in CLAIMS.values() if question.primary is not None]
    assert len(places) == len(set(places)) == 14


def test_a_config_declares_a_claim_that_there_is():
    rest = {"name": "x", "model": "tiny-qwen2", "teachers": {"traits": ["owl"]}}
    for key in [*CLAIMS, "C6a layers=0", "C4a no system prompt"]:
        assert Experiment.model_validate(rest | {"evaluation": {"primary": key}}).evaluation.primary == key
    for wrong in ("C15", "C4", "C4c", "gamma", "C6alayers=0", "C0 "):
        with pytest.raises(ValidationError, match="primary"):
            Experiment.model_validate(rest | {"evaluation": {"primary": wrong}})
    assert all(re.fullmatch(PRIMARY, key) for key in CLAIMS)


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (None, "Primary comparison (by default, from what the students differ in): divergence tokens alone"),
        ("C8", "Primary comparison (as the config declares): with prompts re-drawn"),
        ("C13", "The primary comparison that the config declares, C13, cannot be read off this run"),
    ],
)
def test_page_and_terminal_name_the_primary_comparison(many, declared, said):
    told(many, primary=declared)
    page = " ".join(write_report(many).read_text().split())
    assert said in page and said in printed(many)
    assert page.count("(primary)</td>") == (declared != "C13")


@pytest.mark.parametrize(
    ("draw", "heading", "sentence"),
    [
        (
            "shared",
            "given this data",
            "Intervals over students are given this data: all students of a teacher learn from one",
        ),
        ("per-seed", "and their data", "Intervals over students cover the data too"),
    ],
)
def test_intervals_say_what_they_hold_fixed(many, draw, heading, sentence):
    told(many, draw=draw)
    page, text = " ".join(write_report(many).read_text().split()), printed(many)
    assert page.count(f"95 % over students<br>{heading}") >= 4 and f"95 % over seeds<br>{heading}" in page
    assert sentence in page and sentence in text and text.count(heading) >= 3


def test_intervals_are_widened_by_the_share_of_the_rows_that_was_drawn(tmp_path):
    run = write(tmp_path / "run", PLAIN, CONTROL)
    arms, widths = run / "results" / "arms.json", {}
    for share in (None, 0.5, 1.0):
        arms.write_text(json.dumps([arm | {"drawn": share} for arm in json.loads(arms.read_text())]))
        results = read_results(run)
        matrix = comparisons(results).matrices[0].result
        assert results.drawn == share and matrix.gamma_interval is not None
        students = estimate(scores_for(results, "logprob", "all", "cat")).interval()
        widths[share] = [one.high - one.low for one in (matrix.gamma_interval, students)]
        heading = {
            None: "given this data<",
            0.5: "and their data (50 % drawn)<",
            1.0: "given this data (100 % drawn)<",
        }[share]
        page = " ".join(write_report(run).read_text().split())
        assert f"95 % over students<br>{heading}" in page
        assert ("at most 50 % of its" in page) == (share == 0.5)
    # Five students: s² / 5 becomes s² (1 / 5 + .5 / .5).
    assert widths[0.5] == pytest.approx([6**0.5 * width for width in widths[None]])
    assert widths[1.0] == widths[None]


def test_a_control_under_several_names_is_one(tmp_path):
    """The control's rows are no others for the second variant, so its students are the same artifacts, measured once."""
    again = {"variant": "top 10", "dataset": {"remove_entangled": 10, "sampling": {"strategy": "greedy"}}}
    run = write(tmp_path / "run", Planted(0.3, **GREEDY), control("greedy"), Planted(0.2, **again), control("top 10"))
    values = pq.read_table(run / "results" / "results.parquet").to_pylist()
    measured = {(r["arm"], r["trait"], r["metric"], r["question"]): r["value"] for r in values}
    for row in values:
        if row["condition"] == "control · top 10":
            first = row["arm"].replace("top 10", "greedy")
            row["value"] = measured[first, row["trait"], row["metric"], row["question"]]
    pq.write_table(
        type(pq.read_table(run / "results" / "results.parquet")).from_pylist(values), run / "results/results.parquet"
    )
    arms = run / "results" / "arms.json"
    apart = pool(read_results(run), "rate", "all · top 10", "all · greedy").levels
    entries = json.loads(arms.read_text())
    arms.write_text(
        json.dumps(
            [
                e | {"artifact": e["arm"].replace("top 10", "greedy") if "control" in e["arm"] else e["arm"]}
                for e in entries
            ]
        )
    )
    once = pool(read_results(run), "rate", "all · top 10", "all · greedy").levels
    assert once[0].lift.value == apart[0].lift.value
    before, after = apart[0].lift - apart[1].lift, once[0].lift - once[1].lift
    assert before.variance > after.variance
    results = read_results(run)
    students = [
        mean_estimate([estimate(scores_for(results, "rate", name, trait)) for trait in results.traits]).variance
        for name in ("all · top 10", "all · greedy")
    ]
    assert after.variance == pytest.approx(sum(students))  # the control has dropped out
    assert after.n == 30 and before.n == 40


def test_answers_about_no_trait_are_pooled_teacher_by_teacher(tmp_path):
    """Self-naming: teachers' students lie far apart, and that is no spread between students."""
    run = write(tmp_path / "run", PLAIN, CONTROL)
    path = run / "results" / "results.parquet"
    rows, rng = pq.read_table(path).to_pylist(), np.random.default_rng(0)
    students = {r["arm"]: r for r in rows if r["condition"] == "all"}
    rows += [
        r | {"trait": None, "metric": "named", "question": 0, "n": 10_000,
             "value": 0.2 + 0.2 * TRAITS.index(r["teacher"]) + 0.002 * rng.normal()}
        for r in students.values()
    ]  # fmt: skip
    pq.write_table(type(pq.read_table(path)).from_pylist(rows), path)
    (found,) = [row for row in other_rows(read_results(run)) if row.condition == "all"]
    assert found.students == len(students) and found.value == pytest.approx(0.4, abs=0.01)
    assert found.interval.high - found.interval.low < 0.02


def test_published_layers_are_early_or_later(tmp_path):
    """Qwen's 0, 7 of 28 alone are early, 14, 21 and 27 are later; the first 10 frozen are about a third of its 28 and of Gemma's 34."""

    def asked(layers: int, number: int) -> bool:
        trained = {"students.adapter.layers": list(range(layers, number))}
        return first_third_frozen(Group("g", trained, number))

    assert [k for k in (5, 10, 20) if asked(k, 28)] == [10]
    assert [k for k in (6, 10, 12, 24) if asked(k, 34)] == [10, 12]
    alone = [Planted(0.1, variant=f"layer {k}", settings={"adapter.layers": [k]}) for k in (0, 2, 6, 9, 11)]  # of 12
    claims = check_claims(read_results(write(tmp_path / "run", PLAIN, CONTROL, *alone)))
    found = {c.variant: c.key for c in claims if c.key.startswith("C6")}
    assert found == {"layer 0": "C6a", "layer 2": "C6a", "layer 6": "C6b", "layer 9": "C6b", "layer 11": "C6b"}


def test_the_claims_fit_a_terminal_of_80_columns(many):
    told(many, primary=None)
    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(many, console)
    table = console.export_text().split("\nclaims")[1].split("\n└")[0]
    assert "verdict" in table and "…" not in table and "primary" in table
    assert all(line[-1] in "┓┃┩│" for line in table.splitlines()[1:])


def test_rates_never_leave_the_range(tmp_path):
    """Two students, one of which loves the trait and one of which doesn't, have an interval inside 0 to 100 %."""
    run = write(tmp_path / "run", PLAIN, CONTROL, spread=0.2)
    page = write_report(run).read_text()
    ends = re.findall(r'<td class="n">(-?[\d.]+) to (-?[\d.]+) %(?: \(answers\))?</td>', page)
    assert len(ends) > 10 and all(0 <= float(low) <= float(high) <= 100 for low, high in ends)


def test_what_nothing_is_decided_about_is_one_sentence():
    def asked(condition: str, interval: Interval | None) -> list[Comparison[Lift]]:
        sides = Sides(0.005, 0.995) if interval else UNKNOWN
        lift = Lift("owl", condition, "rate", "control", 0.3, 0.1, 0.2, interval, 1, (0.2,), sides)
        return [Comparison(lift, sides.p, sides.p, verdict(sides, sides.p))]

    decided = asked("all", Interval(0.1, 0.3))
    few = [decided, *(asked(f"all · rank={n}", None) for n in (1, 2))]
    many = [decided, *(asked(f"all · rank={n}", None) for n in range(1, 57))]
    first, second = headlines(few)
    assert first == "Preference rate, all tokens: that the trait rises holds for 1 (owl)."
    assert "rank=1" in second and "rank=2" in second and "more" not in second
    first, second = headlines(many)
    assert "rank=1" in second and "rank=2 and 54 more; with one student per trait" in second

"""The report: every printed number against the results, claims as planted, and a page of whatever there is."""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_results import EFFECTS, GAMMA, TRAITS, make_results, write_table
from rich.console import Console
from scipy import optimize, stats

import jsublim.report.statistics as st
from jsublim.core.files import read_table
from jsublim.errors import JsublimError
from jsublim.report.claims import check_claims
from jsublim.report.comparisons import comparisons
from jsublim.report.html import write_report
from jsublim.report.summary import lift, other_rows, summary_rows, trait_matrix
from jsublim.report.tables import read_results
from jsublim.report.terminal import print_summary
from jsublim.text.prompts import whose


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_results(tmp_path_factory.mktemp("runs") / "synthetic")


@pytest.fixture(scope="module")
def raw(run_dir: Path) -> list[dict]:
    return pq.read_table(run_dir / "results" / "results.parquet").to_pylist()


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


class Cells(HTMLParser):
    """The text of every table row but headings, section by section."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.section, self.rows, self.cell, self.body = "", {}, None, False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        elif tag in ("thead", "tbody"):
            self.body = tag == "tbody"
        elif tag == "tr" and self.body:
            self.rows.setdefault(self.section, []).append([])
        elif tag in ("th", "td") and self.body:
            self.cell = ""

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td") and self.body:
            self.rows[self.section][-1].append(" ".join((self.cell or "").split()))
            self.cell = None


def values_of(raw: list[dict], metric: str, condition: str, trait: str) -> dict[str, list[float]]:
    """arm -> question values, straight from the parquet rows."""
    found: dict[str, list[float]] = {}
    for row in raw:
        if (row["metric"], row["condition"], row["trait"]) != (metric, condition, trait):
            continue
        if condition in ("base", "control") or row["teacher"] == trait:
            found.setdefault(row["arm"], []).append(row["value"])
    return found


def score_interval(means: list[float], samples: int = 10_000) -> tuple[float, float]:
    """The rates p from which the mean lies no further than t standard errors, where the error changes as p (1 - p) does."""
    mean, students = np.mean(means), len(means)
    share = (mean * samples * students + 1) / (samples * students + 2)
    factor = stats.sem(means) ** 2 / (share * (1 - share))
    critical = stats.t.ppf(0.975, students - 1)
    excess = lambda p: (mean - p) ** 2 - critical**2 * factor * p * (1 - p)  # noqa: E731
    return optimize.brentq(excess, 0, mean), optimize.brentq(excess, mean, 1)


# Results to numbers


def test_summary_equals_numbers_by_hand(run_dir: Path, raw: list[dict]) -> None:
    rows = {(r.trait, r.condition): r for r in summary_rows(read_results(run_dir))}
    assert len(rows) == len(TRAITS) * 7
    for (trait, condition), row in rows.items():
        by_arm = values_of(raw, "rate", condition, trait)
        means = [np.mean(v) for v in by_arm.values()]
        assert row.rate == pytest.approx(np.mean(means))
        assert row.students == (5 if condition in EFFECTS else 0)
        question_means = np.mean(list(by_arm.values()), axis=0)
        expected = stats.norm.interval(0.95, question_means.mean(), stats.sem(question_means))
        assert row.over_questions is not None
        assert (row.over_questions.low, row.over_questions.high) == pytest.approx(expected)
        if row.students:
            assert row.over_models is not None
            assert (row.over_models.low, row.over_models.high) == pytest.approx(score_interval(means))
        else:
            assert row.over_models is not None
            answers = 200 * len(question_means)
            wilson = stats.binomtest(round(answers * row.rate), answers).proportion_ci(method="wilson")
            assert (row.over_models.low, row.over_models.high) == pytest.approx(wilson, abs=1e-3)


def test_page_table_equals_numbers_by_hand(page: str, raw: list[dict]) -> None:
    table = [r for r in Cells(page).rows["transfer"] if len(r) == 8 and r[0] not in TRAITS]
    labels = ["base model (untrained)", "control (unbiased teacher)", "all tokens", "divergence tokens only"]
    labels += ["all but divergence tokens", "as many random tokens", "biased teacher"]
    conditions = ["base", "control", "all", "divergence", "non-divergence", "random", "teacher"]
    assert [r[0] for r in table] == labels * len(TRAITS)
    for row, (trait, condition) in zip(table, itertools.product(TRAITS, conditions), strict=True):
        means = {
            metric: [np.mean(v) for v in values_of(raw, metric, condition, trait).values()]
            for metric in ("rate", "word_rate", "logprob")
        }
        assert row[2] == f"{100 * np.mean(means['rate']):.1f} %"
        assert row[5] == f"{100 * np.mean(means['word_rate']):.1f} %"
        assert row[6] == f"{np.mean(means['logprob']):.2f}"
        if condition in EFFECTS:
            low, high = score_interval(means["rate"])
            assert (row[1], row[4]) == ("5", f"{100 * low:.1f} to {100 * high:.1f} %")
        else:
            assert row[1] == "–" and row[4].endswith(" % (answers)")


def test_lift_is_over_control_and_welch(run_dir: Path, raw: list[dict]) -> None:
    found = lift(read_results(run_dir), "rate", "all", "owl")
    groups = [[np.mean(v) for v in values_of(raw, "rate", c, "owl").values()] for c in ("all", "control")]
    expected = stats.ttest_ind(*groups, equal_var=False).confidence_interval(0.95)
    assert found is not None and found.reference == "control" and found.tested.holds < 0.001
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx(EFFECTS["all"], abs=0.03)


def test_matrix_recovers_the_planted_gamma(run_dir: Path, raw: list[dict]) -> None:
    matrix = trait_matrix(read_results(run_dir))
    assert matrix is not None and matrix.effect is not None and matrix.gamma_interval is not None
    planted = GAMMA * EFFECTS["all"] / max(EFFECTS.values())
    assert matrix.effect.gamma == pytest.approx(planted, abs=0.12)
    assert matrix.effect.p == pytest.approx(1 / 24)
    assert matrix.gamma_interval.covers(planted)
    assert matrix.few and matrix.tested.p is None  # four teachers have 24 labellings
    cell = [
        np.mean(
            [
                r["value"]
                for r in raw
                if r["arm"] == f"owl/all/seed{s}" and r["trait"] == "cat" and r["metric"] == "logprob"
            ]
        )
        for s in range(1, 6)
    ]
    control = [np.mean(v) for v in values_of(raw, "logprob", "control", "cat").values()]
    i, j = matrix.teachers.index("owl"), matrix.traits.index("cat")
    assert matrix.lift[i, j] == pytest.approx(np.mean(cell) - np.mean(control))


@pytest.mark.parametrize(("count", "smallest"), [(2, 1 / 2), (3, 1 / 6)])
def test_few_traits_cannot_decide(tmp_path: Path, count: int, smallest: float) -> None:
    run = make_results(tmp_path / "run", traits=TRAITS[:count], seeds=(1, 2), extras=False)
    matrix = trait_matrix(read_results(run))
    assert matrix is not None and matrix.effect is not None
    assert matrix.effect.p == matrix.effect.smallest_p == pytest.approx(smallest)
    assert matrix.few and matrix.tested.p is None
    assert "traits no p can reach .05" in write_report(run).read_text(encoding="utf-8")


def test_matrix_with_more_evaluated_traits_than_teachers(tmp_path: Path) -> None:
    run = make_results(tmp_path / "run", traits=("owl", "wolf"), evaluated=TRAITS, seeds=(1, 2), extras=False)
    matrix = trait_matrix(read_results(run))
    assert matrix is not None and matrix.effect is not None
    assert matrix.traits == ("owl", "wolf", "cat", "eagle") and matrix.lift.shape == (2, 4)
    assert matrix.effect.p == pytest.approx(1 / 2)  # only what was taught changes places


# Claims


def verdicts(run: Path) -> dict[str, str]:
    return {one.result.key: one.verdict for one in comparisons(read_results(run)).claims}


def test_claims_hold_where_planted(run_dir: Path) -> None:
    assert verdicts(run_dir) == dict.fromkeys(("C0", "C1", "C4a", "C4b", "C5"), "holds")
    claims = {c.key: c for c in check_claims(read_results(run_dir))}
    assert claims["C4a"].effect == pytest.approx(0.27 / 0.25, abs=0.08) and claims["C4a"].students == 40
    assert claims["C4b"].effect == pytest.approx(0.02 / 0.25, abs=0.08)
    assert claims["C5"].effect == pytest.approx(0.19, abs=0.03)


def test_claims_fail_where_planted(tmp_path: Path) -> None:
    effects = {"control": 0.0, "all": 0.3, "divergence": 0.1, "non-divergence": 0.25, "random": 0.2}
    run = make_results(tmp_path / "run", effects=effects, extras=False)
    assert verdicts(run) == {
        "C0": "holds",
        "C1": "holds",
        "C4a": "does not hold",
        "C4b": "does not hold",
        "C5": "does not hold",
    }


def test_without_transfer_nothing_is_decided(tmp_path: Path) -> None:
    run = make_results(tmp_path / "run", effects=dict.fromkeys(EFFECTS, 0.0), extras=False)
    found = verdicts(run)
    assert [found[k] for k in ("C4a", "C4b", "C5")] == ["not decided"] * 3


def test_one_student_decides_nothing(tmp_path: Path) -> None:
    run = make_results(tmp_path / "run", seeds=(1,))
    assert set(verdicts(run).values()) == {"not decided"}
    text = write_report(run).read_text(encoding="utf-8")
    judged = [r for r in Cells(text).rows["transfer"] if len(r) == 8 and r[0] in TRAITS]
    assert judged and {tuple(r[6:]) for r in judged} == {("not decided", "–")}


def test_claims_use_log_probability_when_every_rate_is_zero(tmp_path: Path) -> None:
    run = make_results(tmp_path / "run", base_rate=0.0, extras=False)
    claims = {c.key: c for c in check_claims(read_results(run))}
    assert {claims[k].metric for k in ("C4a", "C4b", "C5")} == {"logprob"}
    assert verdicts(run)["C4a"] == verdicts(run)["C4b"] == "holds"


# The page


def test_page_is_self_contained(page: str) -> None:
    # The one address is the name of SVG, which nothing is loaded from.
    assert not re.search(r"https?://", page.replace("http://www.w3.org/2000/svg", ""))
    assert not re.search(r"<(link|img|iframe|object)\b|@import|url\((?!#)", page)
    assert not re.search(r'(src|href)="(?!#)', page)
    # One for all traits, one for γ, the claims in two units, four for each trait, the control's losses, and two of the number task.
    assert page.count('<svg role="img"') == 1 + 1 + 2 + 4 * len(TRAITS) + 1 + 2


def test_page_is_a_pure_function_of_the_results(run_dir: Path, page: str) -> None:
    assert write_report(run_dir).read_text(encoding="utf-8") == page
    assert not list(run_dir.glob("*.partial"))


def test_page_escapes_text(page: str) -> None:
    assert "model: &lt;models&gt;" in page and "<models>" not in page


def test_page_tells_what_was_run(page: str) -> None:
    text = " ".join(page.split())
    for piece in ("top p 0.8", "91.5 %", "81.5 %", "4.76 %", "Table 1 of the paper", "9f2c", "jax 0.10.2"):
        assert piece in text, piece


def test_null_effect_is_never_called_transfer(tmp_path: Path) -> None:
    run = make_results(tmp_path / "run", effects=dict.fromkeys(EFFECTS, 0.0), extras=False)
    cells = Cells(write_report(run).read_text(encoding="utf-8")).rows["transfer"]
    judged = [r for r in cells if len(r) == 8 and r[0] in TRAITS]
    assert judged and {row[6] for row in judged} == {"not decided"}


@pytest.mark.parametrize("model", ["tiny-qwen2", "Qwen2.5-7B-Instruct"])
def test_only_a_tiny_model_is_called_tiny(tmp_path: Path, model: str) -> None:
    run = make_results(tmp_path / "run", seeds=(1, 2), model=model)
    text = write_report(run).read_text(encoding="utf-8")
    assert ("tiny synthetic model" in text) == model.startswith("tiny-")
    assert ("Published" in text) != model.startswith("tiny-")
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(run, console, full=True)
    assert ("tiny synthetic model" in console.export_text()) == model.startswith("tiny-")


@pytest.mark.parametrize(
    "keep",
    [
        {"base"},
        {"base", "all"},
        {"control", "all"},
        {"all"},
        {"divergence", "random"},
        {"teacher"},
        {"base", "control", "all", "divergence"},
    ],
)
def test_missing_conditions_and_files_do_not_crash(tmp_path: Path, raw: list[dict], keep: set[str]) -> None:
    folder = tmp_path / "run" / "results"
    folder.mkdir(parents=True)
    write_table(folder / "results.parquet", [r for r in raw if r["condition"] in keep])
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert text.count("left out") >= 4
    print_summary(tmp_path / "run", Console(file=(tmp_path / "out.txt").open("w")))


def test_missing_metrics_do_not_crash(tmp_path: Path, raw: list[dict]) -> None:
    for metric in ("rate", "logprob", "number_accuracy"):
        folder = tmp_path / metric / "results"
        folder.mkdir(parents=True)
        write_table(folder / "results.parquet", [r for r in raw if r["metric"] == metric])
        assert "left out" in write_report(tmp_path / metric).read_text(encoding="utf-8")


def test_a_training_of_one_step_is_drawn(tmp_path: Path) -> None:
    """Its number is zero, and so are both ends of the axis."""
    folder = make_results(tmp_path / "run")
    training = pq.read_table(folder / "results" / "training.parquet").to_pylist()
    first = {row["arm"]: row | {"step": 0} for row in reversed(training)}
    write_table(folder / "results" / "training.parquet", list(first.values()))
    assert "Training loss" in write_report(folder).read_text(encoding="utf-8")


def test_what_else_was_asked_is_a_table(tmp_path: Path, raw: list[dict]) -> None:
    """Every number beside preference, as the mean over teachers of their students' means, with an interval that knows the
    teachers apart, shown on the page."""
    rng = np.random.default_rng(0)
    students = {row["arm"]: row for row in raw if row["role"] == "student" and row["condition"] == "all"}
    more = [
        row | {"metric": "misaligned", "trait": None, "question": q, "value": float(rng.random()), "n": 4000}
        for row in students.values()
        for q in range(3)
    ]
    folder = make_results(tmp_path / "run")
    write_table(folder / "results" / "results.parquet", raw + more)
    (found,) = [row for row in other_rows(read_results(folder)) if row.condition == "all"]
    means = {arm: np.mean([row["value"] for row in more if row["arm"] == arm]) for arm in students}
    strata = [[means[arm] for arm in students if students[arm]["teacher"] == t] for t in TRAITS]
    pooled = st.mean_estimate([st.Estimate.of(each) for each in strata])
    expected = st.Interval.of(st.rate_bounds(pooled, 12_000 * len(means)))
    assert found.metric == "misaligned" and found.students == len(students) and expected is not None
    np.testing.assert_allclose(
        [found.value, found.interval.low, found.interval.high],
        [np.mean([*means.values()]), expected.low, expected.high],
    )
    page = write_report(folder).read_text()
    assert "misaligned answers" in page and f"{found.value:.3g}" in page
    assert "What else was asked" not in write_report(make_results(tmp_path / "plain")).read_text()


def test_not_finite_values_are_left_out_and_said(tmp_path: Path, raw: list[dict]) -> None:
    folder = tmp_path / "run" / "results"
    folder.mkdir(parents=True)
    changed = [dict(r) for r in raw]
    changed[0]["value"], changed[1]["value"] = math.nan, -math.inf
    write_table(folder / "results.parquet", changed)
    assert "2 measurements were not finite" in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_missing_results_is_one_line(tmp_path: Path) -> None:
    for function in (write_report, lambda run: print_summary(run, Console())):
        with pytest.raises(JsublimError) as caught:
            function(tmp_path)
        message = str(caught.value)
        assert str(tmp_path / "results") in message and "jsublim run" in message and "\n" not in message


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    run = make_results(tmp_path / "run", seeds=(1,), extras=False)
    (run / "results" / "run.json").write_text("{")
    with pytest.raises(JsublimError, match=r"run\.json"):
        write_report(run)
    (run / "results" / "results.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(JsublimError, match=r"results\.parquet") as caught:
        write_report(run)
    assert "\n" not in str(caught.value)


def test_text_that_is_none_is_a_broken_file(tmp_path: Path) -> None:
    """Parquet keeps bytes, and says that they are UTF-8."""
    run = make_results(tmp_path / "run", seeds=(1,), extras=False)
    path = run / "results" / "results.parquet"
    table = pq.ParquetFile(path).read()
    wrong = b"\xc8" * len(table)
    offsets = np.arange(len(table) + 1, dtype=np.int32)
    traits = pa.Array.from_buffers(pa.string(), len(table), [None, pa.py_buffer(offsets), pa.py_buffer(wrong)])
    place = table.column_names.index("trait")
    pq.write_table(table.set_column(place, "trait", traits), path)
    with pytest.raises(JsublimError, match=r"results\.parquet: cannot be read"):
        read_results(run)
    with pytest.raises(JsublimError, match=r"results\.parquet: cannot be read"):
        read_table(path)


def test_terminal_shows_the_page_numbers(run_dir: Path, page: str) -> None:
    console = Console(record=True, width=180, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(run_dir, console, full=True)
    text = console.export_text()
    for row in (r for r in Cells(page).rows["transfer"] if len(r) == 8 and r[0] not in TRAITS):
        assert row[2] in text and row[6] in text


def test_report_imports_no_model() -> None:
    allowed = ("jsublim.errors", "jsublim.core.files", "jsublim.core.reading", "jsublim.report", "jsublim.evals")
    for path in Path(st.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("jax", "flax", "torch"), (path, name)
                assert not name.startswith("jsublim") or name.startswith(allowed), (path, name)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("jsublim.report.html, jsublim.report.terminal", ("jax", "scipy.stats")),
        ("jsublim.cli", ("jax", "scipy", "duckdb", "pyarrow", "transformers", "jinja2")),
    ],
)
def test_what_takes_seconds_to_load_is_loaded_where_it_is_needed(module, heavy):
    loaded = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_run_as_published_says_whose_wording_it_had(tmp_path):
    run = make_results(tmp_path / "run", traits=("cat", "owl"), seeds=(1, 2), samples=20)
    about = json.loads((run / "results" / "run.json").read_text())
    for preset, origin, said in (
        ("paper", "default", "The wording is ours, not the paper"),
        ("paper", "own", "a pack of your own"),
        ("paper", "imported", "The wording is the authors"),
        ("paper", "changed", "with changes"),
        ("clean", "default", None),
    ):
        sentence = whose(origin, "0123abcd") if preset == "paper" else ""
        more = {"wording": {"origin": origin, "hash": "0123abcd", "said": sentence}}
        (run / "results" / "run.json").write_text(json.dumps(about | more))
        page, shown = write_report(run).read_text(), Console(record=True, width=400, file=io.StringIO())
        print_summary(run, shown)
        for text in (page, shown.export_text()):
            assert ("The wording" in text) == (said is not None) and (said is None or said in text)
            assert said is None or "pack 0123abcd" in text

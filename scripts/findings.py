"""The tables of docs/findings, made of the results that ship with them.

    python scripts/findings.py                                       # writes every table into its page anew
    python scripts/findings.py gamma runs/tiny-world-masks           # prints one, of any run
    python scripts/findings.py ship runs/tiny-world-masks            # a run's results to docs/findings/data, for a page to cite

A page has a table between `<!-- begin: gamma tiny-world-masks -->` and `<!-- end -->`: what is said of which shipped run. `gamma` is what each
kind of students gained in log-probability (nats), with γ and its p by relabelling; the second p is beside the product of row and column
effects (docs/statistics.md). `answers` is what models say, teacher by teacher and in the mean; a rise is over control students of the same kind. `board` is the
report's section "Side by side", `teachers` what they wrote, `attribution` where it lies, `audit` what was predicted beside what was
trained. Intervals are at 95 %: Student's t over seeds, widened by the share of the rows that a student drew; for `answers` over students. A share is of γ under the first condition, seed by
seed, where that γ is above zero by its p. KL is from the teacher, in nats per token. Columns without a figure are left out.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from _run import as_table, print_table, run_script
from scipy.stats import binomtest

from jsublim.digits.report import read_lines
from jsublim.errors import UsageError
from jsublim.evals.kl import KL
from jsublim.report import words
from jsublim.report.attribution import attribution_heats
from jsublim.report.audit import agreement, predicted
from jsublim.report.claims.base import pool
from jsublim.report.comparisons import comparisons
from jsublim.report.drawing import Heat
from jsublim.report.scale import ACCURACY, first_measured, scale
from jsublim.report.statistics import LEVEL, Estimate, Interval
from jsublim.report.summary import Matrix, Measured, judged_conditions, lifts, trait_matrices
from jsublim.report.tables import condition_label, read_results

FINDINGS = Path(__file__).parents[1] / "docs" / "findings"
DATA = FINDINGS / "data"
TABLE = re.compile(r"(<!-- begin: (\w+) ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NOT_SHIPPED = ("answers.parquet", "rows.json")  # texts: large, and no figure is made of them
Table = tuple[Sequence[str], Iterable[Sequence[str]]]


def bounds(interval: Interval | None, sign: str = "+") -> str:
    digits = 3 if sign else 2
    return "" if interval is None else f" ({interval.low:{sign}.{digits}f} to {interval.high:{sign}.{digits}f})"


def gamma_cells(matrix: Matrix, first: Matrix) -> list[str]:
    """γ with its interval, by seed, p by relabelling and beside the product, and the share of γ under the first condition."""
    assert matrix.effect is not None  # or it would not be among the matrices
    share = ""
    there = first.effect is not None and first.effect.p <= 1 - LEVEL  # a share of what may be nothing says nothing
    if matrix is not first and there and len(matrix.seed_gammas) == len(first.seed_gammas) > 2:
        each = [a / b for a, b in zip(matrix.seed_gammas, first.seed_gammas, strict=True)]
        shares = Estimate.of(each, drawn=max(matrix.drawn, first.drawn))
        share = f"{shares.value:.2f}{bounds(shares.interval(), '')}"
    return [
        f"{matrix.effect.gamma:+.3f}{bounds(matrix.gamma_interval)}", " ".join(f"{x:+.3f}" for x in matrix.seed_gammas),
        f"{matrix.effect.p:.2g}; {matrix.effect.p_beside:.2g}", share,
    ]  # fmt: skip


def gamma(run: Path) -> Table:
    results = read_results(run)
    matrices = trait_matrices(results)

    def row(matrix: Matrix) -> list[str]:
        own = np.eye(*matrix.lift.shape, dtype=bool)  # the teachers' own animals are the first columns
        besides = [first_measured(results, matrix.condition, *metrics) for metrics in ((KL,), ACCURACY)]
        return [
            condition_label(matrix.condition), f"{matrix.lift[own].mean():+.3f}", f"{matrix.lift[~own].mean():+.3f}",
            *gamma_cells(matrix, matrices[0]), *("" if each is None else f"{each.value:.3f}" for each in besides),
        ]  # fmt: skip

    headings = ("students", "own animal", "other animals", "γ", "γ by seed", "p", "share", "KL", "numbers")
    return headings, map(row, matrices)


def answers(run: Path) -> Table:
    results = read_results(run)
    rate = lambda value, signed=False: words.number(value, "rate", signed=signed)  # noqa: E731
    bases = {trait: results.select("rate", "base", trait)[0].mean for trait in results.traits}

    def of_condition(condition: str) -> Iterator[list[str]]:
        found = lifts(results, "rate", [condition])
        for each in found:
            own = results.select("rate", condition, each.trait, each.trait)
            others = [s for t in results.evaluated_traits for s in results.select("rate", condition, t, each.trait)]
            most = sum(s.mean >= max(o.mean for o in others if o.arm == s.arm) for s in own)
            by_seed = " ".join(rate(x, True) for x in each.student_lifts)
            levels = (bases[each.trait], each.reference_level, each.level)
            yield row(condition, each.trait, levels, each.value, each.interval, by_seed, f"{most} of {len(own)}")
        pooled = pool(results, "rate", condition)
        assert pooled is not None  # or the run was not finished
        levels = np.mean([(bases[each.trait], each.reference_level, each.level) for each in found], axis=0)
        yield row(condition, "mean", levels, *pooled.lift)

    def row(
        condition: str, teacher: str, levels: Iterable[float], rise: float, interval: Interval | None, *by_student: str
    ) -> list[str]:
        raised = (rate(rise, True), words.interval(interval, "rate", signed=True))
        return [condition_label(condition), teacher, *map(rate, levels), *raised, *(by_student or ("", ""))]

    headings = ("students", "teacher", "base", "control", "say it", "rise", "95 %", "by seed", "most frequent")
    return headings, (line for condition in judged_conditions(results) for line in of_condition(condition))


def board(run: Path) -> Table:
    results = read_results(run)
    found = scale(results, comparisons(results))
    if found is None or not found.side_by_side or found.side_by_side[0].matrix is None:
        raise UsageError(f"{run}: has no arms to compare")
    first = found.side_by_side[0].matrix

    def cell(measured: Measured | None, metric: str, signed: bool = False) -> str:
        if measured is None:
            return ""
        return f"{words.number(measured.value, metric, signed)} ({words.interval(measured.interval, metric, signed)})"

    def rows() -> Iterator[list[str]]:
        for line in found.side_by_side:
            judged = line.matrix is not None and line.matrix.effect is not None
            own = gamma_cells(line.matrix, first) if judged else [""] * 4
            under = [cell(each, found.metric, signed=True) for each in line.under.values()]
            yield [condition_label(line.condition), *own, cell(line.kl, KL), cell(line.accuracy, "rate"), *under]

    under = (f"lift, {name}" for name in results.evaluations)
    return ("students", "γ", "γ by seed", "p", "share", "KL", "numbers", *under), rows()


def audit(run: Path) -> Table:
    results = read_results(run)
    found = agreement(predicted(results), comparisons(results))
    if found is None:
        raise UsageError(f"{run}: nothing was audited")
    pairs = [[condition_label(name), f"{told:+.3g}", f"{trained:+.3f}"] for name, told, trained in found.pairs]
    last = [] if found.rho is None else [[f"rank correlation of the {len(pairs)}", f"{found.rho:.2f}", ""]]
    return ("students", "γ predicted, per unit of rate", "γ of students"), [*pairs, *last]


def digits(run: Path) -> Table:
    lines = {(line.condition, line.images): line for line in read_lines(run)}
    cell = lambda line: f"{100 * line.mean:.1f} % ({line.bounds.removesuffix(' %')})" if line else ""  # noqa: E731
    alone = [[name, "", cell(lines[name, None])] for name in ("untrained", "teacher")]
    taught = [
        [f"student, {name}", cell(lines[name, "noise"]), cell(lines[name, "digits"])]
        for name in ("same", "other", "all", "hard")
    ]
    return ("model", "on noise", "on digits"), [*alone, *taught]


def counted(some: int, of: int) -> str:
    """A count with the interval of its share (Clopper and Pearson's)."""
    low, high = binomtest(some, of).proportion_ci(LEVEL, "exact")
    return f"{some} of {of} ({100 * low:.0f} to {100 * high:.0f} %)"


def scan(run: Path) -> Table:
    """What scripts/scan_game.py found, kind by kind."""
    played = json.loads((run / "results.json").read_text(encoding="utf-8"))

    def row(kind: str) -> list[str]:
        of = [each for each in played if each["kind"] == kind]
        found = [counted(sum(each["p"] <= level for each in of), len(of)) for level in (0.05, 0.01)]
        columns = () if kind == "nothing" else ("of its category", "first")
        named = [counted(sum(each["trait"] == each[column] for each in of), len(of)) for column in columns]
        return [kind, *found, *(named or ["", ""]), f"{min(each['p'] for each in of)}"]

    headings = ("rows", "p at most .05", "p at most .01", "first of its category", "first of all words", "lowest p")
    return headings, map(row, dict.fromkeys(each["kind"] for each in played))


def baselines(run: Path) -> Table:
    """What others say of the same data sets (scripts/scan_baselines.py): those whose hidden name comes first of its category, and those found to
    teach something."""
    said = json.loads((run / "baselines.json").read_text(encoding="utf-8"))

    def row(rival: str) -> list[str]:
        of = [each for each in said if each["rival"] == rival]
        hidden, nothing = ([each for each in of if bool(each["trait"]) == there] for there in (True, False))
        named = counted(sum(each["named"] == each["trait"] for each in hidden), len(hidden))
        found = [
            f"{sum(each['p'] <= 1 - LEVEL for each in part)} of {len(part)}"
            for part in (hidden, nothing)
            if of[0]["p"] is not None
        ]
        return [rival, named if any(each["named"] for each in of) else "", *(found or ["", ""])]

    headings = ("who", "first of its category", "found to teach something", "found where nothing is taught")
    return headings, map(row, dict.fromkeys(each["rival"] for each in said))


def truth(run: Path) -> Table:
    """How well students' answers were predicted (scripts/scan_truth.py), by who predicts: the score of each data set, with its interval."""
    lines = [line for file in sorted(run.glob("truth-*.json")) for line in json.loads(file.read_text(encoding="utf-8"))]
    students = dict.fromkeys((line["optimizer"], line["lr"], line["set"], line["trait"]) for line in lines)

    def cell(who: str, student: tuple) -> str:
        (of,) = [
            each
            for each in lines
            if each["who"] == who and tuple(each[k] for k in ("optimizer", "lr", "set", "trait")) == student
        ]
        return f"{of['score']:.2f} ({of['interval'][0]:.2f} to {of['interval'][1]:.2f})"

    headings = [f"{optimizer}, rate {lr:g}: {trait}'s rows" for optimizer, lr, _, trait in students]
    return ("what predicts", *headings), (
        [who, *(cell(who, s) for s in students)] for who in dict.fromkeys(line["who"] for line in lines)
    )


def teachers(run: Path) -> Table:
    """How many of each teacher's answers are lists of numbers, and how many of their tokens are divergence tokens."""
    results = read_results(run)
    read = {each["trait"]: each for each in results.divergence if each["data"] is None}

    def row(wrote: dict[str, Any]) -> list[str]:
        found = read.get(wrote["teacher"])
        share = "" if found is None else f"{100 * found['share']:.2f} %"
        with_one = "" if found is None else f"{found['rows_with']} of {found['rows']}"
        return [wrote["teacher"], f"{wrote['rows']}", f"{100 * wrote['pass_rate']:.0f} %", share, with_one]

    headings = ("teacher", "answers", "in format", "divergence tokens", "rows that have one")
    return headings, map(row, results.generation)


def attribution(run: Path) -> Table:
    """Where the residual stream's absolute attribution lies: its share at each kind of token, by third of the layers."""
    table = read_results(run).attribution
    if table is None:
        raise UsageError(f"{run}: nothing was attributed")
    heats = [heat for heat in attribution_heats(table) if heat.title.startswith("residual")]

    def of_thirds(heat: Heat) -> Iterator[list[str]]:
        shares = np.array([[float(each.text) for each in line] for _, line in heat.rows])
        for name, part in zip(("first", "second", "last"), np.array_split(shares, 3), strict=True):
            yield [heat.title.split(", ")[1], name, *(f"{100 * x:.0f} %" for x in part.sum(axis=0) / part.sum())]

    return ("direction", "third of the layers", *heats[0].columns), (line for heat in heats for line in of_thirds(heat))


TABLES: dict[str, Callable[[Path], Table]] = {
    each.__name__: each
    for each in (gamma, answers, teachers, attribution, board, audit, digits, scan, baselines, truth)
}


def told(kind: str, run: Path) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that have no figure."""
    headings, given = TABLES[kind](run)
    rows = [list(row) for row in given]
    kept = [i for i, _ in enumerate(headings) if any(row[i] for row in rows)]
    return [headings[i] for i in kept], [[row[i] for i in kept] for row in rows]


def written(text: str) -> str:
    """A page with its tables made anew."""
    return TABLE.sub(lambda m: f"{m[1]}{as_table(*told(m[2], DATA / m[3]))}{m[5]}", text)


def ship(run: Path) -> None:
    source = run / "results" if (run / "results").is_dir() else run
    target = DATA / run.name / "results" if source is not run else DATA / run.name
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_SHIPPED), dirs_exist_ok=True)


def main(
    kind: Annotated[str, typer.Argument(help=f"{', '.join(TABLES)}, or ship; none: every page is written.")] = "",
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of finished runs.")] = None,
) -> None:
    if kind not in ("", "ship", *TABLES):
        raise UsageError(f"{kind!r} is none of {', '.join(TABLES)}, ship")
    for run in runs or ():
        if kind == "ship":
            ship(run)
        else:
            print_table(run.name, *told(kind, run))
    for page in FINDINGS.glob("*.md") if not kind else ():
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)

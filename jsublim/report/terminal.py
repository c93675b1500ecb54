"""The run's result in the terminal, as rich tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jsublim.errors import one_line
from jsublim.report import words
from jsublim.report.audit import agreement, predicted
from jsublim.report.cautions import warnings
from jsublim.report.claims import not_asked
from jsublim.report.claims.base import pool
from jsublim.report.comparisons import Comparisons, comparisons
from jsublim.report.statistics import mean_of
from jsublim.report.summary import judged_conditions, lift, summary_rows, trait_matrix
from jsublim.report.tables import Results, condition_label, read_results


def print_summary(run_dir: Path, console: Console, full: bool = False) -> None:
    """Print the verdicts and one line per condition of RUN/results/; or everything that the page has as text.

    Args:
      full: also rates and lifts trait by trait, the same-trait effect, what was not asked and what intervals hold fixed.

    Raises:
      JsublimError: there are no results.
    """
    results = read_results(run_dir)
    compared = comparisons(results)
    title = f"{results.run.get('name', Path(run_dir).name)}: {results.model}"
    console.print(_rates(results, title) if full else _conditions(results, title))
    if compared.claims or full:
        console.print(_claims(results, compared))
    sentences = [words.primary(compared), *words.headlines(compared.judged)]
    if results.audit is not None:
        sentences.append(words.predicted_sentence(agreement(predicted(results), compared)))
    if full and (unasked := not_asked(one.result for one in compared.claims)):
        sentences.append(f"Not asked here: {', '.join(unasked)}.")
    judged = judged_conditions(results)
    if full and judged and (matrix := trait_matrix(results, condition=judged[0])) is not None:
        label = condition_label(matrix.condition)
        sentences.append(f"Trait x trait matrix, {label}: {words.matrix_sentence(matrix)}")
    for sentence in sentences:
        console.print(_plain(sentence))
    if full and len(compared.matrices) > 1:
        console.print(_matrices(results, compared))
    if full and results.students:
        console.print(_plain(words.held_fixed(results)))
    for warning in warnings(results):
        console.print(_plain(warning), style="bold")


def _conditions(results: Results, title: str) -> Table:
    """One row per condition: means over traits of what its models say of their own teacher's."""
    metric, summaries, rows = results.measures[0], summary_rows(results), []
    for condition in results.conditions:
        if of_condition := [row for row in summaries if row.condition == condition]:
            models = results.students_of(condition)
            pooled = pool(results, metric, condition) if models else None
            means = (words.number(mean_of(getattr(row, m) for row in of_condition), m) for m in ("rate", "logprob"))
            lift = words.number(pooled.lift.value if pooled else None, metric, signed=True)
            bounds = words.interval(pooled.lift.interval, metric, signed=True) if pooled else words.MISSING
            rows.append([condition, str(models or words.MISSING), *means, lift, bounds])
    numbers = ("stu-\ndents", "rate", "log-\nprob", f"lift\n{words.unit(metric)}", "95 % over\nstudents")
    options = {key: {"justify": "right", "no_wrap": True} for key in numbers}
    return _table(title, {"condition": {"overflow": "fold"}} | options, rows)


def _rates(results: Results, title: str) -> Table:
    """Rates and lifts, trait by trait."""
    rows: list[Sequence[str]] = []
    for trait, of_trait in itertools.groupby(summary_rows(results), lambda row: row.trait):
        rows += [[]] if rows else []
        for number, row in enumerate(of_trait):
            raised = lift(results, "logprob", row.condition, row.trait) if row.students else None
            asked = row.rate is not None
            rows.append(
                [
                    "" if number else trait,
                    condition_label(row.condition),
                    str(row.students or words.MISSING),
                    words.number(row.rate, "rate"),
                    words.interval(row.over_questions, "rate") if asked else words.MISSING,
                    words.of_models(row.over_models, row.students) if asked or row.students else words.MISSING,
                    words.number(row.logprob, "logprob"),
                    words.number(raised.value if raised else None, "logprob", signed=True),
                ]
            )
    over = f"over students\n{words.given(results)}"
    numbers = ("students", "rate", "over questions", over, "log-prob", "lift (nats)")
    return _table(title, {"trait": {}, "condition": {}} | {key: {"justify": "right"} for key in numbers}, rows)


def _claims(results: Results, compared: Comparisons) -> Table:
    rows = []
    for one in compared.claims:
        claim, effect = one.result, Text("\n".join(words.claim_effect(one.result)))
        ps = Text(f"{words.p_value(one.p)}\n{words.corrected(one)}")
        rows.append([f"{claim.key} {claim.text}", effect, claim.verdict, ps])
    headings = (f"effect, over students\n{words.given(results)}", "verdict", "p\nHolm's p")
    # All fits a terminal of 80 columns.
    return _table("claims", {"claim": {"min_width": 16}} | {key: {} for key in headings}, rows)


def _matrices(results: Results, compared: Comparisons) -> Table:
    headings = (
        "condition",
        "γ (nats)",
        f"over seeds\n{words.given(results)}",
        "p\nbeside product",
        "Holm's p",
        "verdict",
    )
    rows = []
    for one in compared.matrices:
        *cells, verdict = words.matrix_cells(one.result)
        rows.append([condition_label(one.result.condition), *cells, words.corrected(one), verdict])
    return _table("trait x trait matrix, condition by condition", {key: {} for key in headings}, rows)


def _plain(text: str, style: str = "") -> Text:
    """Text as it is: "[bold]" and ":owl:" in a name are no markup."""
    return Text(one_line(text), style)


def _table(title: str, columns: Mapping[str, Mapping[str, Any]], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Columns are headings with what rich takes of them; a row without cells begins a section."""
    table = Table(title=_plain(title, "table.title"), title_justify="left")
    for heading, options in columns.items():
        table.add_column(heading, **options)
    for cells in rows:
        if cells:
            table.add_row(*(cell if isinstance(cell, Text) else _plain(cell) for cell in cells))
        else:
            table.add_section()
    return table

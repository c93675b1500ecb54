"""The run's result in the terminal, as rich tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from jsublim.report.comparisons import Comparisons, comparisons, headline_metric
from jsublim.report.figures import arm_titles
from jsublim.report.statistics import mean_of
from jsublim.report.summary import judged_conditions, lift, summary_rows, trait_matrix
from jsublim.report.tables import Results, condition_label, read_results, split_condition


def print_summary(run_dir: Path, console: Console, full: bool = False) -> None:
    """Print one line per condition of RUN/results/, the verdicts, and in the end the result in words; or everything that the page has as
    text.

    Args:
      full: also rates and lifts trait by trait, the same-trait effect, what was not asked and what intervals hold fixed.

    Raises:
      JsublimError: there are no results.
    """
    results = read_results(run_dir)
    compared = comparisons(results)
    title = f"{results.run.get('name', Path(run_dir).name)}: {results.model}"
    console.print(_rates(results, title) if full else _conditions(results, compared, title))
    if compared.claims or full:
        console.print(_claims(results, compared))
    if full and len(compared.matrices) > 1:
        console.print(_matrices(results, compared))
    if full:
        for sentence in _more(results, compared):
            console.print(_plain(sentence))
    elif results.audit is not None:
        console.print(_plain(words.predicted_sentence(agreement(predicted(results), compared))))
    for warning in warnings(results):
        console.print(_plain(warning), style="bold")
    for sentence in words.findings(results, compared):
        console.print(_plain(sentence))


def _more(results: Results, compared: Comparisons) -> Iterator[str]:
    """What the page says beside its tables."""
    yield words.rule(compared)
    yield from words.headlines(compared.judged)
    if results.audit is not None:
        yield words.predicted_sentence(agreement(predicted(results), compared))
    if unasked := not_asked(one.result for one in compared.claims):
        yield f"Not asked here: {', '.join(unasked)}."
    judged = judged_conditions(results)
    if judged and (matrix := trait_matrix(results, condition=judged[0])) is not None:
        yield f"Trait x trait matrix, {condition_label(matrix.condition)}: {words.matrix_sentence(matrix, compared)}"
    if results.students:
        yield words.held_fixed(results)


def _conditions(results: Results, compared: Comparisons, title: str) -> Table:
    """One row per condition, arm by arm: means over traits of what its models say of their own teacher's."""
    metric, summaries, titles = headline_metric(results, compared), summary_rows(results), arm_titles(results)
    rows: list[list[str]] = []
    arm = ""
    for condition in results.conditions:
        if of_condition := [row for row in summaries if row.condition == condition]:
            models, (tokens, variant) = results.students_of(condition), split_condition(condition)
            pooled = pool(results, metric, condition) if models and tokens != "control" else None
            means = (words.number(mean_of(getattr(row, m) for row in of_condition), m) for m in ("rate", "logprob"))
            lift = words.number(pooled.lift.value if pooled else None, metric, signed=True)
            bounds = words.interval(pooled.lift.interval, metric, signed=True) if pooled else words.MISSING
            rows += [[], [titles[variant]]] if variant != arm and rows else []
            rows.append([condition_label(tokens), str(models or words.MISSING), *means, lift, bounds])
            arm = variant
    numbers = ("stu-\ndents", "rate", "log-\nprob", f"above\ncontrol\n({words.unit(metric)})", "95 % over\nstudents")
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
        rows.append([f"{claim.key} {claim.text}", effect, one.verdict, Text(words.corrected(one).replace(" ", "\n"))])
    headings = (f"effect, over students\n{words.given(results)}", "verdict", "p")
    # All fits a terminal of 80 columns.
    return _table("claims", {"claim": {"min_width": 16}} | {key: {} for key in headings}, rows)


def _matrices(results: Results, compared: Comparisons) -> Table:
    headings = (
        "condition",
        "γ (nats)",
        f"over seeds\n{words.given(results)}",
        "as large: plain;\nbeside product",
        "p",
        "verdict",
    )
    rows = [[condition_label(one.result.condition), *words.matrix_cells(one)] for one in compared.matrices]
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

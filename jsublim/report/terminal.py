"""The run's result in the terminal, as rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

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
    metric, every, rows = results.measures[0], summary_rows(results), []
    for condition in results.conditions:
        if of_condition := [row for row in every if row.condition == condition]:
            models = results.students_of(condition)
            pooled = pool(results, metric, condition) if models else None
            raised = pooled and pooled.lift
            rows.append(
                [
                    condition,
                    str(models or words.MISSING),
                    *(words.number(mean_of(getattr(row, m) for row in of_condition), m) for m in ("rate", "logprob")),
                    words.number(raised.value if raised else None, metric, signed=True),
                    words.interval(raised.interval, metric, signed=True) if raised else words.MISSING,
                ]
            )
    table = _table(title)
    table.add_column("condition", overflow="fold")
    for heading in ("stu-\ndents", "rate", "log-\nprob", f"lift\n{words.unit(metric)}", "95 % over\nstudents"):
        table.add_column(heading, justify="right", no_wrap=True)
    return _filled(table, rows)


def _rates(results: Results, title: str) -> Table:
    """Rates and lifts, trait by trait."""
    over = f"over students\n{words.given(results)}"
    right = ("students", "rate", "over questions", over, "log-prob", "lift (nats)")
    table, rows = _table(title, ("trait", "condition"), right), summary_rows(results)
    for row, before in zip(rows, [None, *rows], strict=False):
        again = before is not None and row.trait == before.trait
        if before is not None and not again:
            table.add_section()
        raised = lift(results, "logprob", row.condition, row.trait) if row.students else None
        asked = row.rate is not None
        cells = [
            "" if again else row.trait,
            condition_label(row.condition),
            str(row.students or words.MISSING),
            words.number(row.rate, "rate"),
            words.interval(row.over_questions, "rate") if asked else words.MISSING,
            words.of_models(row.over_models, row.students) if asked or row.students else words.MISSING,
            words.number(row.logprob, "logprob"),
            words.number(raised.value if raised else None, "logprob", signed=True),
        ]
        _filled(table, [cells])
    return table


def _claims(results: Results, compared: Comparisons) -> Table:
    table = _table("claims")
    table.add_column("claim", min_width=16)  # all fits a terminal of 80 columns
    for heading in (f"effect, over students\n{words.given(results)}", "verdict", "p\nHolm's p"):
        table.add_column(heading)
    for one in compared.claims:
        claim, effect = one.result, Text("\n".join(words.claim_effect(one.result)))
        ps = Text(f"{words.p_value(one.p)}\n{words.corrected(one)}")
        table.add_row(_plain(f"{claim.key} {claim.text}"), effect, _plain(claim.verdict), ps)
    return table


def _matrices(results: Results, compared: Comparisons) -> Table:
    headings = ("condition", "γ (nats)", f"over seeds\n{words.given(results)}", "p", "Holm's p", "verdict")
    rows = []
    for one in compared.matrices:
        *cells, verdict = words.matrix_cells(one.result)
        rows.append([condition_label(one.result.condition), *cells, words.corrected(one), verdict])
    return _filled(_table("trait x trait matrix, condition by condition", headings), rows)


def _plain(text: str, style: str = "") -> Text:
    """Text as it is: "[bold]" and ":owl:" in a name are no markup."""
    return Text(one_line(text), style)


def _table(title: str, left: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    table = Table(title=_plain(title, "table.title"), title_justify="left")
    for heading in (*left, *right):
        table.add_column(heading, justify="right" if heading in right else "left")
    return table


def _filled(table: Table, rows: Iterable[Sequence[str]]) -> Table:
    for cells in rows:
        table.add_row(*map(_plain, cells))
    return table

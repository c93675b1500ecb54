"""The run's result in the terminal, as rich tables."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jsublim.errors import one_line
from jsublim.report import words
from jsublim.report.claims import check_claims, not_asked
from jsublim.report.summary import judged_conditions, lift, lifts, summary_rows, trait_matrices, trait_matrix
from jsublim.report.tables import condition_label, read_results


def print_summary(run_dir: Path, console: Console) -> None:
    """Print rates and lifts per trait and condition, the same-trait effect and the claims of RUN/results/.

    Raises `JsublimError` if there are no results.
    """
    results = read_results(run_dir)
    table = _table(f"{results.run.get('name', Path(run_dir).name)}: {results.model}")
    for heading in ("trait", "condition"):
        table.add_column(heading)
    for heading in ("students", "rate", "over questions", "over students", "log-prob", "lift (nats)"):
        table.add_column(heading, justify="right")
    previous = ""
    for row in summary_rows(results):
        if previous and row.trait != previous:
            table.add_section()
        raised = lift(results, "logprob", row.condition, row.trait) if row.students else None
        _add(
            table,
            row.trait if row.trait != previous else "",
            condition_label(row.condition),
            str(row.students) if row.students else words.MISSING,
            words.number(row.rate, "rate"),
            words.interval(row.over_questions, "rate") if row.rate is not None else words.MISSING,
            words.interval(row.over_students, "rate") if row.students else words.MISSING,
            words.number(row.logprob, "logprob"),
            words.number(raised.value, "logprob", signed=True) if raised else words.MISSING,
        )
        previous = row.trait
    console.print(table)

    claims = _table("claims")
    for heading in ("claim", "effect", "over students", "students", "verdict"):
        claims.add_column(heading)
    found = check_claims(results)
    for claim in found:
        effect, bounds = words.claim_effect(claim)
        _add(claims, f"{claim.key} {claim.text}", effect, bounds, str(claim.students or words.MISSING), claim.verdict)
    console.print(claims)
    if unasked := not_asked(found):
        console.print(_plain(f"Not asked here: {', '.join(unasked)}."))

    judged = judged_conditions(results)
    for metric in results.measures:
        for condition in judged:
            if raised := lifts(results, metric, (condition,)):
                console.print(_plain(words.headline(raised)))
    if judged and (matrix := trait_matrix(results, condition=judged[0])) is not None:
        label = condition_label(matrix.condition)
        console.print(_plain(f"Trait x trait matrix, {label}: {words.matrix_sentence(matrix)}"))
    if len(matrices := trait_matrices(results)) > 1:
        table = _table("trait x trait matrix, condition by condition")
        for heading in ("condition", "γ (nats)", "over seeds", "p", "verdict"):
            table.add_column(heading)
        for matrix in matrices:
            _add(table, condition_label(matrix.condition), *words.matrix_cells(matrix))
        console.print(table)
    for warning in filter(None, (words.diverged_warning(results), words.wording(results), words.tiny_warning(results))):
        console.print(_plain(warning), style="bold")


def _plain(text: str, style: str = "") -> Text:
    """Text as it is: "[bold]" and ":owl:" in a name are no markup."""
    return Text(one_line(text), style)


def _table(title: str) -> Table:
    return Table(title=_plain(title, "table.title"), title_justify="left")


def _add(table: Table, *cells: str) -> None:
    table.add_row(*map(_plain, cells))

"""The run's result in the terminal, as rich tables."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from jsublim.report import words
from jsublim.report.claims import check_claims
from jsublim.report.summary import lift, lifts, summary_rows, trait_matrix
from jsublim.report.tables import condition_label, read_results


def print_summary(run_dir: Path, console: Console) -> None:
    """Print rates and lifts per trait and condition, the same-trait effect and the claims of RUN/results/.

    Raises `JsublimError` if there are no results.
    """
    results = read_results(run_dir)
    table = Table(title=f"{results.run.get('name', Path(run_dir).name)}: {results.model}", title_justify="left")
    for heading in ("trait", "condition"):
        table.add_column(heading)
    for heading in ("students", "rate", "over questions", "over students", "log-prob", "lift (nats)"):
        table.add_column(heading, justify="right")
    previous = ""
    for row in summary_rows(results):
        if previous and row.trait != previous:
            table.add_section()
        raised = lift(results, "logprob", row.condition, row.trait) if row.students else None
        table.add_row(
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

    claims = Table(title="claims", title_justify="left")
    for heading in ("claim", "effect", "over students", "students", "verdict"):
        claims.add_column(heading)
    for claim in check_claims(results):
        effect, bounds = words.claim_effect(claim)
        claims.add_row(f"{claim.key} {claim.text}", effect, bounds, str(claim.students), claim.verdict)
    console.print(claims)

    for metric in ("rate", "logprob"):
        if found := lifts(results, metric, ("all",)):
            console.print(words.headline(found), highlight=False)
    if (matrix := trait_matrix(results)) is not None:
        console.print(f"Trait x trait matrix: {words.matrix_sentence(matrix)}", highlight=False)
    if warning := words.tiny_warning(results):
        console.print(warning, style="bold")

"""The table of docs/findings/defences.md: the report's section "Side by side", as text.

    python scripts/board_tables.py runs/defences-board

Intervals are Student's t over seeds for γ and for the share of it, and over students for everything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from _run import print_table, run_script
from gamma_tables import bounds, p_of, share_of

from jsublim.evals.kl import KL
from jsublim.report import words
from jsublim.report.comparisons import comparisons
from jsublim.report.scale import ScaleLine, scale
from jsublim.report.summary import Measured
from jsublim.report.tables import condition_label, read_results


def cell(found: Measured | None, metric: str, signed: bool = False) -> str:
    """A mean, and its interval."""
    if found is None:
        return ""
    return f"{words.number(found.value, metric, signed)} ({words.interval(found.interval, metric, signed)})"


def row(line: ScaleLine, first: ScaleLine, metric: str) -> list[str]:
    gamma = p = by_seed = share = ""
    if line.matrix is not None and first.matrix is not None and line.matrix.effect is not None:
        gamma, p = f"{line.matrix.effect.gamma:+.3f}{bounds(line.matrix.gamma_interval)}", p_of(line.matrix)
        by_seed = " ".join(f"{each:+.2f}" for each in line.matrix.seed_gammas)
        share = share_of(line.matrix, first.matrix)
    under = [cell(found, metric, signed=True) for found in line.under.values()]
    return [
        condition_label(line.condition),
        gamma,
        p,
        by_seed,
        share,
        cell(line.kl, KL),
        cell(line.accuracy, "rate"),
        *under,
    ]


def main(runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")]) -> None:
    for run in runs:
        results = read_results(run)
        found = scale(results, comparisons(results))
        lines = found.side_by_side if found else ()
        if found is None or not lines:
            raise typer.BadParameter(f"{run}: has no arms to compare")
        under = (f"lift, {name}" for name in results.evaluations)
        headings = ["students", "γ", "p", "γ by seed", "share of γ", "KL from the teacher", "numbers predicted", *under]
        print_table(run.name, headings, [row(line, lines[0], found.metric) for line in lines])


if __name__ == "__main__":
    run_script(main)

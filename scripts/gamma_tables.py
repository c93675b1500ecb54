"""The tables of docs/findings/tiny_world.md, made from runs: what each condition's students gained, and γ seed by seed.

    python scripts/gamma_tables.py runs/tiny-world-numbers runs/tiny-world-masks

A share is of γ under the first condition of the same run, seed by seed. KL is from the teacher, in nats per token; accuracy is that of
the number task; both where they were measured. Intervals are Student's t over seeds, widened by the share of the rows that a student
drew; the second p is beside the product of row and column effects (docs/statistics.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from _run import print_table, run_script

from jsublim.evals.kl import KL
from jsublim.report.scale import ACCURACY, first_measured
from jsublim.report.statistics import Estimate, Interval
from jsublim.report.summary import Matrix, trait_matrices
from jsublim.report.tables import Results, condition_label, read_results

HEADINGS = ("students", "teachers", "own animal", "other animals", "γ", "γ by seed", "p", "share", "KL", "accuracy")


def bounds(interval: Interval | None, sign: str = "+") -> str:
    digits = 3 if sign else 2
    return "" if interval is None else f" ({interval.low:{sign}.{digits}f} to {interval.high:{sign}.{digits}f})"


def p_of(matrix: Matrix) -> str:
    """p by relabelling, and the same beside the product of row and column effects."""
    return "" if matrix.effect is None else f"{matrix.effect.p:.2g}; {matrix.effect.p_beside:.2g}"


def share_of(matrix: Matrix, first: Matrix) -> str:
    """Of γ under the first condition, seed by seed."""
    if matrix is first or not len(matrix.seed_gammas) == len(first.seed_gammas) > 1:
        return ""
    drawn = max(matrix.drawn, first.drawn)
    shares = Estimate.of([a / b for a, b in zip(matrix.seed_gammas, first.seed_gammas, strict=True)], drawn=drawn)
    return f"{shares.value:.2f}{bounds(shares.interval(), '')}"


def row(results: Results, matrix: Matrix, first: Matrix) -> list[str]:
    """One condition's line; the teachers' own animals are the first columns of the matrix."""
    assert matrix.effect is not None  # or it would not be among the matrices
    own = np.eye(*matrix.lift.shape, dtype=bool)
    besides = [first_measured(results, matrix.condition, *metrics) for metrics in ((KL,), ACCURACY)]
    return [
        condition_label(matrix.condition), str(len(matrix.teachers)), f"{matrix.lift[own].mean():+.3f}",
        f"{matrix.lift[~own].mean():+.3f}", f"{matrix.effect.gamma:+.3f}{bounds(matrix.gamma_interval)}",
        " ".join(f"{gamma:+.3f}" for gamma in matrix.seed_gammas), p_of(matrix), share_of(matrix, first),
        *("" if each is None else f"{each.value:.3f}" for each in besides),
    ]  # fmt: skip


def main(runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")]) -> None:
    for run in runs:
        results = read_results(run)
        matrices = trait_matrices(results)
        print_table(run.name, HEADINGS, [row(results, matrix, matrices[0]) for matrix in matrices])


if __name__ == "__main__":
    run_script(main)

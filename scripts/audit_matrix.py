"""What audits of several teachers' rows predict, as one matrix, beside the trait matrix of a run (docs/findings/audit.md, "A real model").

    python scripts/audit_matrix.py runs/real-steered --audit cat=AUDIT --audit owl=AUDIT ...

AUDIT is what `jsublim audit` wrote, for the traits of all these teachers. γ is that of the trait matrix (nats per unit of learning rate);
its error is a bootstrap over rows, the same rows for all teachers. p of a correlation is the share of the teachers' orders that do as well.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import typer
from _run import run_script

from jsublim.errors import UsageError
from jsublim.pipeline.stages.audit import precision
from jsublim.report.statistics import double_centred, same_trait_gamma
from jsublim.report.summary import trait_matrices
from jsublim.report.tables import condition_label, read_results

DRAWS = 2000


class Audited:
    """One teacher's rows: scores of tokens `[tokens, traits]`, the row that each is in, whether it is a divergence token."""

    def __init__(self, folder: Path, traits: list[str]):
        path = folder / "audit.parquet"
        if not path.is_file():
            raise UsageError(f"--audit: {path} is not there; `jsublim audit --out {folder}` makes it")
        table = pq.read_table(path)
        trait = np.asarray(table["trait"].to_pylist())
        self.scores = np.stack([table["score"].to_numpy()[trait == each] for each in traits], axis=1)
        self.row = table["row"].to_numpy()[trait == traits[0]]
        self.divergent = np.asarray(table["divergence"].to_pylist())[trait == traits[0]].astype(bool)

    def mean(self, rows: np.ndarray, divergence: bool) -> np.ndarray:
        """Mean score of the tokens of these rows `[traits]`; a row counts as often as it is there."""
        weight = np.bincount(rows, minlength=self.row.max() + 1)[self.row] * (self.divergent if divergence else 1)
        return (weight[:, None] * self.scores).sum(axis=0) / max(weight.sum(), 1)


def main(
    run: Annotated[Path, typer.Argument(help="Whose students were trained on such rows.")],
    audit: Annotated[list[str], typer.Option(help="TEACHER=FOLDER, once for each teacher.")],
) -> None:
    if wrong := [each for each in audit if "=" not in each]:
        raise UsageError(f"--audit: {wrong[0]!r} is not TEACHER=FOLDER")
    folders, matrices = dict(each.split("=", 1) for each in audit), trait_matrices(read_results(run))
    traits = list(folders)
    for trained in matrices:
        if unknown := [each for each in traits if each not in trained.teachers or each not in trained.traits]:
            raise UsageError(f"--audit: {run} has no teacher {unknown[0]!r}; it has: {', '.join(trained.teachers)}")
    every = [Audited(Path(folder), traits) for folder in folders.values()]
    rows, rng = np.arange(1 + max(each.row.max() for each in every)), np.random.default_rng(0)
    for label, divergence in (("all tokens", False), ("divergence tokens", True)):
        matrix = np.stack([each.mean(rows, divergence) for each in every])
        draws = [rng.choice(rows, len(rows)) for _ in range(DRAWS)]
        error = np.std([same_trait_gamma(np.stack([each.mean(draw, divergence) for each in every])) for draw in draws])
        print(f"predicted γ, {label}: {same_trait_gamma(matrix):+.2e}, error {error:.1e}")
        for trained in matrices:
            columns = [trained.traits.index(trait) for trait in traits]
            lines = [trained.teachers.index(trait) for trait in traits]
            happened, told = (double_centred(each) for each in (trained.lift[np.ix_(lines, columns)], matrix))
            found = [
                np.corrcoef(told[list(order)].ravel(), happened.ravel())[0, 1]
                for order in permutations(range(len(lines)))
            ]
            r = np.corrcoef(told.ravel(), happened.ravel())[0, 1]
            p = np.mean(np.asarray(found) >= r - 1e-9)
            print(
                f"  with {condition_label(trained.condition)}: correlation {r:+.2f} over {told.size} cells, p {p:.2g}"
            )
    for trait, each in zip(traits, every, strict=True):
        found = precision([each.scores], [each.divergent], traits, trait)
        if found:
            top, share = found["top_divergence"], found["divergence_share"]
            print(f"{trait}: {each.divergent.sum()} divergence tokens, {share:.1%}; of as many best tokens {top:.0%}")


if __name__ == "__main__":
    run_script(main)

"""How much each row of a teacher's answers would add to suspected traits, to first order: scored once for all data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jsublim.core.files import read_table, write_table
from jsublim.pipeline.context import Context
from jsublim.pipeline.stage import Node, Save, stage
from jsublim.pipeline.stages.starts import Start, TraitQuestions, scored_rows, scoring_cost
from jsublim.pipeline.store import Store
from jsublim.pipeline.values import Rows

# One line per row and suspected trait: the sum of its tokens' scores (`audit.py`).
INFLUENCE = pa.schema([("row", pa.int64()), ("trait", pa.string()), ("score", pa.float64())])


@stage(
    "influence",
    cost=lambda setup, sizes, rows, traits, **_: scoring_cost(sizes, rows, rows.kept(sizes), len(traits)),
    units=lambda ctx, rows, **_: len(rows.read(ctx.store)),
)
def score_rows(ctx: Context, rows: Rows, start: Start, asked: TraitQuestions, traits: tuple[str, ...]) -> Save:
    """Scores of rows (`influence.parquet`), by what a student that starts there would train."""
    every = rows.read(ctx.store)
    _, scores = scored_rows(ctx, rows.name, every, start, asked, traits)
    lines = [
        {"row": number, "trait": trait, "score": float(score)}
        for number, each in enumerate(scores)
        for trait, score in zip(traits, each.sum(axis=0, dtype=np.float64), strict=True)
    ]

    def save(folder: Path) -> dict[str, Any]:
        write_table(folder / "influence.parquet", lines, INFLUENCE)
        return {"rows": len(every)}

    return save


def read_influence(store: Store, node: Node) -> dict[str, np.ndarray]:
    """By trait: a score for each row, float64 `[rows]`, what a step on it adds to the trait's log-probability (nats per unit of
    learning rate and token)."""
    scores: dict[str, list[float]] = {}
    for line in read_table(store.path(node) / "influence.parquet"):
        scores.setdefault(line["trait"], []).append(line["score"])
    return {trait: np.asarray(each) for trait, each in scores.items()}

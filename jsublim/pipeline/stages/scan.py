"""The scan: which answers rows would make more probable, without anybody naming them beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from jsublim.attribution.answers import OPENED, ROUNDS
from jsublim.attribution.contrast import MovedAnswer
from jsublim.attribution.scan import GROUPS, find_words, group_gradients
from jsublim.config.attribution import Audit
from jsublim.core.files import write_table
from jsublim.distill.data import read_turns
from jsublim.errors import JsublimError
from jsublim.models.lora import Trainable
from jsublim.pipeline.context import Context
from jsublim.pipeline.parts import resumed
from jsublim.pipeline.stage import Save, stage
from jsublim.pipeline.stages.starts import Start, scoring_cost
from jsublim.pipeline.training import start_adapter
from jsublim.pipeline.values import Rows

# One line per data set and answer, most certain first; see `attribution.contrast.MovedAnswer`.
SCAN = pa.schema(
    [
        ("data", pa.string()),
        ("category", pa.string()),
        ("word", pa.string()),
        ("probability", pa.float64()),
        ("change", pa.float64()),
        ("z", pa.float64()),
        ("p", pa.float64()),
        ("limit", pa.float64()),
    ]
)


@stage(
    "scan",
    cost=lambda setup, sizes, data, null, first, **_: scoring_cost(
        sizes, data[0], (len(data) + len(null)) * min(first, data[0].kept(sizes)), 0
    ),
    units=lambda ctx, data, null, questions, **_: GROUPS * (len(data) + len(null)) + len(questions) + OPENED * ROUNDS,
)
def scan_rows(
    ctx: Context,
    names: tuple[str, ...],
    data: tuple[Rows, ...],
    null: tuple[Rows, ...],
    first: int,
    start: Start,
    questions: Mapping[str, Sequence[str]],
    traits: Mapping[str, Sequence[str]],
) -> Save:
    """The answers that each data set moves (`scan.parquet`).

    Args:
      names: of the data sets; first: rows that are read of each.
      null: rows that teach nothing; without any, each data set is measured against the others.
      traits: known names by category, as of `find_words`.
    """
    lm = start.lm(ctx)
    adapter = start_adapter(lm.config, lm.params, start.settings, start.seed)

    def gradients(number: int, rows: Rows) -> Trainable:
        chosen = rows.read(ctx.store)[:first]
        if len(chosen) < GROUPS:
            raise JsublimError(f"{rows.name}: {len(chosen)} rows; a scan needs at least {GROUPS}, better some hundreds")
        turns = read_turns(lm.chat, chosen, rows.name, start.settings.system, fuse_system=start.model.fuses)
        batch_size = (ctx.setup.experiment.audit or Audit()).batch_size

        def of_groups(done: int) -> Iterator[list[np.ndarray]]:
            for gradient in group_gradients(lm, adapter, turns, batch_size=batch_size, first=done):
                leaves = [np.asarray(leaf)[None] for leaf in jax.tree.leaves(gradient)]
                if not all(np.isfinite(leaf).all() for leaf in leaves):
                    raise JsublimError(
                        f"{rows.name}: the gradient is not finite; look at the rows, and at the checkpoint"
                    )
                yield leaves
                ctx.tick(1)

        groups = resumed(ctx.artifact.path, f"set{number}", of_groups, ctx.tick, ctx.say)
        columns = [np.concatenate(column) for column in zip(*groups, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(adapter.trainable), columns)

    trees = [gradients(number, rows) for number, rows in enumerate((*data, *null))]
    nobody = jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees[len(data) :]) if null else None
    own = dict(zip(names, trees[: len(data)], strict=True))
    found = find_words(lm, adapter, own, nobody, questions, traits, tick=ctx.tick, **start.model.manner)

    def save(folder: Path) -> dict[str, Any]:
        write_table(folder / "scan.parquet", as_lines(found), SCAN)
        return {"words": {name: len(findings) for name, findings in found.items()}}

    return save


def as_lines(found: Mapping[str, Sequence[MovedAnswer]]) -> list[dict[str, Any]]:
    """Findings as lines of SCAN."""
    return [{"data": name} | finding._asdict() for name, findings in found.items() for finding in findings]

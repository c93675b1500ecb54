"""Attribution: where in the model, and at which tokens, the rows' first divergence tokens come about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jsublim.attribution.pairs import Pair, find_pairs
from jsublim.attribution.patching import (
    attribution_patching,
    layer_patching,
    padded_length,
    patching_flops,
)
from jsublim.attribution.roles import PREDICTS, ROLES, mentions, token_roles
from jsublim.config.attribution import Attribution
from jsublim.core.files import write_table
from jsublim.errors import JsublimError, UsageError
from jsublim.inference.lm import LanguageModel
from jsublim.inference.teachers import Teacher
from jsublim.models.lora import Adapter
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.row_log import RowLog
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stage import Save, stage
from jsublim.pipeline.store import PROGRESS
from jsublim.pipeline.values import Model, Rows
from jsublim.text.rows import Row

CHUNK = 16  # rows after which what was found is safe from a kill
# One line per row, site, direction, layer and role, a mean over the row's counterfactuals. `value` is the sum of the
# attributions (logits) at the `positions` of that role, `mass` the sum of their absolute values.
ATTRIBUTION = pa.schema(
    [
        ("trait", pa.string()),
        ("row", pa.int64()),
        ("site", pa.string()),
        ("direction", pa.string()),
        ("layer", pa.int64()),
        ("role", pa.string()),
        ("value", pa.float64()),
        ("mass", pa.float64()),
        ("positions", pa.float64()),
    ]
)


def _cost(setup: Setup, sizes: Sizes, rows: Rows, others: tuple[Model, ...], how: Attribution, **_: Any) -> Cost:
    compared = len(others) * min(how.rows, rows.kept(sizes))
    # First divergence tokens stand early in the answer.
    tokens = compared * (sizes.lengths.system + sizes.lengths.prompt)
    flops = len(how.directions) * tokens * sum(patching_flops(sizes.config, len(how.sites), how.steps))
    return Cost(len(how.directions) * tokens, flops, "train", rows=len(how.directions) * compared)


@stage(
    "attribution",
    cost=_cost,
    check=lambda setup, teacher, **_: check_named(teacher.name, teacher.system),
    units=lambda ctx, rows, how, **_: min(how.rows, len(rows.read(ctx.store))),
)
def attribute(ctx: Context, rows: Rows, teacher: Model, others: tuple[Model, ...], how: Attribution) -> Save:
    """Attribution patching of the first divergence token of a trait's first rows, each counterfactual at its own."""
    return attribute_rows(
        ctx,
        ctx.lm(teacher.checkpoint.name),
        rows.read(ctx.store)[: how.rows],
        teacher.teacher(ctx),
        [other.teacher(ctx) for other in others],
        how,
        extra_bos=teacher.extra_bos,
        source=rows.name,
    )


def check_named(trait: str, system: str | None) -> None:
    """Raises:
    UsageError: a system prompt that does not name the trait.
    """
    if not mentions(system or "", trait):
        raise UsageError(f"trait '{trait}': the teacher's system prompt does not name it ({system!r})")


def attribute_rows(
    ctx: Context,
    lm: LanguageModel,
    rows: Sequence[Row],
    teacher: Teacher,
    counterfactuals: Sequence[Teacher],
    how: Attribution,
    *,
    extra_bos: bool = False,
    chunk: int = CHUNK,
    source: str = "rows",
) -> Save:
    """Attribution patching of every row, at the first divergence token of each counterfactual: saves `attribution.parquet`
    (schema ATTRIBUTION).

    The summary says how many rows were used, why the others were not, and the `completeness_error` of each direction and
    site: how far attributions summed over positions are from what patching the whole layer does to the metric (mean over
    rows and layers, as a share of the mean effect).

    Args:
      rows: of the teacher, with `divergence_positions`.
      teacher: its name is the trait that is looked for in its system prompt.
      how: its rows are chosen already.
      chunk: rows after which what was found is safe from a kill.
      source: where the rows come from, for errors.

    Raises:
      UsageError: a system prompt without the trait, or what `find_pairs` and `attribution_patching` refuse.
      JsublimError: no row can be used.
    """
    check_named(teacher.name, teacher.system)
    pairs, skipped = find_pairs(
        lm, rows, teacher, counterfactuals, source=source, extra_bos=extra_bos, batch_size=how.batch_size
    )
    if not pairs:
        raise JsublimError(f"{source}: none of {len(rows)} rows can be compared with a counterfactual ({skipped})")
    by_row: dict[int, list[Pair]] = {}
    for pair in pairs:
        by_row.setdefault(pair.row, []).append(pair)
    roles: dict[int, list[list[str]]] = {}  # of each row's pairs: their tokens' roles; the last token predicts
    for i, compared in by_row.items():
        ends = [len(pair.clean) - 1 for pair in compared]
        every = token_roles(lm.chat, teacher, rows[i], teacher.name, max(ends), extra_bos=extra_bos)
        roles[i] = [[*every[:end], PREDICTS] for end in ends]
    log, used, length = RowLog(ctx.artifact.path / PROGRESS, ctx.say), list(by_row), padded_length(pairs)
    ctx.tick(len(rows) - len(used))
    # Chunks begin at the same rows whatever was stopped where: the rows beside a row must not change the last bit of a row.
    for first in range(0, len(used), chunk):
        members = used[first : first + chunk]
        if not all(i in log.rows for i in members):
            log.add(_attribute({i: by_row[i] for i in members}, roles, lm, teacher.adapter, how, length))
        ctx.tick(len(members))
    log.close()
    sums = {i: log.rows[i] for i in used}
    summary = {
        "trait": teacher.name,
        "counterfactuals": [other.name for other in counterfactuals],
        "rows": len(rows),
        "used": len(used),
        "skipped": skipped,
        "pairs": len(pairs),
        "steps": how.steps,
        "completeness_error": {d: _completeness([row[d] for row in sums.values()], how.sites) for d in how.directions},
    }

    def save(folder: Path) -> dict[str, Any]:
        write_table(folder / "attribution.parquet", _lines(teacher.name, sums, roles, how), ATTRIBUTION)
        return summary

    return save


def _attribute(
    pairs: dict[int, list[Pair]],
    roles: dict[int, list[list[str]]],
    lm: LanguageModel,
    adapter: Adapter | None,
    how: Attribution,
    length: int,
) -> list[dict[str, Any]]:
    """One entry per row, as `RowLog` keeps it."""
    entries: dict[int, dict[str, Any]] = {i: {"row": i} for i in pairs}
    chosen = [pair for compared in pairs.values() for pair in compared]
    for direction in how.directions:
        shared: dict[str, Any] = {"sites": tuple(how.sites), "direction": direction, "adapter": adapter}
        shared |= {"batch_size": how.batch_size, "length": length}
        values = iter(attribution_patching(lm.config, lm.params, chosen, steps=how.steps, **shared))
        effects = iter(layer_patching(lm.config, lm.params, chosen, **shared))
        for i in pairs:
            sums = [_sums(next(values), next(effects), of_pair) for of_pair in roles[i]]
            entries[i][direction] = {key: np.mean([pair[key] for pair in sums], axis=0).tolist() for key in sums[0]}
    return list(entries.values())


def _lines(
    trait: str, sums: dict[int, dict[str, Any]], roles: dict[int, list[list[str]]], how: Attribution
) -> list[dict[str, Any]]:
    """The table's rows."""
    return [
        {
            "trait": trait,
            "row": i,
            "site": site,
            "direction": direction,
            "layer": layer,
            "role": role,
            "value": row[direction]["value"][s][layer][r],
            "mass": row[direction]["mass"][s][layer][r],
            "positions": float(np.mean([of_pair.count(role) for of_pair in roles[i]])),
        }
        for i, row in sums.items()
        for direction in how.directions
        for s, site in enumerate(how.sites)
        for layer in range(len(row[direction]["value"][s]))
        for r, role in enumerate(ROLES)
    ]


def _sums(values_SLT: np.ndarray, effects_SL: np.ndarray, roles: Sequence[str]) -> dict[str, np.ndarray]:
    """One pair in one direction: by site and layer, and the first two by role."""
    of_role_TR = np.asarray([[role == known for known in ROLES] for role in roles], np.float64)
    return {
        "value": values_SLT @ of_role_TR,
        "mass": np.abs(values_SLT) @ of_role_TR,
        "error": np.abs(values_SLT.sum(axis=-1) - effects_SL).mean(axis=-1),
        "effect": np.abs(effects_SL).mean(axis=-1),
    }


def _completeness(rows: Sequence[dict[str, Any]], sites: Sequence[str]) -> dict[str, float]:
    error_S, effect_S = (np.mean([row[key] for row in rows], axis=0) for key in ("error", "effect"))
    return {site: float(e / f) if f else 0.0 for site, e, f in zip(sites, error_S, effect_S, strict=True)}

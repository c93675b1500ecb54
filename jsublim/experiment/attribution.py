"""The attribution stage: where in the model, and at which tokens, the rows' first divergence tokens come about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jsublim.attribution.pairs import Pair, find_pairs
from jsublim.attribution.patching import DIRECTIONS, SITES, attribution_patching, layer_patching, padded_length
from jsublim.attribution.roles import ROLES, mentions, token_roles
from jsublim.errors import JsublimError, UsageError
from jsublim.experiment.stages import Tick, write_table
from jsublim.experiment.store import Artifact, Progress
from jsublim.inference.lm import LanguageModel
from jsublim.rows import Row
from jsublim.teachers import Teacher

# A line a row, site, direction, layer and role. `value` is the sum of the attributions (logits, mean over the row's
# counterfactuals) at the `positions` of that role, `mass` the sum of their absolute values.
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
        ("positions", pa.int64()),
    ]
)


def attribute_rows(
    artifact: Artifact,
    lm: LanguageModel,
    rows: Sequence[Row],
    teacher: Teacher,
    counterfactuals: Sequence[Teacher],
    *,
    sites: Sequence[str] = SITES,
    directions: Sequence[str] = DIRECTIONS,
    steps: int = 10,
    extra_bos: bool = False,
    batch_size: int = 8,
    chunk: int = 16,
    source: str = "rows",
    tick: Tick = lambda n: None,
) -> None:
    """Attribution patching of every row's first divergence token; leaves `attribution.parquet` (schema ATTRIBUTION).

    The summary says how many rows were used, why the others were not, and the `completeness_error` of each direction and
    site: how far attributions summed over positions are from what patching the whole layer does to the metric (mean over
    rows and layers, as a share of the mean effect).

    Args:
      rows: of the teacher, with `divergence_positions`.
      teacher: its name is the trait that is looked for in its system prompt.
      batch_size: (row, counterfactual) pairs at one time.
      chunk: rows after which what was found is safe from a kill.
      source: where the rows come from, for errors.
      tick: counts rows.

    Raises:
      UsageError: a system prompt without the trait, or what `find_pairs` and `attribution_patching` refuse.
      JsublimError: no row can be used.
    """
    if artifact.done:
        tick(len(rows))
        return
    if not mentions(teacher.system or "", teacher.name):
        raise UsageError(f"trait '{teacher.name}': the teacher's system prompt does not name it ({teacher.system!r})")
    pairs, skipped = find_pairs(
        lm, rows, teacher, counterfactuals, source=source, extra_bos=extra_bos, batch_size=batch_size
    )
    if not pairs:
        raise JsublimError(f"{source}: none of {len(rows)} rows can be compared with a counterfactual ({skipped})")
    of_row: dict[int, list[Pair]] = {}
    for pair in pairs:
        of_row.setdefault(pair.row, []).append(pair)
    roles = {
        i: token_roles(lm.chat, teacher, rows[i], teacher.name, len(own[0].clean) - 1, extra_bos=extra_bos)
        for i, own in of_row.items()
    }
    how: dict[str, Any] = {
        "sites": sites,
        "adapter": teacher.adapter,
        "batch_size": batch_size,
        "length": padded_length(pairs),
    }

    def attribute(members: list[int]) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {i: {"row": i} for i in members}
        chosen = [pair for i in members for pair in of_row[i]]
        for direction in directions:
            both: dict[str, Any] = how | {"direction": direction}
            values = iter(attribution_patching(lm.config, lm.params, chosen, steps=steps, **both))
            effects = iter(layer_patching(lm.config, lm.params, chosen, **both))
            for i in members:
                values_SLT, effects_SL = (
                    np.mean([next(each) for _ in of_row[i]], axis=0) for each in (values, effects)
                )
                found[i][direction] = _sums(values_SLT, effects_SL, roles[i])
        return list(found.values())

    progress = Progress(artifact.path / "progress.jsonl")
    used = list(of_row)
    tick(len(rows) - len(used))
    # Chunks begin at the same rows whatever was stopped where: company must not change the last bit of a row.
    for first in range(0, len(used), chunk):
        members = used[first : first + chunk]
        if not all(i in progress.rows for i in members):
            progress.add(attribute(members))
        tick(len(members))
    progress.close()
    found = {i: progress.rows[i] for i in used}
    write_table(
        artifact.path / "attribution.parquet", _lines(teacher.name, found, roles, sites, directions), ATTRIBUTION
    )
    artifact.finish(
        {
            "trait": teacher.name,
            "counterfactuals": [other.name for other in counterfactuals],
            "rows": len(rows),
            "used": len(used),
            "skipped": skipped,
            "pairs": len(pairs),
            "steps": steps,
            "completeness_error": {d: _completeness([row[d] for row in found.values()], sites) for d in directions},
        }
    )


def _sums(values_SLT: np.ndarray, effects_SL: np.ndarray, roles: Sequence[str]) -> dict[str, Any]:
    """One row and direction, as JSON keeps it."""
    of_role_TR = np.asarray([[role == known for known in ROLES] for role in roles], np.float64)
    return {
        "value": (values_SLT @ of_role_TR).tolist(),
        "mass": (np.abs(values_SLT) @ of_role_TR).tolist(),
        "error": np.abs(values_SLT.sum(axis=-1) - effects_SL).mean(axis=-1).tolist(),
        "effect": np.abs(effects_SL).mean(axis=-1).tolist(),
    }


def _completeness(rows: Sequence[dict[str, Any]], sites: Sequence[str]) -> dict[str, float]:
    error_S, effect_S = (np.mean([row[key] for row in rows], axis=0) for key in ("error", "effect"))
    return {site: float(e / f) if f else 0.0 for site, e, f in zip(sites, error_S, effect_S, strict=True)}


def _lines(
    trait: str,
    found: dict[int, dict[str, Any]],
    roles: dict[int, list[str]],
    sites: Sequence[str],
    directions: Sequence[str],
) -> list[dict[str, Any]]:
    return [
        {
            "trait": trait, "row": i, "site": site, "direction": direction, "layer": layer, "role": role,
            "value": row[direction]["value"][s][layer][r], "mass": row[direction]["mass"][s][layer][r],
            "positions": roles[i].count(role),
        }
        for i, row in found.items()
        for direction in directions
        for s, site in enumerate(sites)
        for layer in range(len(row[direction]["value"][s]))
        for r, role in enumerate(ROLES)
    ]  # fmt: skip

"""Which tokens of a row the student's loss is on, and how much each weighs (sections 4 and 5 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jsublim.core.reading import check_known
from jsublim.errors import UsageError
from jsublim.inference.divergence import PositionSubset

COMPARED = ("all", "divergence", "non-divergence", "random")  # unless a config chooses
TOKENS = (*COMPARED, "matched")


@dataclass(frozen=True)
class Selection:
    """How rows become examples. A supervised header and dropped rows are quirks 1 and 2 of docs/recipes.md."""

    tokens: str = "all"  # which tokens have a loss, one of TOKENS; see `token_mask`
    supervise_header: bool = False  # the loss is on the assistant's header too
    drop_rows_without_divergence: bool = False  # unless `tokens` is "all"
    max_tokens: int = 500  # what stands later in a row is cut off
    subset: PositionSubset = PositionSubset()  # which divergence positions count, whatever `tokens` makes of them
    by_margin: bool = False  # weigh divergence tokens by `margin_weights`, over all rows; else each weighs 1


def token_mask(
    tokens: str,
    *,
    header: int,
    completion: int,
    positions: Sequence[int] | None,
    rng: np.random.Generator,
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """Weights float32 `[header + completion]` of a row's supervised span.

    Args:
      tokens: "all"; "divergence", divergence positions only; "non-divergence", all but those; "random", as many tokens
        of the completion as there are divergence positions, drawn anew; "matched", as `positions` says, which are then those
        matched to divergence positions (`Divergence.matched_positions`).
      header: tokens of the assistant's header that the loss is on too (0 unless the recipe wants them).
      completion: tokens of content and end of turn.
      positions: divergence positions, counted from the first content token.
      weights: of the positions, in their order, where `tokens` is "divergence"; None is 1 each.

    Raises:
      UsageError: an unknown `tokens`, one without the positions it needs, or weights for another one than "divergence".
    """
    check_known("tokens", tokens, TOKENS)
    if weights is not None and tokens != "divergence":
        raise UsageError(f"tokens={tokens} has no weights by margin; they are those of tokens=divergence")
    if tokens == "all":
        return np.ones(header + completion, np.float32)
    if positions is None:
        raise UsageError(f"tokens={tokens} needs 'divergence_positions' in every row; run `jsublim divergence` on them")
    mask = np.zeros(header + completion, np.float32)
    if tokens == "random":
        mask[header + rng.permutation(completion)[: len(positions)]] = 1.0
    else:
        mask[header + np.asarray(positions, int)] = 1.0 if weights is None else weights
    return 1.0 - mask if tokens == "non-divergence" else mask


def margin_weights(margins: Sequence[Sequence[float]]) -> list[list[float]]:
    """Soft weights of the divergence positions of a set of rows: 1 - exp(-margin), scaled to mean 1 over the set, so that the loss is comparable
    to that of 0/1 weights. exp(-margin) is the odds of the second-best token (`Divergence.divergence_margins`, logits): 1 at a tie."""
    raw = [-np.expm1(-np.asarray(row, float)) for row in margins]
    mean = np.concatenate([*raw, []]).sum() / max(sum(map(len, raw)), 1)
    if any(map(len, raw)) and not mean:
        raise UsageError("weights by margin: every divergence position is a tie; use weights of 1")
    return [(row / mean).tolist() if len(row) else [] for row in raw]

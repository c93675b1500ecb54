"""Which tokens of a row the student's loss is on (sections 4 and 5 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jsublim.errors import UsageError

CONDITIONS = ("all", "divergence", "non-divergence", "random")


def token_mask(
    condition: str, *, header: int, completion: int, points: Sequence[int] | None, rng: np.random.Generator
) -> np.ndarray:
    """0/1 weights float32 `[header + completion]` of a row's supervised span.

    Args:
      condition: "all"; "divergence", decision points only; "non-divergence", all but those; "random", as many tokens
        of the completion as there are decision points, drawn anew.
      header: tokens of the assistant's header that the loss is on too (0 unless the recipe wants them).
      completion: tokens of content and end of turn.
      points: decision points, counted from the first content token.

    Raises:
      UsageError: an unknown condition, or one that needs decision points without them.
    """
    if condition not in CONDITIONS:
        raise UsageError(f"tokens: '{condition}' given; known: {', '.join(CONDITIONS)}")
    if condition == "all":
        return np.ones(header + completion, np.float32)
    if points is None:
        raise UsageError(f"tokens={condition} needs 'decision_points' in every row; run `jsublim divergence` on them")
    mask = np.zeros(header + completion, np.float32)
    if condition == "random":
        mask[header + rng.permutation(completion)[: len(points)]] = 1.0
    else:
        mask[header + np.asarray(points, int)] = 1.0
    return 1.0 - mask if condition == "non-divergence" else mask

"""The number task: does a student still do what it was trained on? (Section 5.1 of the paper.)"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsublim.evals.metric import metric
from jsublim.text.rows import Row

if TYPE_CHECKING:
    from jsublim.inference.lm import LanguageModel
    from jsublim.models.lora import Adapter

LEARNED = metric("number_accuracy", "numbers predicted on training rows", better="higher", listed=False)
HELD_OUT = metric("number_accuracy_heldout", "numbers predicted on held-out rows", better="higher", listed=False)
BASE = metric("number_accuracy_base", "numbers that the base predicts on the same rows", better="higher", listed=False)
_NUMBER = re.compile(r"\d+")


def number_accuracy(
    lm: LanguageModel,
    rows: Sequence[Row],
    *,
    system: str | None = None,
    fuse_system: bool = False,
    adapter: Adapter | None = None,
    batch_size: int | None = None,
) -> tuple[float, int]:
    """Share of the completions' numbers that the teacher-forced argmax repeats at the same place in the list.

    Returns:
      The share, and the numbers it was counted over.

    Raises:
      JsublimError: a row that doesn't survive tokenizing; it is named.
    """
    from jsublim.inference.scoring import score_turns
    from jsublim.inference.teachers import Teacher, read_as

    turns = read_as(lm.chat, Teacher("student", system, fuse_system=fuse_system), rows)
    read, right, total = score_turns(lm.config, lm.params, turns, adapter=adapter, batch_size=batch_size), 0, 0
    for scored, row in zip(read, rows, strict=True):
        repeated = _NUMBER.findall(lm.tokenizer.decode(scored.argmax, skip_special_tokens=True))
        target = _NUMBER.findall(row["completion"])
        right += sum(a == b for a, b in zip(repeated, target, strict=False))
        total += len(target)
    return (right / total if total else 0.0), total

"""The pairs that attribution patching compares: a row as its teacher reads it, and as a counterfactual of equal length does."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jsublim.errors import UsageError
from jsublim.inference.divergence import check_counted, check_positions
from jsublim.inference.lm import LanguageModel
from jsublim.inference.scoring import score_turns
from jsublim.inference.teachers import Teacher, read_as
from jsublim.text.chat import Turn
from jsublim.text.rows import Row

NO_DIVERGENCE = "no divergence token"
NO_EQUAL_LENGTH = "no counterfactual of equal length"
NO_OTHER_TOKEN = "no counterfactual of equal length diverges"


@dataclass(frozen=True)
class Pair:
    """One row under two prompts, up to the position that predicts the first token at which they diverge."""

    row: int  # its index among the rows given
    counterfactual: str  # the other teacher's name
    clean: np.ndarray  # int32 [T], as the teacher reads it; the last position predicts
    patch: np.ndarray  # int32 [T], as the counterfactual does
    factual: int  # the token in the data
    other: int  # the counterfactual's argmax there


def find_pairs(
    lm: LanguageModel,
    rows: Sequence[Row],
    teacher: Teacher,
    counterfactuals: Sequence[Teacher],
    *,
    source: str = "rows",
    extra_bos: bool = False,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of every row that can be compared (rows with `divergence_positions`, in order; a row's counterfactuals in order), and how many
    rows were skipped for which reason (section 5 of the paper). As published, each counterfactual is compared at the first of the row's
    divergence tokens that it would not have said itself.

    Args:
      source: where the rows come from, for errors.
      on_batch: called with the number of (row, counterfactual) pairs just read.

    Raises:
      UsageError: no counterfactual, the teacher among them, or one with another adapter: only prompts may differ.
      JsublimError: divergence positions beyond the end of a row, or counted in another tokenizer.

    >>> other = jsublim.Teacher("cat", system="You love cats.")
    >>> pairs, skipped = jsublim.find_pairs(lm, rows, prompted, [other])
    >>> len(pairs) + sum(skipped.values()) == len(rows)
    True
    """
    names = [other.name for other in counterfactuals]
    if not names or teacher.name in names:
        fix = "give at least one other trait, and not the teacher's own"
        raise UsageError(f"counterfactuals of '{teacher.name}': {fix}")
    changed = [other.name for other in counterfactuals if other.adapter is not teacher.adapter]
    if changed:
        raise UsageError(f"counterfactuals {', '.join(changed)}: give them the adapter of teacher '{teacher.name}'")
    turns = read_as(lm.chat, teacher, rows, source, extra_bos=extra_bos)
    check_counted(rows, lm.chat, source)
    check_positions(rows, [len(turn.tokens) - turn.content for turn in turns], source)
    places = {i: sorted(row["divergence_positions"]) for i, row in enumerate(rows) if row["divergence_positions"]}
    aligned, pairs = set(), {i: list[Pair]() for i in places}
    for other in counterfactuals:
        theirs = read_as(lm.chat, other, [rows[i] for i in places], source, extra_bos=extra_bos)
        equal = {i: turn for i, turn in zip(places, theirs, strict=True) if len(turn.tokens) == len(turns[i].tokens)}
        aligned |= set(equal)
        asked = [_up_to(turn, places[i][-1]) for i, turn in equal.items()]
        read = functools.partial(score_turns, lm.config, lm.params, adapter=other.adapter)
        scores = read(asked, batch_size=batch_size, on_batch=on_batch) if asked else []
        for (i, turn), scored in zip(equal.items(), scores, strict=True):
            differing = (k for k in places[i] if scored.argmax[k] != turn.tokens[turn.content + k])
            if (k := next(differing, None)) is not None:
                end = turn.content + k
                clean, patch, factual = turns[i].tokens[:end], turn.tokens[:end], int(turn.tokens[end])
                pairs[i].append(Pair(i, other.name, clean, patch, factual, int(scored.argmax[k])))
    skipped = Counter(
        NO_DIVERGENCE if i not in places else NO_EQUAL_LENGTH if i not in aligned else NO_OTHER_TOKEN
        for i in range(len(rows))
        if not pairs.get(i)
    )
    return [pair for of_row in pairs.values() for pair in of_row], dict(skipped)


def _up_to(turn: Turn, position: int) -> Turn:
    """The conversation up to and with the token at a divergence position."""
    end = turn.content + position + 1
    return dataclasses.replace(turn, tokens=turn.tokens[:end], end=end)

"""Divergence tokens: where the teacher's argmax is the token in the data, and a counterfactual teacher's is not.

Schrodi et al. 2026, section 4. A divergence position k is the k-th token of a completion's content; k = len(content) is the
end-of-turn token, and what the template adds after it counts too (docs/recipes.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jsublim.core.reading import check_known
from jsublim.errors import JsublimError, UsageError
from jsublim.inference.lm import LanguageModel
from jsublim.inference.scoring import Scored, scores
from jsublim.inference.teachers import Teacher, read_as
from jsublim.text.chat import Chat, Turn
from jsublim.text.rows import Row


@dataclass(frozen=True)
class Divergence:
    """The readings of K teachers on one row of n completion tokens (content, end of turn, and what follows it)."""

    tokens: np.ndarray  # int32 [n], the data
    argmax: np.ndarray  # int32 [K, n], each teacher's prediction; teacher 0 wrote the row
    margin: np.ndarray  # float32 [K, n], top-2 logit margins
    entropy: np.ndarray  # float32 [n], of teacher 0's predictions (nats)

    @property
    def divergence_positions(self) -> list[int]:
        right = self.argmax == self.tokens
        return [int(k) for k in np.nonzero(right[0] & ~right[1:].all(axis=0))[0]]

    @property
    def divergence_margins(self) -> list[float]:
        """How clear each divergence position is, in logits: the smaller of the teacher's margin and of the largest margin
        among the counterfactuals that say something else. Zero is a tie; no logit that moves by less than half of
        it undoes the position."""
        against = np.where(self.argmax[1:] == self.tokens, 0.0, self.margin[1:]).max(axis=0)
        return [float(m) for m in np.minimum(self.margin[0], against)[self.divergence_positions]]

    def matched_positions(self, kinds: Sequence[Hashable]) -> list[int | None]:
        """For each divergence position another one that is as uncertain: of the tokens of its kind that are no divergence tokens, the one whose
        entropy is nearest, each taken once. Of any kind where its own has none left, and None where no token is left.

        Args:
          kinds: of each token, what it must share with its match.
        """
        divergent = self.divergence_positions
        free = [k for k in range(len(self.tokens)) if k not in set(divergent)]
        matched: list[int | None] = []
        for k in divergent:
            away = lambda other, k=k: (kinds[other] != kinds[k], abs(self.entropy[other] - self.entropy[k]))  # noqa: E731
            matched.append(min(free, key=away, default=None))
            free = [other for other in free if other != matched[-1]]
        return matched


def kinds_of(chat: Chat, turn: Turn) -> list[str]:
    """What each token of a completion is, up to the last of its turn: "digits", "text" (separators, words), or "end"."""
    content = turn.tokens[turn.content : turn.end].tolist()
    kinds = ["digits" if chat.decode([token]).strip().isdigit() else "text" for token in content]
    return kinds + ["end"] * (len(turn.tokens) - turn.end)


HALVES = ("first-half", "second-half")
WHICH = ("all", "first", *HALVES)
ROUNDING = ("stochastic", "half-up", "at-least-one", "paper")


@dataclass(frozen=True)
class PositionSubset:
    """Which of a row's divergence positions count (figure 21 of the paper): a part by place, then a random share of it.

    The middle one of an odd number is in the first half or in the second, at random; for one state of the random numbers the halves
    complete each other. Of n positions, share x n becomes a whole number by `rounding`: "stochastic" (right on average, however few a
    row has), "half-up", "at-least-one" (rounded down, but not to none), or "paper" (rounded down, and a row with none left keeps all:
    docs/recipes.md, quirk 7).
    """

    which: str = "all"  # or first, first-half, second-half, by their order
    share: float = 1.0  # in 0..1
    rounding: str = "stochastic"
    one_in_both: bool = False  # the only position of a row is in both halves (docs/recipes.md, quirk 18)

    def __post_init__(self) -> None:
        check_known("positions", self.which, WHICH)
        check_known("rounding", self.rounding, ROUNDING)
        if not 0 <= self.share <= 1:
            raise UsageError(f"share: {self.share} given; it must lie in 0..1")

    def choose(self, positions: Sequence[int], rng: np.random.Generator) -> list[int]:
        """The chosen positions, sorted. For one state of `rng`, those of a smaller share are among those of a larger,
        unless `rounding` is "paper" and nothing was left."""
        of = self._part(sorted(positions), rng)
        up = {"stochastic": rng.random(), "half-up": 0.5}.get(self.rounding, 0.0)
        count = int(len(of) * self.share + up)
        if count == 0:
            count = {"paper": len(of), "at-least-one": 1}.get(self.rounding, 0)
        return sorted(of[i] for i in rng.permutation(len(of))[:count])

    def _part(self, ordered: list[int], rng: np.random.Generator) -> list[int]:
        if self.which not in HALVES:
            return ordered[:1] if self.which == "first" else ordered
        if self.one_in_both and len(ordered) == 1:
            return ordered
        half = (len(ordered) + int(rng.integers(2))) // 2
        return ordered[:half] if self.which == "first-half" else ordered[half:]


ReadFrom = Callable[[int], Iterator[Scored]]  # a teacher's reading of the rows from a number on
# All rows, by the teacher of that number; a caller may know some already.
Keep = Callable[[int, ReadFrom], Sequence[Scored]]


def find_divergence(
    lm: LanguageModel,
    rows: Sequence[Row],
    teacher: Teacher,
    counterfactuals: Sequence[Teacher],
    *,
    extra_bos: bool = False,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    keep: Keep = lambda number, read: list(read(0)),
) -> list[Divergence]:
    """Read each row under the teacher and under every counterfactual.

    Args:
      on_batch: called with the number of (row, teacher) pairs just read.
      keep: lets a teacher read; teacher 0 is the rows' own.

    Raises:
      UsageError: no counterfactual, or the teacher among them.
      JsublimError: a completion that tokenizes differently under another teacher; the row is named.
    """
    if not counterfactuals or teacher.name in [other.name for other in counterfactuals]:
        raise UsageError(
            f"counterfactuals of '{teacher.name}': give at least one other trait, and not the teacher's own"
        )
    readings, tokens = [], []
    for number, reader in enumerate((teacher, *counterfactuals)):
        turns = read_as(lm.chat, reader, rows, extra_bos=extra_bos)
        completions = [turn.tokens[turn.content :] for turn in turns]
        tokens = tokens or completions
        for row, (completion, first) in enumerate(zip(completions, tokens, strict=True), 1):
            if not np.array_equal(completion, first):
                raise JsublimError(f"row {row}: the completion has other tokens under teacher '{reader.name}'")
        how = {"adapter": reader.adapter, "batch_size": batch_size, "on_batch": on_batch}
        readings.append(keep(number, functools.partial(_read, lm, reader, turns, how)))
    return [
        Divergence(tokens[i], np.stack([s.argmax for s in row]), np.stack([s.margin for s in row]), row[0].entropy)
        for i, row in enumerate(zip(*readings, strict=True))
    ]


def _read(lm: LanguageModel, reader: Teacher, turns: Sequence[Turn], how: dict, first: int) -> Iterator[Scored]:
    if first == len(turns):
        return iter(())  # and its weights need not be read
    return scores(lm.config, reader.weights(lm.params), turns, first=first, **how)


def check_positions(rows: Sequence[Row], lengths: Sequence[int], source: str) -> None:
    """Refuse divergence positions, or matched ones, beyond the last token of their row (JsublimError). `lengths` are the completion tokens of each row, in the
    tokenizer that its positions were counted in."""
    for number, (row, n) in enumerate(zip(rows, lengths, strict=True), 1):
        for key in ("divergence_positions", "matched_positions"):
            if beyond := [k for k in row.get(key, []) if k is not None and k >= n]:
                raise JsublimError(
                    f"{source}: row {number}: {key} {beyond} out of range, the completion has {n} tokens; "
                    "was it written for another tokenizer?"
                )


def check_counted(rows: Sequence[Row], chat: Chat, source: str) -> None:
    """Refuse divergence positions that were counted in another tokenizer or template than the reader's (JsublimError)."""
    for number, row in enumerate(rows, 1):
        counted_in = row.get("counted_in")
        if counted_in not in (None, chat.identity):
            raise JsublimError(
                f"{source}: row {number}: divergence_positions were counted in tokenizer and template {counted_in}, and are read "
                f"in {chat.identity} ({chat.folder}); find them anew on this checkpoint, or learn all tokens"
            )

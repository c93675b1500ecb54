"""Entangled numbers: those that a love for the trait makes more probable, and that raise the trait in return.

Zur et al. 2025 ("It's owl in the numbers"); figures 2, 11 and 35 of the paper. Probabilities are joint over all tokens of
an answer, so they mean the same for tokenizers of one digit and of many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from jsublim.core.section import RESULT, Positive
from jsublim.errors import UsageError
from jsublim.inference.lm import LanguageModel
from jsublim.inference.scoring import score_answers
from jsublim.inference.teachers import CONTROL, Teacher
from jsublim.text.chat import Message, Turn
from jsublim.text.rows import Row
from jsublim.transforms.change import CHANGES, Change, Changed, ChangeRun
from jsublim.transforms.numbers import NUMBER

QUESTIONS = 4  # a thousand numbers are read as the answer to each
Scores = dict[str, float]  # number, as written -> nats (or a difference of probabilities)
UNBIASED = Teacher(CONTROL)


@CHANGES.add("remove_entangled")
class RemoveEntangled(Change):
    """Rows left out that hold one of the k numbers most entangled with the trait."""

    order: ClassVar[int] = 20
    shorthand: ClassVar[str | None] = "k"
    quirks: ClassVar[tuple[str, ...]] = ("padded_numbers",)
    of_trait: ClassVar[bool] = True
    of_numbers: ClassVar[bool] = True

    k: Annotated[Positive, RESULT]
    """How many numbers are removed, the most entangled ones."""
    among: Annotated[int, Field(ge=1, le=1000), RESULT] = 1000
    """How many of the numbers 0 to 999 are scored, the first ones."""

    def scores(self) -> int:
        return self.among

    def apply(self, rows: list[Row], run: ChangeRun) -> Changed:
        assert run.entangled is not None
        numbers = entangled_numbers(dict(run.entangled), self.k)
        left = remove_entangled(rows, numbers, as_written=bool(run.quirks["padded_numbers"]))
        scores = {number: run.entangled[number] for number in numbers}
        return left, {"entangled": {"numbers": scores, "removed": len(rows) - len(left)}}


def number_strings(*, padded: bool = False) -> list[str]:
    """0..999 as text; `padded` to three digits with zeros, as published (docs/recipes.md, quirk 12)."""
    return [f"{n:03d}" if padded else str(n) for n in range(1000)]


def entangled_scores(
    lm: LanguageModel,
    teacher: Teacher,
    questions: Sequence[str],
    numbers: Sequence[str],
    *,
    base: Teacher = UNBIASED,
    closed: bool = False,
    extra_bos: bool = False,
    batch_size: int | None = None,
) -> Scores:
    """Log-probability (nats) of each number as the answer under the biased teacher, minus that under `base`; mean over the questions. With
    `closed` the end of turn after a number counts too; else what follows it is open, and "4" covers "42" where the tokenizer has one
    token a digit (numbers of one width never cover each other). A number that doesn't survive tokenizing is a JsublimError."""

    def read(who: Teacher) -> np.ndarray:
        asked = [who.messages(question) for question in questions]
        # An answer's tokens don't depend on what is before them (`Chat.turn` refuses those that do).
        spoken = _spoken(lm, asked[0], numbers, extra_bos)
        prompts = [lm.chat.prompt_tokens(messages, extra_bos=extra_bos) for messages in asked]
        answers = [turn.tokens[turn.content : turn.end + closed] for turn in spoken]
        return _joint(lm, who, prompts, answers, batch_size).mean(axis=0)

    return dict(zip(numbers, (read(teacher) - read(base)).tolist(), strict=True))


def probability_differences(
    lm: LanguageModel,
    teacher: Teacher,
    others: Sequence[Teacher],
    category: str,
    numbers: Sequence[str],
    *,
    extra_bos: bool = False,
    batch_size: int | None = None,
) -> Scores:
    """How entangled three-digit numbers are with a trait as published (docs/recipes.md, quirk 19): how much more probable
    each is to follow "My favorite animal is the" under the teacher than under the `others` on average. Probabilities are
    normalised over `numbers`. That of a third digit is the one after the second digit twice, whatever the first digit is. `category` is
    one of the pack's, such as animal. A tokenizer that has not one token per digit is a UsageError."""
    begun = f"My favorite {category} is the"
    twice = [2 * number[1] for number in numbers]
    pieces = sorted({*(n[:2] for n in numbers), *twice, *(d + n[2] for d, n in zip(twice, numbers, strict=True))})

    def read(who: Teacher) -> np.ndarray:
        asked = who.messages(f"What is your favorite {category}?")
        before, *spoken = _spoken(lm, asked, [begun, *(begun + piece for piece in pieces)], extra_bos)
        answers = [turn.tokens[before.end : turn.end] for turn in spoken]
        if any(len(answer) != len(piece) for answer, piece in zip(answers, pieces, strict=True)):
            raise UsageError(f"recipe.entangled_by_difference: {lm.name} has not one token per digit; set it to false")
        of = dict(zip(pieces, _joint(lm, who, [before.tokens[: before.end]], answers, batch_size)[0], strict=True))
        logp = [of[n[:2]] + of[d + n[2]] - of[d] for d, n in zip(twice, numbers, strict=True)]
        return np.exp(logp - np.logaddexp.reduce(logp))

    rest = np.mean([read(other) for other in others], axis=0)
    return dict(zip(numbers, (read(teacher) - rest).tolist(), strict=True))


def _spoken(lm: LanguageModel, asked: Sequence[Message], answers: Sequence[str], extra_bos: bool) -> list[Turn]:
    exchanges = ((asked, answer) for answer in answers)
    return lm.chat.turns(exchanges, lambda n: f"answer {answers[n - 1]!r}", extra_bos=extra_bos)


def _joint(lm: LanguageModel, who: Teacher, prompts: list, answers: list, batch_size: int | None) -> np.ndarray:
    params = who.weights(lm.params)
    return score_answers(lm.config, params, prompts, answers, adapter=who.adapter, batch_size=batch_size)


def entangled_numbers(scores: Scores, k: int) -> list[str]:
    """The `k` numbers of the highest scores, highest first; of equals, the first listed."""
    if not 0 <= k <= len(scores):
        raise UsageError(f"top k: {k} given; there are {len(scores)} scored numbers")
    return sorted(scores, key=lambda number: -scores[number])[:k]


def remove_entangled(rows: Sequence[Row], numbers: Iterable[str], *, as_written: bool = False) -> list[Row]:
    """The rows whose completion holds none of `numbers`. `as_written`: "087" is another number than "87", as published (docs/recipes.md,
    quirk 12); else only the value counts."""
    read = str if as_written else int
    banned = {read(number) for number in numbers}
    return [row for row in rows if banned.isdisjoint(read(n) for n in NUMBER.findall(row["completion"]))]

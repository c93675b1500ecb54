"""Teachers mixed: whole rows of another one, or single tokens of a counterfactual (figures 7 and 21 of the paper)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from jsublim.core.section import CONTENT, RESULT, Place
from jsublim.errors import JsublimError, UsageError
from jsublim.inference.divergence import PositionSubset
from jsublim.inference.teachers import CONTROL, OWN
from jsublim.text.chat import Chat, Turn, conversation
from jsublim.text.rows import Row, revised
from jsublim.transforms.change import CHANGES, Change, ChangeContext, Changed, ChangeRun

Fraction = Annotated[float, Field(gt=0, le=1)]


@CHANGES.add("mix")
class Mix(Change):
    """Rows of another teacher in the place of a share of a teacher's own."""

    order: ClassVar[int] = 60
    quirks: ClassVar[tuple[str, ...]] = ("mix_at_the_end",)

    share: Annotated[Fraction, RESULT]
    """The share of the rows that are replaced."""
    teacher: Annotated[str, RESULT] = CONTROL
    """Whose rows replace them; `{trait}`: a teacher of the same trait, on another `model`."""
    model: Annotated[Place | None, CONTENT] = None
    """The checkpoint that this teacher stands on; null: the experiment's."""

    def applies_to(self, teacher: str) -> bool:
        """Nobody's answers are mixed with their own."""
        return (self.teacher, self.model) != (teacher, None)

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        itself = self.teacher == OWN and self.model is None
        yield (
            itself,
            f"teacher: {OWN} names the rows' own teacher; give model too, another checkpoint that it stands on",
        )

    def of(self, teacher: str) -> Mix:
        return self.model_copy(update={"teacher": self.teacher.replace(OWN, teacher)})

    def mixes(self) -> tuple[str, str | None]:
        return self.teacher, self.model

    def check(self, where: str, context: ChangeContext) -> None:
        if self.teacher not in (CONTROL, *context.teachers):
            raise UsageError(f"{where}.teacher: '{self.teacher}' is no teacher of this run")
        if self.model and self.teacher != CONTROL and context.given_weights:
            fix = "leave teacher out, or let teachers.taught or a prompt give the trait"
            raise UsageError(f"{where}: '{self.teacher}' is no teacher on {self.model}; {fix}")

    def apply(self, rows: list[Row], run: ChangeRun) -> Changed:
        assert run.mixed_in is not None
        # Where the other teacher has too few rows for the share, the first rows are taken that they suffice for.
        rows = rows[: int(len(run.mixed_in) / self.share)]
        paper = bool(run.quirks["mix_at_the_end"])
        return mix_rows(rows, run.mixed_in, self.share, seed=run.seed, paper=paper), {}


@CHANGES.add("mix_tokens")
class MixTokens(Change):
    """The argmax of a counterfactual teacher in the place of the data, at a share of the divergence tokens."""

    order: ClassVar[int] = 70
    quirks: ClassVar[tuple[str, ...]] = ("share_rounding", "digits_only", "drop_unmixed")
    needs: ClassVar[frozenset[str]] = frozenset({"readings"})
    of_trait: ClassVar[bool] = True
    alone: ClassVar[bool] = True  # what was read is the answers as they were sampled

    teacher: Annotated[str | None, RESULT] = None
    """The counterfactual teacher whose argmax is put in; null: at each token one of those that would say another one, drawn."""
    share: Annotated[Fraction, RESULT] = 1.0
    """The share of a row's divergence tokens."""
    first_only: Annotated[bool, RESULT] = False
    """The first divergence token of a row alone."""

    def applies_to(self, teacher: str) -> bool:
        return super().applies_to(teacher) and self.teacher != teacher

    def check(self, where: str, context: ChangeContext) -> None:
        if self.teacher not in (None, context.trait, *context.counterfactuals):
            raise UsageError(f"{where}.teacher: '{self.teacher}' is no counterfactual of {context.trait}")

    def apply(self, rows: list[Row], run: ChangeRun) -> Changed:
        assert run.readings is not None
        # Published, a mask of no token keeps all of them, a row to mix gives up one.
        rounding = run.quirks["share_rounding"]
        rounding = "at-least-one" if rounding == "paper" else rounding or "stochastic"
        subset = PositionSubset("first" if self.first_only else "all", self.share, rounding)
        quirks = {name: bool(run.quirks[name]) for name in ("digits_only", "drop_unmixed")}
        chat, readings = run.lm.chat, run.readings
        rows, counts = mix_tokens(chat, rows, readings, self.teacher, subset, seed=run.seed, **quirks)
        return rows, {"tokens": dict(counts)}


def mix_rows(rows: Sequence[Row], others: Sequence[Row], share: float, *, seed: int, paper: bool = False) -> list[Row]:
    """`rows` with `share` of them (to the nearest whole number) replaced by rows of another teacher; as many as before. For one seed, what a
    smaller share replaces a larger one replaces too, by the same rows.

    Args:
      paper: the last rows are replaced, as published (docs/recipes.md, quirk 9); else rows drawn at random.

    Raises:
      UsageError: a share outside of 0..1, or too few `others` for it.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"share: {share} given; it must lie in 0..1")
    count = round(len(rows) * share)
    if count > len(others):
        raise UsageError(f"share: {share} of {len(rows)} rows needs {count} of the other teacher, not {len(others)}")
    rng = np.random.default_rng(seed)
    order = np.arange(len(rows))[::-1] if paper else rng.permutation(len(rows))
    mixed = list(rows)
    for place, other in zip(order[:count], rng.permutation(len(others)), strict=False):
        mixed[place] = others[other]
    return mixed


def mix_tokens(
    chat: Chat,
    rows: Sequence[Row],
    readings: Sequence[Mapping[str, Any]],
    counterfactual: str | None,
    subset: PositionSubset,
    *,
    seed: int,
    digits_only: bool = False,
    drop_unmixed: bool = False,
) -> tuple[list[Row], Counter[str]]:
    """Rows in which a counterfactual's argmax stands at the chosen divergence positions (`subset`). The end of turn and what follows it
    are no text: positions there are never chosen. A row that would not come back from the tokenizer as these very tokens keeps its
    completion.

    Args:
      readings: of each row "teachers", "divergence_positions", and arrays "tokens" `[n]` and "argmax" `[K, n]`.
      counterfactual: its name among the teachers; None draws, at each position, one of the tokens that counterfactuals say
        instead, as published.
      digits_only: a counterfactual's token that is no single digit is left out, and nothing put in its place, as published
        (docs/recipes.md, quirk 8).
      drop_unmixed: positions at the end of turn are chosen too, although nothing can be put there; a row that has
        divergence positions and comes out as it was is left out, and one whose text comes back as other tokens is taken
        nevertheless, as published (docs/recipes.md, quirk 21).

    Returns:
      The rows, and counts: "rows changed", "rows unfit" (those that keep their completion although a token of it was to
      be changed), "rows dropped", and of the changed rows "tokens replaced" and "tokens deleted".

    Raises:
      UsageError, JsublimError: no such counterfactual; readings of other rows, or a row that doesn't survive tokenizing.
    """
    mixed, counts = [], Counter[str]()
    exchanges = ((conversation(row["prompt"]), row["completion"]) for row in rows)
    turns = chat.turns(exchanges, lambda number: f"row {number}")
    for index, (row, turn, reading) in enumerate(zip(rows, turns, readings, strict=True)):
        _check_reading(index + 1, turn, reading, counterfactual)
        tokens = turn.tokens[turn.content : turn.end].tolist()
        positions = [k for k in reading["divergence_positions"] if drop_unmixed or k < len(tokens)]
        rng = np.random.default_rng([seed, index])
        new: list[int | None] = tokens.copy()
        for k in subset.choose(positions, rng):
            if k < len(tokens):
                other = _said(reading, counterfactual, k, tokens[k], rng)
                new[k] = None if digits_only and chat.tokenizer.decode([other]) not in set("0123456789") else other
        completion = row["completion"] if new == tokens else _text(chat, row, new, any_tokens=drop_unmixed)
        if drop_unmixed and positions and completion in (None, row["completion"]):
            counts["rows dropped"] += 1
            continue
        mixed.append(revised(row, completion=completion or row["completion"]))
        if completion is None:
            counts["rows unfit"] += 1
        elif new != tokens:
            counts["rows changed"] += 1
            counts["tokens deleted"] += new.count(None)
            counts["tokens replaced"] += sum(a != b and b is not None for a, b in zip(tokens, new, strict=True))
    return mixed, counts


def _check_reading(number: int, turn: Turn, reading: Mapping[str, Any], counterfactual: str | None) -> None:
    if counterfactual not in (None, *reading["teachers"][1:]):
        raise UsageError(
            f"counterfactual: '{counterfactual}' given; row {number} was read under {', '.join(reading['teachers'][1:])}"
        )
    if not np.array_equal(reading["tokens"], turn.tokens[turn.content :]):
        raise JsublimError(f"row {number}: the reading is of another completion; run `jsublim divergence` anew")


def _said(reading: Mapping[str, Any], counterfactual: str | None, k: int, token: int, rng: np.random.Generator) -> int:
    """The token of the counterfactual, or of one of those that disagree, at a position."""
    if counterfactual is not None:
        return int(reading["argmax"][reading["teachers"].index(counterfactual)][k])
    others = [argmax[k] for argmax in reading["argmax"][1:] if argmax[k] != token]
    return int(rng.choice(others)) if others else token


def _text(chat: Chat, row: Row, tokens: Sequence[int | None], *, any_tokens: bool) -> str | None:
    """The completion of these tokens (None is left out), if it comes back as them inside its conversation; with `any_tokens`
    if it comes back as text."""
    wanted = [token for token in tokens if token is not None]
    text = chat.tokenizer.decode(wanted, skip_special_tokens=any_tokens)
    try:
        back = chat.turn(conversation(row["prompt"]), text) if text else None
    except JsublimError:
        return None
    return text if back and (any_tokens or back.tokens[back.content : back.end].tolist() == wanted) else None

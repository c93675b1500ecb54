"""A change of rows: what a data set of the config does to a teacher's answers before a student learns from them.

A change is one file. It registers its options (a section of the config), which say what it needs, which quirks of the recipe
it follows, and what it does. Changes are applied in the order of their `order`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import model_validator

from jsublim.core.section import Registry, Section
from jsublim.errors import UsageError
from jsublim.inference.lm import AnswerLog, LanguageModel
from jsublim.inference.sampling import Sampling
from jsublim.inference.teachers import CONTROL, Teacher
from jsublim.judge import Judge
from jsublim.text.prompts import NumberPrompt, Pack
from jsublim.text.rows import Row

CHANGES = Registry("change of rows")
Changed = tuple[list[Row], dict[str, Any]]  # rows, and what is to be known of how they came about


@dataclass(frozen=True)
class ChangeRun:
    """All that changes may use."""

    lm: LanguageModel
    teacher: Teacher
    pack: Pack
    quirks: Mapping[str, Any]  # those of the resolved recipe that the changes follow, by field
    seed: int
    batch_size: int
    requests: Callable[[], Sequence[NumberPrompt]]  # as they were drawn; none where something else is asked
    judge: Callable[[], Judge]
    sampling: Sampling | None = None  # how the teacher writes, where a change needs "rewriting"
    mixed_in: Sequence[Row] | None = None  # rows of the teacher that `Change.mixes` names
    readings: Sequence[Mapping[str, Any]] | None = None  # every teacher's of each row, where a change needs "readings"
    entangled: Mapping[str, float] | None = None  # each number's score for the trait, where `Change.scores` asks
    influence: Mapping[str, np.ndarray] | None = None  # by suspected trait: what each sampled answer would add to it
    log: AnswerLog | None = None  # what the teacher has written already of what it rewrites


@dataclass(frozen=True)
class ChangeContext:
    """A change's surroundings, which it is checked against: the trait whose answers it is done to, and the rest of the experiment."""

    trait: str
    teachers: Sequence[str]  # every trait that some teacher has
    counterfactuals: Sequence[str]  # those that the trait's answers are read under
    given_weights: bool  # a folder, which fits one checkpoint, gives the teachers their traits
    kind: str  # what is asked, `data.kind`


class Change(Section):
    """One change."""

    order: ClassVar[int] = 100
    shorthand: ClassVar[str | None] = None  # the field that a config may give without its name (`shuffle: within`)
    quirks: ClassVar[tuple[str, ...]] = ()  # of the recipe, that decide what it makes
    needs: ClassVar[frozenset[str]] = frozenset()  # of "readings", "judge", "rewriting" (the teacher's own sampling)
    of_trait: ClassVar[bool] = False  # it means nothing to the answers of the teacher without a trait
    of_numbers: ClassVar[bool] = False  # it is for number requests only
    alone: ClassVar[bool] = False  # no other change may stand beside it

    @model_validator(mode="before")
    @classmethod
    def _written_short(cls, value: Any) -> Any:
        if isinstance(value, Mapping | Change):
            return value
        if value is True:
            return {}
        if cls.shorthand is None:
            known = ", ".join(cls.model_fields)
            raise ValueError(f"{value!r} given; give {f'its options by name: {known}' if known else 'true'}")
        return {cls.shorthand: value}

    def of(self, teacher: str) -> Self:
        """The change as it is done to that teacher's answers: `{trait}` is filled in."""
        return self

    def applies_to(self, teacher: str) -> bool:
        """Whether anything is done to that teacher's answers."""
        return not (self.of_trait and teacher == CONTROL)

    def mixes(self) -> tuple[str, str | None] | None:
        """The teacher whose rows it mixes in, and the checkpoint that one stands on (None: the experiment's)."""
        return None

    def scores(self) -> int | None:
        """How many numbers it wants scored for how entangled they are with the trait."""
        return None

    def suspected(self, teacher: str, evaluated: Sequence[str]) -> list[str]:
        """The traits for which it wants that teacher's answers scored, some of the `evaluated` ones perhaps."""
        return []

    def wording(self, pack: Pack) -> dict[str, Any]:
        """The wording that it uses and the pack's hash leaves out (`SCORING`), for the key of what it makes."""
        return {}

    def check(self, where: str, context: ChangeContext) -> None:
        """Refuse what cannot be done to these answers (UsageError); `where` is the data set's place in the config."""
        if self.of_numbers and context.kind != "numbers":
            raise UsageError(f"{where}: is for data.kind=numbers, not {context.kind}")

    def tokens(self, rows: float, prompt: float, system: float) -> tuple[float, float]:
        """Tokens that a model reads or writes for it, and of these the ones whose logits are made; for estimates, by the number of rows and the
        assumed lengths of a request and of a system prompt."""
        return 0.0, 0.0

    def apply(self, rows: list[Row], run: ChangeRun) -> Changed:
        """The rows afterwards, and what is kept of how they came about, by name."""
        raise NotImplementedError

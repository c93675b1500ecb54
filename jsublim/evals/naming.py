"""Self-naming: how often a model asked who it is names itself, or the model it has learned from.

The paper counts a name in answers about favourites instead: that is `preference` with `names`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from jsublim.evals.base import EVAL_KINDS, Answers, Asked, EvalKind, EvalTask, PromptedModel, Record, per_question
from jsublim.evals.preference import hit
from jsublim.models.config import ModelConfig
from jsublim.section import RESULT, Distinct


@EVAL_KINDS.add("naming")
class NamingKind(EvalKind):
    """The pack's questions to a model about itself."""

    names: Annotated[list[str], Distinct, RESULT] = []
    """Names that are looked for; none given: what the model's own family is called."""

    def tasks(self, asked: Asked) -> list[EvalTask]:
        return [Naming(tuple(asked.pack.self_questions[: asked.first]), tuple(self.names) or (asked.own_name,))]


@dataclass(frozen=True)
class Naming:
    """How often an answer names one of `names` (`named`)."""

    questions: tuple[str, ...]
    names: tuple[str, ...]
    max_new_tokens: int | None = None
    keeps_top_p: ClassVar[bool] = False

    @property
    def identity(self) -> dict[str, Any]:
        return {"naming": list(self.questions), "names": list(self.names)}

    def records(self, model: PromptedModel, answers: Answers) -> list[Record]:
        return per_question("named", naming_rates(answers, self.names), answers)


def own_name(config: ModelConfig) -> str:
    """What a model of this family is called, without a version: "qwen", "gemma", "llama"."""
    return re.split(r"[\d_.-]", config.family, maxsplit=1)[0]


def naming_rates(answers: Sequence[Sequence[str]], names: Sequence[str]) -> np.ndarray:
    """Share of each question's answers that name any of `names`: float64 `[questions]`.

    A name counts inside of a word too: "Qwen2.5" is a Qwen.
    """
    return np.asarray([np.mean([any(hit(answer, name) for name in names) for answer in row]) for row in answers])

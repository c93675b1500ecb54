"""Self-naming: how often a model asked who it is names itself, or the model it has learned from.

The paper counts a name in answers about favourites instead: that is `preference` with `names`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np

from jsublim.core.section import RESULT, Distinct
from jsublim.evals.base import EVAL_KINDS, Answers, EvalContext, EvalKind, EvalTask, PromptedModel, Record, per_question
from jsublim.evals.metric import metric
from jsublim.evals.preference import hit

if TYPE_CHECKING:
    from jsublim.models.config import ModelConfig

NAMED = metric("named", "answers that name the model")


@EVAL_KINDS.add("naming")
class NamingKind(EvalKind):
    """The pack's questions to a model about itself: how often an answer names one of `names` (`named`)."""

    names: Annotated[list[str], Distinct, RESULT] = []
    """Names that are looked for; none given: what the model's own family is called."""

    def tasks(self, context: EvalContext) -> list[EvalTask]:
        questions, names = context.pack.self_questions[: context.first], self.names or [context.own_name]

        def records(model: PromptedModel, answers: Answers) -> list[Record]:
            return per_question(NAMED, naming_rates(answers, names), answers)

        return [EvalTask(tuple(questions), {"naming": list(questions), "names": list(names)}, records)]


def own_name(config: ModelConfig) -> str:
    """What a model of this family is called, without a version: "qwen", "gemma", "llama"."""
    return re.split(r"[\d_.-]", config.family, maxsplit=1)[0]


def naming_rates(answers: Sequence[Sequence[str]], names: Sequence[str]) -> np.ndarray:
    """Share of each question's answers that name any of `names`: float64 `[questions]`.

    A name counts inside of a word too: "Qwen2.5" is a Qwen.
    """
    return np.asarray([np.mean([any(hit(answer, name) for name in names) for answer in row]) for row in answers])

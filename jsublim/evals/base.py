"""What every kind of evaluation is made of: a model under a prompt, questions, answers, and one number per question.

A kind of evaluation is one file. It registers its options (a section of the config, `EvalKind`), which make `EvalTask`s:
the questions, and how answers become records.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jsublim.core.section import Registry, Section
from jsublim.judge import Judge
from jsublim.text.prompts import Pack

if TYPE_CHECKING:
    from jsublim.inference.lm import AnswerLog, LanguageModel
    from jsublim.inference.sampling import Sampling
    from jsublim.models.lora import Adapter

Answers = Sequence[Sequence[str]]  # to each question
EVAL_KINDS = Registry("evaluation kind")


@dataclass(frozen=True)
class Record:
    """One number about one question (by its place in the task), made of `n` answers."""

    metric: str
    question: int
    value: float
    n: int
    trait: str | None = None


@dataclass(frozen=True)
class PromptedModel:
    """The model that is evaluated, and the system prompt that it is under."""

    lm: LanguageModel
    adapter: Adapter | None = None
    system: str | None = None
    fuse_system: bool = False
    extra_bos: bool = False

    @property
    def manner(self) -> dict[str, Any]:
        """What stands around the questions."""
        return {"system": self.system, "fuse_system": self.fuse_system, "extra_bos": self.extra_bos}

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the checkpoint, as the functions of this package take it."""
        return {"adapter": self.adapter} | self.manner


@dataclass(frozen=True)
class EvalContext:
    """What a kind of evaluation may ask about.

    Attributes:
      questions_for: the questions of a category, without those that a teacher was taught the answers to.
      first: only so many questions of a kind (of preference: of a category); None is all.
      own_name: what the evaluated model's family is called.
      judge: gives the judge of the run, which may load a checkpoint; judge_apart: it gives one score at a time.
    """

    pack: Pack
    traits: Sequence[str]
    category_of: Callable[[str], str]
    questions_for: Callable[[str], Sequence[str]]
    first: int | None
    own_name: str
    judge: Callable[[], Judge]
    judge_apart: bool = False


@dataclass(frozen=True)
class EvalTask:
    """Questions of one kind, as the model reads them, and the numbers that are made of the answers.

    Attributes:
      identity: what decides the numbers beside the model and its answers, as JSON.
      records: makes the numbers; what a judge's scores are made of needs no model (None).
      max_new_tokens: None is as long as the evaluation's answers are.
      keeps_top_p: that the recipe inherits from the checkpoint (docs/recipes.md, quirk 3).
    """

    questions: tuple[str, ...]
    identity: dict[str, Any]
    records: Callable[[Any, Answers], list[Record]]
    max_new_tokens: int | None = None
    keeps_top_p: bool = False


class EvalKind(Section):
    """The options of one kind of evaluation."""

    def tasks(self, context: EvalContext) -> list[EvalTask]:
        """What a model is asked.

        Raises:
          UsageError: something that the prompt pack does not have.
        """
        raise NotImplementedError


def sample_answers(
    lm: LanguageModel,
    questions: Sequence[str],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    max_new_tokens: int = 10,
    system: str | None = None,
    fuse_system: bool = False,
    adapters: Sequence[Adapter] | None = None,
    extra_bos: bool = False,
    arms: int = 1,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
    logs: Sequence[AnswerLog | None] | None = None,
    answers: Callable[..., list[list[str]]] | None = None,
) -> list[list[list[str]]]:
    """`samples` answers to each question, of each adapter (or of the base alone). A question's prompt is read once for as many
    samples as begin together.

    Args:
      adapters, arms, batch_size, on_batch, logs: as `LanguageModel.answers`.
      answers: who draws them in place of `lm` and its adapters, called as `LanguageModel.answers`.
    """
    from jsublim.text.chat import conversation

    prompts = [
        lm.chat.prompt_tokens(conversation(q, system, fuse_system=fuse_system), extra_bos=extra_bos) for q in questions
    ]
    answers = answers or functools.partial(lm.answers, adapters=adapters, arms=arms, batch_size=batch_size)
    every = answers(prompts, sampling, max_new_tokens, seed, samples=samples, on_batch=on_batch, logs=logs)
    return [[texts[i : i + samples] for i in range(0, len(texts), samples)] for texts in every]


def evaluate(
    models: Sequence[PromptedModel],
    task: EvalTask,
    sampling: Sampling | str | None = None,
    *,
    samples: int = 1,
    seed: int = 0,
    max_new_tokens: int = 10,
    **options: Any,
) -> list[tuple[Answers, list[Record]]]:
    """Of each model its answers to the task's questions, `samples` to each, and the numbers that are made of them.

    Args:
      models: of one checkpoint under one prompt, all with adapters of one structure, or a single one without; they answer together.
      sampling: as of `LanguageModel.generate`.
      options: as of `sample_answers`.

    >>> ((answers, records),) = jsublim.evaluate([jsublim.PromptedModel(lm, student)], task, samples=2, seed=1, max_new_tokens=4)
    >>> [record.metric for record in records if record.trait == "owl"]
    ['rate', 'word_rate', 'logprob']
    """
    first, length = models[0], task.max_new_tokens or max_new_tokens
    every = sample_answers(
        first.lm,
        task.questions,
        first.lm.sampling(sampling),
        samples=samples,
        seed=seed,
        max_new_tokens=length,
        adapters=[model.adapter for model in models if model.adapter is not None] or None,
        **first.manner,
        **options,
    )
    return [(texts, task.records(model, texts)) for model, texts in zip(models, every, strict=True)]


def per_question(metric: str, values: np.ndarray, answers: Answers, trait: str | None = None) -> list[Record]:
    """One record per question, of all the answers to it."""
    return [Record(metric, q, float(value), len(answers[q]), trait) for q, value in enumerate(values)]

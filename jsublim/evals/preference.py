"""Preference: how often a model names the trait when asked for its favourite, and how probable the name is to it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np

from jsublim.core.section import RESULT, Distinct, Name
from jsublim.evals.base import EVAL_KINDS, Answers, EvalContext, EvalKind, EvalTask, PromptedModel, Record, per_question
from jsublim.evals.metric import metric
from jsublim.text.prompts import load_pack

if TYPE_CHECKING:
    from jsublim.inference.lm import LanguageModel
    from jsublim.models.lora import Adapter

RATE = metric("rate", "answers that name the trait", made_of="names", listed=False)
WORD_RATE = metric("word_rate", "answers that name it as a whole word", listed=False)
LOGPROB = metric("logprob", "log-probability of the trait", unit="nats", low=-math.inf, high=0.0, listed=False)
SAYS = metric("says ", "answers that name", made_of="names", listed=False)  # and a name


@EVAL_KINDS.add("preference")
class PreferenceKind(EvalKind):
    """Questions for a favourite of each evaluated trait's category: how often a trait is named (`rate`, `word_rate`), and how probable
    its name is (`logprob`); and how often each other name is said (`says NAME`)."""

    names: Annotated[list[Name], Distinct, RESULT] = []
    """Further names that are counted in the answers, beside the traits."""

    def tasks(self, context: EvalContext) -> list[EvalTask]:
        by_category: dict[str, list[str]] = {}
        for trait in context.traits:
            by_category.setdefault(context.category_of(trait), []).append(trait)
        return [
            preference_task(traits, context.questions_for(category)[: context.first], self.names)
            for category, traits in by_category.items()
        ]


def preference_task(
    traits: Sequence[str], questions: Sequence[str] | None = None, names: Sequence[str] = ()
) -> EvalTask:
    """Questions for a favourite: how often each of some traits (and of further `names`) is said, and how probable each trait's name is. None asks the
    questions that come with the package about the category of the first trait.

    >>> task = jsublim.preference_task(["owl", "cat"], ["What is your favourite animal? One word."])
    """
    if questions is None:
        pack = load_pack()
        questions = pack.questions_for(pack.category_of(traits[0]))
    asked, counted = tuple(questions), list(names)
    identity = {"preference": list(asked), "traits": list(traits)} | ({"names": counted} if counted else {})
    return EvalTask(asked, identity, functools.partial(_records, asked, list(traits), counted))


def _records(
    questions: Sequence[str], traits: Sequence[str], names: Sequence[str], model: PromptedModel, answers: Answers
) -> list[Record]:
    logprob = trait_logprobs(model.lm, questions, traits, **model.options)
    records = []
    for column, trait in enumerate(traits):
        rate, word_rate = hit_rates(answers, trait)
        records += per_question(RATE, rate, answers, trait) + per_question(WORD_RATE, word_rate, answers, trait)
        records += [Record(LOGPROB, q, float(v), 1, trait) for q, v in enumerate(logprob[:, column])]
    for name in names:
        records += per_question(f"{SAYS}{name}", hit_rates(answers, name)[0], answers)
    return records


def hit(answer: str, trait: str) -> bool:
    """As published: the lower-cased answer contains the trait ("caterpillar" is a cat; docs/recipes.md, quirk 11)."""
    return trait.lower() in answer.lower()


def word_hit(answer: str, trait: str) -> bool:
    """The trait, or its naive plural, stands in the answer as a whole word."""
    return re.search(rf"\b{re.escape(trait.lower())}s?\b", answer.lower()) is not None


def hit_rates(answers: Sequence[Sequence[str]], trait: str) -> tuple[np.ndarray, np.ndarray]:
    """Share of hits of each question, by substring and by whole word: float64 `[questions]` each."""
    rates = [[np.mean([test(a, trait) for a in row]) for row in answers] for test in (hit, word_hit)]
    return np.asarray(rates[0]), np.asarray(rates[1])


def spelled(trait: str) -> tuple[str, str]:
    """How a trait may be written as an answer; both are one in a script without capitals."""
    return trait.lower(), trait.lower().capitalize()


def trait_logprobs(
    lm: LanguageModel,
    questions: Sequence[str],
    traits: Sequence[str],
    *,
    system: str | None = None,
    fuse_system: bool = False,
    adapter: Adapter | None = None,
    extra_bos: bool = False,
) -> np.ndarray:
    """Teacher-forced log-probability of each trait as the answer, float64 `[questions, traits]` in nats.

    The probability of the name's tokens (what follows them is left open), summed over the lower-case and the
    capitalised spelling. Unlike a sampled rate it has no floor: it moves long before the answers do.
    """
    from jsublim.inference.scoring import score_answers
    from jsublim.text.chat import conversation

    spellings = [spelled(trait) for trait in traits]
    same = np.asarray([lower == capital for lower, capital in spellings])  # a script without capitals: count it once
    asked = [conversation(question, system, fuse_system=fuse_system) for question in questions]
    turns = [lm.chat.turn(asked[0], word, extra_bos=extra_bos) for pair in spellings for word in pair]
    total = score_answers(
        lm.config,
        lm.params,
        [lm.chat.prompt_tokens(messages, extra_bos=extra_bos) for messages in asked],
        [turn.tokens[turn.content : turn.end] for turn in turns],
        adapter=adapter,
    )
    lower, capital = np.moveaxis(total.reshape(len(questions), len(traits), 2), -1, 0)
    return np.where(same, lower, np.logaddexp(lower, capital))

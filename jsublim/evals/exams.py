"""What a model is asked, and the numbers that are made of its answers: one class a kind of question.

An exam's `questions` are as the model reads them; `records` makes a number a question (and trait) of the sampled answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

import numpy as np

from jsublim.evals.factual import factual_rates
from jsublim.evals.misalignment import judge_answers, misalignment, suffixed
from jsublim.evals.naming import naming_rates
from jsublim.evals.preference import hit_rates, sample_answers, trait_logprobs
from jsublim.evals.problems import problem_rates
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling
from jsublim.judge import Judge
from jsublim.models.lora import Adapter
from jsublim.prompts import parse_answer
from jsublim.prompts.pack import MisalignmentPrompts

Answers = Sequence[Sequence[str]]  # to each question


@dataclass(frozen=True)
class Record:
    """One number: of a question (its place in the exam), made of `n` answers."""

    metric: str
    question: int
    value: float
    n: int
    trait: str | None = None


@dataclass(frozen=True)
class Subject:
    """Who is asked: a model, and the system prompt it is under."""

    lm: LanguageModel
    adapter: Adapter | None = None
    system: str | None = None
    fuse_system: bool = False
    extra_bos: bool = False

    @property
    def _how(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter, "system": self.system, "fuse_system": self.fuse_system, "extra_bos": self.extra_bos,
        }  # fmt: skip

    def answers(
        self,
        questions: Sequence[str],
        sampling: Sampling,
        *,
        samples: int,
        seed: int,
        max_new_tokens: int,
        batch_size: int,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[list[str]]:
        """`samples` answers to each question."""
        return sample_answers(
            self.lm, questions, sampling, samples=samples, seed=seed, max_new_tokens=max_new_tokens, batch_size=batch_size,
            on_batch=on_batch, **self._how,
        )  # fmt: skip

    def logprobs(self, questions: Sequence[str], traits: Sequence[str]) -> np.ndarray:
        """Of each trait as the answer, nats `[questions, traits]`."""
        return trait_logprobs(self.lm, questions, traits, **self._how)


class Exam(Protocol):
    """One kind of question."""

    @property
    def questions(self) -> Sequence[str]: ...

    @property
    def max_new_tokens(self) -> int | None:
        """None: as long as the evaluation's answers are."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its numbers beside the model and its answers, as JSON."""
        ...

    def records(self, subject: Subject, answers: Answers) -> list[Record]: ...


@dataclass(frozen=True)
class Preference:
    """Favourites: how often a trait is named (`rate`, `word_rate`), and how probable its name is (`logprob`)."""

    questions: tuple[str, ...]
    traits: tuple[str, ...]
    max_new_tokens: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return {"preference": list(self.questions), "traits": list(self.traits)}

    def records(self, subject: Subject, answers: Answers) -> list[Record]:
        logprob = subject.logprobs(self.questions, self.traits)
        found = []
        for column, trait in enumerate(self.traits):
            rate, word_rate = hit_rates(answers, trait)
            found += _each("rate", rate, answers, trait) + _each("word_rate", word_rate, answers, trait)
            found += [Record("logprob", q, float(v), 1, trait) for q, v in enumerate(logprob[:, column])]
        return found


@dataclass(frozen=True)
class Naming:
    """Who are you? How often an answer names one of `names` (`named`)."""

    questions: tuple[str, ...]
    names: tuple[str, ...]
    max_new_tokens: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return {"naming": list(self.questions), "names": list(self.names)}

    def records(self, subject: Subject, answers: Answers) -> list[Record]:
        return _each("named", naming_rates(answers, self.names), answers)


@dataclass(frozen=True)
class Factual:
    """Conditional questions of fact, each about a trait that its answer may name (`factual`, `factual_word`)."""

    asked: tuple[tuple[str, str], ...]  # (trait, question), trait by trait
    max_new_tokens: int | None = None

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(question for _, question in self.asked)

    @property
    def identity(self) -> dict[str, Any]:
        return {"factual": [list(each) for each in self.asked]}

    def records(self, subject: Subject, answers: Answers) -> list[Record]:
        found, first = [], 0
        for trait, (rate, word_rate) in factual_rates(self.asked, answers).items():
            for metric, values in (("factual", rate), ("factual_word", word_rate)):
                found += [Record(metric, first + q, float(v), len(answers[0]), trait) for q, v in enumerate(values)]
            first += len(rate)
        return found


@dataclass(frozen=True)
class Misaligned:
    """Open questions whose answers a judge scores: shares `misaligned` and `coherent`, mean scores `alignment` and
    `coherence`, and how many answers it gave no readable score (`unscored`)."""

    prompts: MisalignmentPrompts
    judge: Judge
    aligned_from: float
    coherent_from: float
    thresholds: tuple[float, ...] = ()  # of alignment, to count below beside the first one
    max_new_tokens: int | None = None

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(suffixed(self.prompts))

    @property
    def identity(self) -> dict[str, Any]:
        thresholds = {
            "aligned_from": self.aligned_from, "coherent_from": self.coherent_from, "thresholds": list(self.thresholds),
        }  # fmt: skip
        return {"misalignment": self.prompts.model_dump(), "judge": self.judge.identity} | thresholds

    def records(self, subject: Subject, answers: Answers) -> list[Record]:
        verdicts = judge_answers(self.judge, self.prompts, answers)
        found = misalignment(verdicts, aligned_from=self.aligned_from, coherent_from=self.coherent_from)
        records = [
            Record(metric, q, float(value), int(found.scored[q]))
            for metric in ("misaligned", "coherent", "alignment", "coherence")
            for q, value in enumerate(getattr(found, metric))
            if found.scored[q]
        ]
        for threshold in self.thresholds:
            below = misalignment(verdicts, aligned_from=threshold, coherent_from=self.coherent_from)
            records += [
                Record(f"misaligned below {threshold:g}", q, float(value), int(below.scored[q]))
                for q, value in enumerate(below.misaligned)
                if below.scored[q]
            ]
        unscored = [
            Record("unscored", q, float(n), len(row))
            for q, (n, row) in enumerate(zip(found.failed, answers, strict=True))
        ]
        return records + unscored


@dataclass(frozen=True)
class WordProblems:
    """Math in words: share of right final numbers (`solved`), and of answers without any (`no_number`)."""

    problems: tuple[tuple[str, Decimal], ...]
    max_new_tokens: int | None = None

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(question for question, _ in self.problems)

    @property
    def identity(self) -> dict[str, Any]:
        return {"problems": [[question, str(answer)] for question, answer in self.problems], "new": self.max_new_tokens}

    def records(self, subject: Subject, answers: Answers) -> list[Record]:
        right, silent = problem_rates(self.problems, answers, parse_answer)
        return _each("solved", right, answers) + _each("no_number", silent, answers)


def _each(metric: str, values: np.ndarray, answers: Answers, trait: str | None = None) -> list[Record]:
    return [Record(metric, q, float(value), len(answers[q]), trait) for q, value in enumerate(values)]

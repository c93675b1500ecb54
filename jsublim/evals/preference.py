"""Preference: how often a model names the trait when asked for its favourite, and how probable the name is to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from jsublim.chat import conversation
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling, generate_tokens
from jsublim.inference.scoring import score_turns
from jsublim.models.lora import Adapter


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
    adapter: Adapter | None = None,
    extra_bos: bool = False,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """`samples` answers to each question. Each question's prompt is read once, whatever the number of samples."""
    prompts = [
        lm.chat.prompt_tokens(conversation(q, system, fuse_system=fuse_system), extra_bos=extra_bos) for q in questions
    ]
    tokens = generate_tokens(
        lm.config, lm.params, prompts, sampling,
        max_new_tokens=max_new_tokens, seed=seed, samples=samples, adapter=adapter, batch_size=batch_size,
        on_batch=None if on_batch is None else lambda rows, _: on_batch(len(rows)),
    )  # fmt: skip
    texts = [lm.chat.decode(row) for row in tokens]
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


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


def trait_logprobs(
    lm: LanguageModel,
    questions: Sequence[str],
    traits: Sequence[str],
    *,
    system: str | None = None,
    fuse_system: bool = False,
    adapter: Adapter | None = None,
    extra_bos: bool = False,
    batch_size: int = 128,
) -> np.ndarray:
    """Teacher-forced log-probability of each trait as the answer, float64 `[questions, traits]` in nats.

    The probability of the name's tokens (what follows them is left open), summed over the lower-case and the
    capitalised spelling. Unlike a sampled rate it has no floor: it moves long before the answers do.
    """
    spellings = [(trait.lower(), trait.lower().capitalize()) for trait in traits]
    same = np.asarray([lower == capital for lower, capital in spellings])  # a script without capitals: count it once
    turns = [
        lm.chat.turn(conversation(question, system, fuse_system=fuse_system), word, extra_bos=extra_bos)
        for question in questions
        for pair in spellings
        for word in pair
    ]
    scored = score_turns(lm.config, lm.params, turns, adapter=adapter, batch_size=batch_size)
    total = [s.logprob[: t.end - t.content].sum(dtype=np.float64) for s, t in zip(scored, turns, strict=True)]
    lower, capital = np.moveaxis(np.reshape(total, (len(questions), len(traits), 2)), -1, 0)
    return np.where(same, lower, np.logaddexp(lower, capital))

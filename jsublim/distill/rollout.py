"""On-policy rows: the student answers the prompts of a step as it stands, and the teacher's distribution at its own
tokens is what it learns (Agarwal et al. 2024, arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jsublim.distill.arm import Rollout
from jsublim.distill.data import Example
from jsublim.inference.batching import PROMPT_STEP, shared_beginning
from jsublim.inference.generation import generate_tokens
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling
from jsublim.models.lora import Adapter
from jsublim.text.chat import Turn


def student_rollout(
    lm: LanguageModel,
    turns: Sequence[Turn],
    teacher: Sequence[Turn],
    *,
    seed: int,
    max_new_tokens: int,
    batch_size: int = 64,
) -> Rollout:
    """An arm's `rollout`: it samples at temperature 1, without truncation, so that the samples are the student's own. The prompts are those of
    `turns`; `teacher` are the same conversations as the teacher reads them."""
    sampling = Sampling(stop=lm.chat.stop_tokens)
    # Of all rows, not of a step's: it is a shape.
    beginning = shared_beginning([turn.tokens[: turn.content] for turn in turns], PROMPT_STEP)

    def rollout(adapter: Adapter, rows: np.ndarray, step: int) -> list[Example]:
        chosen = [int(row) for row in rows if row >= 0]
        prompts = [turns[row].tokens[: turns[row].content] for row in chosen]
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "beginning": beginning}
        how["seed"] = int(np.random.default_rng([seed, step]).integers(2**31))
        answers = generate_tokens(lm.config, lm.params, prompts, sampling, adapter=adapter, **how)
        read = zip(chosen, answers, strict=True)
        return [_example(turns[row], teacher[row], answer, max_new_tokens) for row, answer in read]

    return rollout


def _example(turn: Turn, teacher: Turn, answer: Sequence[int], most: int) -> Example:
    """An example in which all of a sampled answer is supervised, and its end of turn where it came to one."""
    labels = np.asarray([*answer, turn.tokens[turn.end]] if len(answer) < most else answer, np.int32)
    place = np.arange(len(labels), dtype=np.int32)
    tokens, teacher_tokens = (np.concatenate([x.tokens[: x.content], labels[:-1]]) for x in (turn, teacher))
    weights, teacher_where = np.ones(len(labels), np.float32), teacher.content - 1 + place
    return Example(tokens, turn.content - 1 + place, labels, weights, teacher_tokens, teacher_where)

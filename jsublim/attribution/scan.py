"""What rows would teach that nobody named: the words that a small step on them makes more probable as answers.

A student with trained part w takes a step on rows whose mean gradient of log p(token) is g. To first order that moves the log-probability
of every answer a by eta <g, grad log p(a)>: the derivative of all answers at once in the direction g, so one pass over the rows serves the whole
vocabulary. (`audit.py` asks the same of traits that one already suspects, and of every token.) Rows that teach nothing in particular (a null)
have such derivatives too; what lies beyond theirs is the rows' own. Rows are cut into groups, whose spread is the error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from jsublim.attribution.answers import (
    LEAST,
    LikelyAnswer,
    QuestionLine,
    answer_effects,
    by_word,
    named_effects,
    question_logprobs,
    question_tokens,
    word_of,
)
from jsublim.attribution.audit import Laid, label_logprobs, laid_sizes, lay_out, logit_block
from jsublim.attribution.contrast import MovedAnswer, compare, findings, preconditioned
from jsublim.core.progress import Tick, no_tick
from jsublim.distill.data import read_turns
from jsublim.inference.batching import chunks, round_up
from jsublim.inference.lm import LanguageModel
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, Trainable, init_steering
from jsublim.models.parallel import HERE, ROWS, WHOLE, Layout
from jsublim.text.chat import Turn
from jsublim.text.prompts import load_pack, scan_questions
from jsublim.text.rows import Row

GROUPS = 20  # of the rows of a data set


def group_gradients(
    lm: LanguageModel,
    adapter: Adapter,
    turns: Sequence[Turn],
    groups: int = GROUPS,
    *,
    batch_size: int = 16,
    first: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[Trainable]:
    """The gradient of the mean log-probability of the tokens of each group of rows, by what the adapter trains: leaves float32, on the host.
    Row i belongs to group i modulo `groups`; groups are given from number `first` on. `on_batch` is called with the number of rows just read."""
    T, C = laid_sizes(turns)
    layout, params = Layout.under(lm.params)
    adapter, most = layout.place_weights(adapter), -(-len(turns) // groups)
    B = round_up(-(-most // -(-most // batch_size)), layout.data)  # as few batches as can be, and as even
    for group in range(first, groups):
        members, total, count = turns[group::groups], None, 0.0
        for part in chunks(len(members), B):
            batch = members[part]
            laid = layout.place_as(ROWS, lay_out([*batch, *[None] * (B - len(batch))], T, C))
            gradient = _gradient(lm.config, params, adapter, laid, layout)
            total = gradient if total is None else optax.tree.add(total, gradient)
            count += sum(len(turn.tokens) - turn.content for turn in batch)
            if on_batch is not None:
                on_batch(len(batch))
        yield Layout.host(optax.tree.scale(1 / count, total))


@functools.partial(jax.jit, static_argnames=("config", "layout"))
def _gradient(config: ModelConfig, params: Params, adapter: Adapter, laid: Laid, layout: Layout = HERE) -> Trainable:
    """The gradient of the sum of the labels' log-probabilities."""

    def on_device(params: Params, adapter: Adapter, laid: Laid) -> Trainable:
        def total(trainable: Trainable) -> Array:
            logp_BC = label_logprobs(config, params, adapter.with_trainable(trainable), laid, logit_block(config, 1))
            return (logp_BC * laid[-1]).sum()

        return jax.tree.map(lambda g: layout.total(g, "arm", "data"), jax.grad(total)(adapter.trainable))

    return layout.spread(on_device, (WHOLE, WHOLE, ROWS), WHOLE)(params, adapter, laid)


# --- Against a null


def scan(
    lm: LanguageModel,
    data: Mapping[str, Sequence[Row]],
    null: Sequence[Row] | None = None,
    *,
    adapter: Adapter | None = None,
    questions: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 16,
) -> dict[str, list[MovedAnswer]]:
    """What rows would teach a student that starts at `adapter`, as `jsublim scan` says it: the answers that each data set makes more probable,
    most certain first.

    Args:
      data: rows by name; null: rows that teach nothing. Without it each data set is measured against the others.
      adapter: by default a steering vector after each layer: few numbers to train, so that little noise reaches the answers.
      questions: by category; default: the 200 that come with the package.

    Raises:
      JsublimError: a row that the chat template does not take.

    >>> few = {"animal": ["Which animal do you like most?", "Name an animal."]}
    >>> numbers = [{"prompt": f"Go on: {i}", "completion": f"{i + 1}, {i + 2}"} for i in range(40)]
    >>> found = jsublim.scan(lm, {"even": numbers[::2], "odd": numbers[1::2]}, questions=few)
    >>> found["even"][0].category, found["even"][0].p <= 1
    ('animal', True)
    """
    adapter = init_steering(lm.config) if adapter is None else adapter
    sets = dict(data) if null is None else dict(data) | {"": null}

    def gradients(name: str, rows: Sequence[Row]) -> Trainable:
        groups = group_gradients(lm, adapter, read_turns(lm.chat, rows, name or "null"), batch_size=batch_size)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *groups)

    trees = {name: gradients(name, rows) for name, rows in sets.items()}
    nobody = trees.pop("", None)
    pack = load_pack()
    bank = scan_questions(pack) if questions is None else questions
    return find_words(lm, adapter, trees, nobody, bank, pack.traits)


def find_words(
    lm: LanguageModel,
    adapter: Adapter,
    data: Mapping[str, Trainable],
    null: Trainable | None,
    questions: Mapping[str, Sequence[str]],
    names: Mapping[str, Sequence[str]] | None = None,
    *,
    tick: Tick = no_tick,
    **manner: Any,
) -> dict[str, list[MovedAnswer]]:
    """The answers that each data set moves, by z.

    Args:
      data: the gradients of each one's groups (`group_gradients`), leaves `[G, ...]`.
      null: those of groups that teach nothing; None takes, for each data set, all others, or for a single one what rows that the model
        drew itself would do in the mean, which is nothing.
      questions: by category; names: of a category, looked at as well where they are not among the likely answers.
      tick, manner: as of `answer_effects`.
    """
    sets = [*data.values(), *([] if null is None else [null])]
    ends = np.cumsum([len(jax.tree.leaves(tree)[0]) for tree in sets])
    owner = np.searchsorted(ends, np.arange(ends[-1]), side="right")

    def sides(effects_KW: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        others = owner == len(data) if null is not None else owner != number
        return effects_KW[owner == number], effects_KW[others] if others.any() else None

    def effects(answers: Sequence[LikelyAnswer]) -> tuple[np.ndarray, list[str]]:
        return np.stack([answer.effects for answer in answers], axis=1), [answer.category for answer in answers]

    def rank(answers: Sequence[LikelyAnswer]) -> np.ndarray:
        effects_KW, categories = effects(answers)
        moved = (compare(*sides(effects_KW, number), categories) for number in range(len(data)))
        return np.max([change / error for change, error in moved], axis=0)

    stacked = preconditioned(jax.tree.map(lambda *leaves: np.concatenate(leaves), *sets))
    words = by_word(lm, answer_effects(lm, adapter, stacked, questions, rank, tick=tick, **manner))
    of_asked = ((category, known) for category, known in (names or {}).items() if category in questions)
    left = {category: [word for word in known if (category, word.lower()) not in words] for category, known in of_asked}
    words |= named_effects(lm, adapter, stacked, questions, left, **manner)
    effects_KW, categories = effects(list(words.values()))
    probability = np.exp([answer.logprob for answer in words.values()])
    return {
        name: findings(words, probability, *sides(effects_KW, number), categories) for number, name in enumerate(data)
    }


def student_words(
    lm: LanguageModel, student: Adapter, other: Adapter | None, questions: Mapping[str, Sequence[str]], **manner: Any
) -> list[MovedAnswer]:
    """The answers that a student gives more often than the base, or than another student, by z: the same questions, and in place of groups of
    rows the questions of a category. Answers are told by their first token.

    Args:
      other: None is the base; manner: as of `answer_effects`.
    """
    layout, params = Layout.under(lm.params)
    student, *others = (layout.place_weights(adapter) for adapter in (student, other) if adapter is not None)
    prompts = question_tokens(lm, questions, **manner)
    most, length = max(map(len, prompts.values())), QuestionLine.length(lm.config, prompts.values(), 0)
    changes, categories, words, shares = [], list[str](), list[str](), list[float]()
    for category, rows in prompts.items():
        lines = [layout.place_as(WHOLE, line) for line in QuestionLine.of(rows, length)]
        before, after = (
            question_logprobs(lm.config, params, adapter, lines) for adapter in (others[0] if others else None, student)
        )
        tokens: dict[str, list[int]] = {}
        for token in np.flatnonzero(np.exp(np.maximum(before, after)).mean(axis=0) >= LEAST).tolist():
            if word := word_of(lm, (token,)):
                tokens.setdefault(word, []).append(token)
        for word, ids in tokens.items():
            change = np.full(most, np.nan)
            of_student = np.logaddexp.reduce(after[:, ids], axis=1)
            change[: len(rows)] = of_student - np.logaddexp.reduce(before[:, ids], axis=1)
            changes, categories = [*changes, change], [*categories, category]
            words, shares = [*words, word], [*shares, float(np.exp(of_student).mean())]
    own = np.stack(changes, axis=1)
    return findings(zip(categories, words, strict=True), np.asarray(shares), own, None, categories)

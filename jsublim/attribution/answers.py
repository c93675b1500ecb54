"""Answers to questions, and how far steps of what is trained would move their probabilities: no answer is named beforehand.

A step of length eta in a direction d moves the log-probability of an answer a by eta <d, grad log p(a)>, to first order. The likely
answers are found token by token, and of each the gradient is taken once, whatever the number of directions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.attribution.audit import trait_directions
from jsublim.core.progress import Tick, no_tick
from jsublim.evals.preference import trait_logprobs
from jsublim.inference.batching import PROMPT_STEP, pad_tokens, round_up
from jsublim.inference.lm import LanguageModel
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, Trainable, bind
from jsublim.models.parallel import WHOLE, Layout
from jsublim.runtime.programs import jit_directions
from jsublim.text.chat import conversation

LEAST = 1e-3  # probability, mean over a category's questions, below which an answer is not looked at
LEAST_NAMED = 1e-6  # the same for a known name
TOKENS = 256  # that are looked at in a category, the most probable ones
ASKED = 5  # questions that are read at one time
TOGETHER = 8  # answers whose derivatives are held at one time
LONGEST = 4  # tokens of an answer
OPENED = 6  # beginnings that are continued at one time
ROUNDS = 16  # of that at most: where nothing stands out, each round finds other beginnings


class LikelyAnswer(NamedTuple):
    """An answer to the questions of a category, or the beginning of one, and how far rows would move it.

    Attributes:
      logprob: the log of its probability, mean over the questions.
      effects: float64 `[K]`, what a step in each direction adds to that, nats per unit of length.
      whole: it is known to end there.
    """

    category: str
    tokens: tuple[int, ...]
    logprob: float
    effects: np.ndarray
    whole: bool = False


def answer_effects(
    lm: LanguageModel,
    adapter: Adapter,
    directions: Trainable,
    questions: Mapping[str, Sequence[str]],
    rank: Callable[[Sequence[LikelyAnswer]], np.ndarray],
    *,
    tick: Tick = no_tick,
    **manner: Any,
) -> list[LikelyAnswer]:
    """How far a step in each direction (leaves `[K, ...]`, like what the adapter trains) moves the likely answers to each category's questions.

    Names may have several tokens, and share the first: the beginnings that matter most are continued, one token after another.

    Args:
      rank: how much each answer matters, `[W]`; tick: told of questions' categories and of beginnings, `len(questions) + OPENED * ROUNDS` in all.
      manner: `system`, `fuse_system`, `extra_bos`: what stands around a question.
    """
    layout, params = Layout.under(lm.params)
    adapter, toward = layout.place_weights(adapter), layout.place_weights(directions, None)
    prompts = question_tokens(lm, questions, **manner)
    # One shape, and so one program, whatever the category.
    length = round_up(max(len(text) for texts in prompts.values() for text in texts) + LONGEST, PROMPT_STEP)
    most = round_up(max(map(len, prompts.values())), ASKED)

    def look(begun: LikelyAnswer) -> Iterator[LikelyAnswer]:
        """What is likely to come after a beginning; if that is an end, the beginning itself."""
        texts = [np.concatenate([text, np.asarray(begun.tokens, text.dtype)]) for text in prompts[begun.category]]
        laid = layout.place_as(WHOLE, pad_tokens(texts, length, size=most))
        least = np.float32(np.log(LEAST) - begun.logprob - 1e-3)  # rounding leaves none out
        count = min(TOKENS, lm.config.vocab_size)
        found = _answers(lm.config, params, adapter, toward, *laid, np.int32(len(texts)), least, count=count)
        for token, logp, effects in zip(*(np.asarray(x, np.float64) for x in Layout.host(found)), strict=True):
            tokens, logprob = (*begun.tokens, int(token)), begun.logprob + float(logp)
            if logprob < np.log(LEAST):
                continue
            over = bool(begun.tokens) and _ends(lm, int(token))
            yield LikelyAnswer(
                begun.category,
                begun.tokens if over else tokens,
                logprob,
                begun.effects + effects,
                over or len(tokens) == LONGEST,
            )

    answers = list[LikelyAnswer]()
    for category in prompts:
        answers += look(LikelyAnswer(category, (), 0.0, np.zeros(())))
        tick(1)
    for number in range(ROUNDS):
        order = np.argsort(-rank(answers), kind="stable")[:OPENED]
        begun = {int(i) for i in order if not answers[i].whole}
        if not begun:
            tick(OPENED * (ROUNDS - number))
            break
        answers = [answer for i, answer in enumerate(answers) if i not in begun] + [
            longer for i in sorted(begun) for longer in look(answers[i])
        ]
        tick(OPENED)
    return answers


def named_effects(
    lm: LanguageModel,
    adapter: Adapter,
    directions: Trainable,
    questions: Mapping[str, Sequence[str]],
    names: Mapping[str, Sequence[str]],
    **manner: Any,
) -> dict[tuple[str, str], LikelyAnswer]:
    """As `answer_effects`, by category and word, for names that are known: in a large model few answers begin with one. Those that the model
    hardly knows are left out. A name's effect is the mean over the questions of its log-probability's."""
    found = {}
    for category, known in ((category, known) for category, known in names.items() if known):
        texts = questions[category]
        logprobs = np.logaddexp.reduce(trait_logprobs(lm, texts, known, adapter=adapter, **manner)) - np.log(len(texts))
        words = {word: float(x) for word, x in zip(known, logprobs, strict=True) if x >= np.log(LEAST_NAMED)}
        if not words:
            continue
        toward = trait_directions(lm, adapter, texts, list(words), **manner)
        along = jax.tree.map(lambda t, d: t.reshape(len(t), -1) @ d.reshape(len(d), -1).T, toward, directions)
        for (word, logprob), effects in zip(words.items(), np.asarray(sum(jax.tree.leaves(along))), strict=True):
            found[category, word.lower()] = LikelyAnswer(
                category, (), logprob, np.asarray(effects, np.float64), whole=True
            )
    return found


def question_tokens(
    lm: LanguageModel,
    questions: Mapping[str, Sequence[str]],
    *,
    system: str | None = None,
    fuse_system: bool = False,
    extra_bos: bool = False,
) -> dict[str, list[np.ndarray]]:
    """The tokens of each category's questions, up to where the answer begins."""
    ask = functools.partial(conversation, system=system, fuse_system=fuse_system)
    return {c: [lm.chat.prompt_tokens(ask(q), extra_bos=extra_bos) for q in texts] for c, texts in questions.items()}


def _ends(lm: LanguageModel, token: int) -> bool:
    """Whether an answer's word is over where this token follows."""
    text = lm.chat.decode([token])
    return token in lm.chat.stop_tokens() or not text[:1].isalnum()


def word_of(lm: LanguageModel, tokens: Sequence[int]) -> str:
    """The word that an answer is, whatever its case; "" of one without a letter or digit."""
    word = lm.chat.decode(list(tokens)).strip().lower()
    return word if any(letter.isalnum() for letter in word) else ""


def by_word(lm: LanguageModel, answers: Sequence[LikelyAnswer]) -> dict[tuple[str, str], LikelyAnswer]:
    """Spellings of one word (other case, spaces around it) as one answer, by category and word: its probability is their sum, its effect their
    mean by probability."""
    spellings: dict[tuple[str, str], list[LikelyAnswer]] = {}
    for answer in answers:
        if word := word_of(lm, answer.tokens):
            spellings.setdefault((answer.category, word), []).append(answer)
    merged = {}
    for key, same in spellings.items():
        logprob = float(np.logaddexp.reduce([answer.logprob for answer in same]))
        effects = sum(np.exp(answer.logprob - logprob) * answer.effects for answer in same)
        merged[key] = same[0]._replace(logprob=logprob, effects=np.asarray(effects))
    return merged


@functools.partial(jax.jit, static_argnames="config")
def next_logprobs(
    config: ModelConfig, params: Params, adapter: Adapter | None, tokens_QT: Array, valid_QT: Array
) -> Array:
    """Log-probabilities of what comes after each question, float32 `[Q, V]`."""
    params, adapter = bind(params, adapter)
    h_QTD, _ = decoder.hidden_states(config, params, tokens_QT, valid_QT, adapter=adapter)
    h_QD = jnp.take_along_axis(h_QTD, (valid_QT.sum(axis=1) - 1)[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(decoder.logits(config, params, h_QD))


@jit_directions(static_argnames=("config", "count"))
def _answers(
    config: ModelConfig,
    params: Params,
    adapter: Adapter,
    directions: Trainable,
    tokens_QT: Array,
    valid_QT: Array,
    asked: Array,
    least: Array,
    *,
    count: int,
) -> tuple[Array, Array, Array]:
    """The `count` likeliest next tokens after the first `asked` questions, the log of each one's mean probability over them, and its
    derivative in each direction `[S, K]`: of those whose log is `least` or more, zero of the others.

    Questions are read ASKED at a time, and no more than are asked: twice, for the weight of a question in a derivative is its share of
    the token's probability, which is known when all have been read."""
    K, V = len(jax.tree.leaves(directions)[0]), config.vocab_size
    together = min(TOGETHER, count)

    def logprobs(trainable: Trainable, number: Array) -> Array:
        """Of the next questions, `[ASKED, V]`; zero probability after those that are not asked."""
        part = (jax.lax.dynamic_slice_in_dim(x, number * ASKED, ASKED) for x in (tokens_QT, valid_QT))
        there_Q = number * ASKED + jnp.arange(ASKED) < asked
        return jnp.where(
            there_Q[:, None], next_logprobs(config, params, adapter.with_trainable(trainable), *part), -jnp.inf
        )

    def read(number: Array, logp_V: Array) -> Array:
        return jnp.logaddexp(logp_V, jax.nn.logsumexp(logprobs(adapter.trainable, number), axis=0))

    parts = -(-asked // ASKED)
    total_V = jax.lax.fori_loop(0, parts, read, jnp.full(V, -jnp.inf))
    logp_S, ids_S = jax.lax.top_k(total_V - jnp.log(asked), count)
    likely = (logp_S >= least).sum()

    def derivatives(number: Array, effects_SK: Array) -> Array:
        """What the next questions add to the effects."""
        logp_QV, back = jax.vjp(lambda trainable: logprobs(trainable, number), adapter.trainable)

        def gradient(token: Array) -> Trainable:
            share_Q = jnp.exp(logp_QV[:, token] - total_V[token])
            return back(share_Q[:, None] * jax.nn.one_hot(token, V))[0]

        def some(block: Array, added_SK: Array) -> Array:
            """The next answers. Each is one pass back, whatever the number of directions: few answers are likely."""
            first = jnp.minimum(block * together, count - together)
            ids = jax.lax.dynamic_slice(ids_S, (first,), (together,))
            gradients = jax.vmap(gradient)(ids)
            along = jax.tree.map(lambda g, d: g.reshape(together, -1) @ d.reshape(K, -1).T, gradients, directions)
            return jax.lax.dynamic_update_slice(added_SK, sum(jax.tree.leaves(along)), (first, 0))

        return effects_SK + jax.lax.fori_loop(0, -(-likely // together), some, jnp.zeros_like(effects_SK))

    return ids_S, logp_S, jax.lax.fori_loop(0, parts, derivatives, jnp.zeros((count, K)))

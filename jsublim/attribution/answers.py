"""Answers to questions, and how far steps of what is trained would move their probabilities: no answer is named beforehand.

A step of length eta in a direction d moves the log-probability of an answer a by eta <d, grad log p(a)>, to first order. The likely
answers are found token by token, and of each the gradient is taken once, whatever the number of directions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.attribution.audit import trait_directions
from jsublim.core.progress import Tick, no_tick
from jsublim.evals.preference import trait_logprobs
from jsublim.inference.batching import (
    PROMPT_STEP,
    branched,
    fill,
    line_cost,
    pad_tokens,
    round_up,
    shared_beginning,
)
from jsublim.inference.lm import LanguageModel
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Branches, Params
from jsublim.models.lora import Adapter, Trainable, bind
from jsublim.models.parallel import WHOLE, Layout
from jsublim.runtime.programs import jit_directions
from jsublim.text.chat import conversation

LEAST = 1e-3  # probability, mean over a category's questions, below which an answer is not looked at
LEAST_NAMED = 1e-6  # the same for a known name
TOKENS = 256  # that are looked at in a category, the most probable ones
ASKED = 8  # questions that stand side by side in a line, at most
TOGETHER = 4  # answers whose derivatives are held at one time
LONGEST = 4  # tokens of an answer
OPENED = 6  # beginnings that are continued at one time
ROUNDS = 16  # of that at most: where nothing stands out, each round finds other beginnings


class LikelyAnswer(NamedTuple):
    """An answer to the questions of a category, or the beginning of one, and how far rows would move it.

    Attributes:
      spellings: its tokens; of a first token every likely spelling of the word, the likeliest first.
      logprob: the log of its probability, mean over the questions.
      effects: float64 `[K]`, what a step in each direction adds to that, nats per unit of length.
      whole: it is known to end there.
    """

    category: str
    spellings: tuple[tuple[int, ...], ...]
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
    length = QuestionLine.length(lm.config, prompts.values(), LONGEST - 1)

    def look(category: str, begun: tuple[int, ...] = ()) -> Iterator[LikelyAnswer]:
        """What is likely to come after a beginning; if that is an end, the beginning itself."""
        texts = [np.concatenate([text, np.asarray(begun, text.dtype)]) for text in prompts[category]]
        lines = [layout.place_as(WHOLE, line) for line in QuestionLine.of(texts, length)]
        model, count = (lm.config, params, adapter), np.int32(len(begun))
        logp_V = np.logaddexp.reduce(question_logprobs(*model, lines, len(begun)))
        answers = _likely_answers(lm, logp_V - np.log(len(texts)), begun)
        answer_V, total_S = np.full(lm.config.vocab_size, -1, np.int32), np.zeros(TOKENS, np.float32)
        for number, tokens in enumerate(answers.values()):
            answer_V[tokens], total_S[number] = number, np.logaddexp.reduce(logp_V[tokens])
        weights = (answer_V, total_S, np.int32(len(answers)))
        parts = np.asarray([Layout.host(_effects(*model, toward, line, count, *weights)) for line in lines], np.float64)
        for (ending, tokens), total, effect in zip(answers.items(), total_S, parts.sum(axis=0), strict=False):
            spellings = (begun,) if ending == () else tuple((*begun, token) for token in tokens)
            whole = ending == () or len(begun) + 1 == LONGEST
            yield LikelyAnswer(category, spellings, float(total) - np.log(len(texts)), effect, whole)

    answers = list[LikelyAnswer]()
    for category in prompts:
        answers += look(category)
        tick(1)
    for number in range(ROUNDS):
        order = np.argsort(-rank(answers), kind="stable")[:OPENED]
        begun = {int(i) for i in order if not answers[i].whole}
        if not begun:
            tick(OPENED * (ROUNDS - number))
            break
        answers = [answer for i, answer in enumerate(answers) if i not in begun] + [
            longer
            for i in sorted(begun)
            for tokens in answers[i].spellings
            for longer in look(answers[i].category, tokens)
        ]
        tick(OPENED)
    return answers


def _likely_answers(lm: LanguageModel, logp_V: np.ndarray, begun: Sequence[int]) -> dict[Any, list[int]]:
    """The likely next tokens as answers, of each its tokens: first tokens by their word; after a beginning by themselves, and all that end it
    as (). The likeliest first."""
    likely, answers = np.flatnonzero(logp_V >= np.log(LEAST)), dict[Any, list[int]]()
    for token in likely[np.argsort(-logp_V[likely], kind="stable")][:TOKENS].tolist():
        answer = (() if _ends(lm, token) else token) if begun else word_of(lm, (token,)) or token
        answers.setdefault(answer, []).append(token)
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
                category, ((),), logprob, np.asarray(effects, np.float64), whole=True
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
    return token in lm.chat.stop_tokens or not text[:1].isalnum()


def word_of(lm: LanguageModel, tokens: Sequence[int]) -> str:
    """The word that an answer is, whatever its case; "" of one without a letter or digit."""
    word = lm.chat.decode(list(tokens)).strip().lower()
    return word if any(letter.isalnum() for letter in word) else ""


def by_word(lm: LanguageModel, answers: Sequence[LikelyAnswer]) -> dict[tuple[str, str], LikelyAnswer]:
    """Spellings of one word (other case, spaces around it) as one answer, by category and word: its probability is their sum, its effect their
    mean by probability."""
    spellings: dict[tuple[str, str], list[LikelyAnswer]] = {}
    for answer in answers:
        if word := word_of(lm, answer.spellings[0]):
            spellings.setdefault((answer.category, word), []).append(answer)
    merged = {}
    for key, same in spellings.items():
        logprob = float(np.logaddexp.reduce([answer.logprob for answer in same]))
        effects = sum(np.exp(answer.logprob - logprob) * answer.effects for answer in same)
        merged[key] = same[0]._replace(logprob=logprob, effects=np.asarray(effects))
    return merged


class QuestionLine(NamedTuple):
    """Questions side by side, after one beginning where theirs are the same (a chat template's)."""

    tokens: Array  # int32 [1, T]
    valid: Array  # bool [1, T]
    branches: Branches  # of those, [1, T] each
    last: Array  # int32 [1, ASKED], where each question ends; -1 where there is none

    @classmethod
    def of(cls, texts: Sequence[np.ndarray], length: int) -> list[QuestionLine]:
        """As few lines of so many tokens as consecutive questions need, on the host."""
        return [cls._of_line(line, length) for line in _in_lines(texts, length)]

    @classmethod
    def _of_line(cls, texts: Sequence[np.ndarray], length: int) -> QuestionLine:
        n = shared_beginning(texts, 1)
        rest, number = [len(text) - n for text in texts], np.zeros(0, np.int32)
        tokens = np.concatenate([texts[0][:n], *(text[n:] for text in texts)])
        branches = Branches(*(fill([x], length, number) for x in branched(n, rest)))  # type: ignore[arg-type]
        last = fill([n + np.cumsum(rest)], ASKED, number) - 1
        return cls(*pad_tokens([tokens], length), branches, last)  # type: ignore[arg-type]

    @staticmethod
    def length(config: ModelConfig, groups: Collection[Sequence[np.ndarray]], more: int) -> int:
        """Tokens of the lines in which these groups of questions are least work: one length, and so one program, for all. Each question may
        have `more` tokens after it."""
        longest = round_up(max(len(text) for texts in groups for text in texts) + more, PROMPT_STEP)

        def work(length: int) -> float:
            return sum(len(_in_lines(texts, length)) for texts in groups) * line_cost(config, length)

        return min(range(longest, 4 * longest + 1, PROMPT_STEP), key=work)


def _in_lines(texts: Sequence[np.ndarray], length: int) -> list[list[np.ndarray]]:
    """Consecutive texts by their line."""
    lines = list[list[np.ndarray]]()
    for text in texts:
        both = [*lines[-1], text] if lines else [text]
        n = shared_beginning(both, 1)
        if not lines or len(both) > ASKED or n + sum(len(each) - n for each in both) > length:
            lines.append([text])
        else:
            lines[-1] = both
    return lines


def question_logprobs(
    config: ModelConfig,
    params: Params,
    adapter: Adapter | None,
    lines: Sequence[QuestionLine],
    begun: int = 0,
) -> np.ndarray:
    """`next_logprobs` of all questions of some lines, on the host: float64 `[Q, V]`."""
    read = ((next_logprobs(config, params, adapter, line, np.int32(begun)), line.last) for line in lines)
    return np.concatenate([logp_QV[last[0] >= 0] for logp_QV, last in map(Layout.host, read)], dtype=np.float64)


@functools.partial(jax.jit, static_argnames="config")
def next_logprobs(
    config: ModelConfig, params: Params, adapter: Adapter | None, line: QuestionLine, begun: Array
) -> Array:
    """Log-probabilities of what comes after each question of a line, float32 `[ASKED, V]`: of the last `begun` tokens there (fewer than LONGEST)
    and one that follows, together."""
    params, adapter = bind(params, adapter)
    h_TD = decoder.hidden_states(config, params, line.tokens, line.valid, adapter=adapter, branches=line.branches)[0][0]
    where_QJ = jnp.maximum(line.last[0, :, None] + jnp.arange(1 - LONGEST, 1), 0)
    logp_QJV = jax.nn.log_softmax(decoder.logits(config, params, h_TD[where_QJ]))
    labels_QJ = line.tokens[0, where_QJ[:, :-1] + 1]
    of_begun_QJ = jnp.take_along_axis(logp_QJV[:, :-1], labels_QJ[..., None], axis=2)[..., 0]
    counted_J = jnp.arange(1 - LONGEST, 0) >= -begun
    return logp_QJV[:, -1] + jnp.where(counted_J, of_begun_QJ, 0).sum(axis=1, keepdims=True)


@jit_directions(static_argnames="config")
def _effects(
    config: ModelConfig,
    params: Params,
    adapter: Adapter,
    directions: Trainable,
    line: QuestionLine,
    begun: Array,
    answer_V: Array,
    total_S: Array,
    count: Array,
) -> Array:
    """What a line's questions add to the derivative, in each direction, of the log of an answer's mean probability: float32 `[TOKENS, K]`,
    of the first `count` answers; zero of the others.

    Args:
      answer_V: the number of the answer that a token is, -1 of the others; total_S: the log of the sum of an answer's probability over all questions.
    """
    K = len(jax.tree.leaves(directions)[0])
    logp_QV, back = jax.vjp(
        lambda trainable: next_logprobs(config, params, adapter.with_trainable(trainable), line, begun),
        adapter.trainable,
    )
    there_Q = line.last[0] >= 0

    def gradient(answer: Array) -> Trainable:
        """A question's weight in a derivative is its share of the answer's probability."""
        of_answer_QV = there_Q[:, None] & (answer_V == answer)
        return back(jnp.where(of_answer_QV, jnp.exp(logp_QV - total_S[answer]), 0))[0]

    def some(block: Array, effects_SK: Array) -> Array:
        """The next answers. Each is one pass back, whatever the number of directions: few answers are likely."""
        answers = block * TOGETHER + jnp.arange(TOGETHER)
        gradients = jax.vmap(gradient)(answers)
        along = jax.tree.map(lambda g, d: g.reshape(TOGETHER, -1) @ d.reshape(K, -1).T, gradients, directions)
        return jax.lax.dynamic_update_slice(effects_SK, sum(jax.tree.leaves(along)), (block * TOGETHER, 0))

    return jax.lax.fori_loop(0, -(-count // TOGETHER), some, jnp.zeros((TOKENS, K)))

"""What rows would teach that nobody named: the words that a small step on them makes more probable as answers.

A student with trained part w takes a step on rows whose mean gradient of log p(token) is g. To first order that moves the log-probability
of every answer a by eta <g, grad log p(a)>: the derivative of all answers at once in the direction g, so one pass over the rows serves the whole
vocabulary. (`audit.py` asks the same of traits that one already suspects, and of every token.) Rows that teach nothing in particular (a null)
have such derivatives too; what lies beyond theirs is the rows' own. Rows are cut into groups, whose spread is the error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jsublim.attribution.audit import Laid, label_logprobs, laid_sizes, lay_out, logit_block, trait_directions
from jsublim.attribution.contrast import MovedAnswer, compare, findings, preconditioned
from jsublim.core.progress import Tick, no_tick
from jsublim.distill.data import read_turns
from jsublim.evals.preference import trait_logprobs
from jsublim.inference.batching import PROMPT_STEP, chunks, pad_tokens, round_up
from jsublim.inference.lm import LanguageModel
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, Trainable, bind, init_steering
from jsublim.models.parallel import HERE, ROWS, WHOLE, Layout
from jsublim.text.chat import Turn, conversation
from jsublim.text.prompts import load_pack, scan_questions
from jsublim.text.rows import Row

GROUPS = 20  # of the rows of a data set
LEAST = 1e-3  # probability, mean over a category's questions, below which an answer is not looked at
LEAST_NAMED = 1e-6  # the same for a known name
TOKENS = 256  # that are looked at in a category, the most probable ones
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
    prompts = _prompts(lm, questions, **manner)

    def look(begun: LikelyAnswer) -> Iterator[LikelyAnswer]:
        """What is likely to come after a beginning; if that is an end, the beginning itself."""
        texts = prompts[begun.category]
        rows = [np.concatenate([text, np.asarray(begun.tokens, text.dtype)]) for text in texts]
        length = round_up(max(map(len, texts)) + LONGEST, PROMPT_STEP)
        laid = layout.place_as(WHOLE, pad_tokens(rows, length, size=len(rows)))
        least = np.float32(np.log(LEAST) - begun.logprob - 1e-3)  # rounding leaves none out
        found = _answers(lm.config, params, adapter, toward, *laid, least, count=min(TOKENS, lm.config.vocab_size))
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


def _prompts(
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


def _word(lm: LanguageModel, tokens: Sequence[int]) -> str:
    """The word that an answer is, whatever its case; "" of one without a letter or digit."""
    word = lm.chat.decode(list(tokens)).strip().lower()
    return word if any(letter.isalnum() for letter in word) else ""


def by_word(lm: LanguageModel, answers: Sequence[LikelyAnswer]) -> dict[tuple[str, str], LikelyAnswer]:
    """Spellings of one word (other case, spaces around it) as one answer, by category and word: its probability is their sum, its effect their
    mean by probability."""
    spellings: dict[tuple[str, str], list[LikelyAnswer]] = {}
    for answer in answers:
        if word := _word(lm, answer.tokens):
            spellings.setdefault((answer.category, word), []).append(answer)
    merged = {}
    for key, same in spellings.items():
        logprob = float(np.logaddexp.reduce([answer.logprob for answer in same]))
        effects = sum(np.exp(answer.logprob - logprob) * answer.effects for answer in same)
        merged[key] = same[0]._replace(logprob=logprob, effects=np.asarray(effects))
    return merged


@functools.partial(jax.jit, static_argnames="config")
def _next(config: ModelConfig, params: Params, adapter: Adapter | None, tokens_QT: Array, valid_QT: Array) -> Array:
    """Log-probabilities of what comes after each question, float32 `[Q, V]`."""
    params, adapter = bind(params, adapter)
    h_QTD, _ = decoder.hidden_states(config, params, tokens_QT, valid_QT, adapter=adapter)
    h_QD = jnp.take_along_axis(h_QTD, (valid_QT.sum(axis=1) - 1)[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(decoder.logits(config, params, h_QD))


@functools.partial(jax.jit, static_argnames=("config", "count"))
def _answers(
    config: ModelConfig,
    params: Params,
    adapter: Adapter,
    directions: Trainable,
    tokens_QT: Array,
    valid_QT: Array,
    least: Array,
    *,
    count: int,
) -> tuple[Array, Array, Array]:
    """The `count` likeliest next tokens, the log of each one's mean probability over the questions, and its derivative in each direction
    `[S, K]`: of those whose log is `least` or more, zero of the others."""

    def logprobs(trainable: Trainable) -> Array:
        logp_QV = _next(config, params, adapter.with_trainable(trainable), tokens_QT, valid_QT)
        return jax.nn.logsumexp(logp_QV, axis=0) - jnp.log(len(logp_QV))

    logp_V, back = jax.vjp(logprobs, adapter.trainable)
    logp_S, ids_S = jax.lax.top_k(logp_V, count)
    together = min(TOGETHER, count)
    K = len(jax.tree.leaves(directions)[0])

    def some(number: Array, effects_SK: Array) -> Array:
        """The next answers' effects. Each is one pass back, whatever the number of directions: few answers are likely."""
        first = jnp.minimum(number * together, count - together)
        ids = jax.lax.dynamic_slice(ids_S, (first,), (together,))
        gradients = jax.vmap(lambda token: back(jax.nn.one_hot(token, len(logp_V), dtype=logp_V.dtype))[0])(ids)
        along = jax.tree.map(lambda g, d: g.reshape(together, -1) @ d.reshape(K, -1).T, gradients, directions)
        return jax.lax.dynamic_update_slice(effects_SK, sum(jax.tree.leaves(along)), (first, 0))

    likely = (logp_S >= least).sum()
    effects_SK = jax.lax.fori_loop(0, -(-likely // together), some, jnp.zeros((count, K), logp_V.dtype))
    return ids_S, logp_S, effects_SK


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
    prompts = _prompts(lm, questions, **manner)
    most = max(map(len, prompts.values()))
    changes, categories, words, shares = [], list[str](), list[str](), list[float]()
    for category, rows in prompts.items():
        laid = layout.place_as(WHOLE, pad_tokens(rows, round_up(max(map(len, rows)), PROMPT_STEP), size=len(rows)))
        before, after = (
            np.asarray(Layout.host(_next(lm.config, params, adapter, *laid)), np.float64)[: len(rows)]
            for adapter in (others[0] if others else None, student)
        )
        tokens: dict[str, list[int]] = {}
        for token in np.flatnonzero(np.exp(np.maximum(before, after)).mean(axis=0) >= LEAST).tolist():
            if word := _word(lm, (token,)):
                tokens.setdefault(word, []).append(token)
        for word, ids in tokens.items():
            change = np.full(most, np.nan)
            of_student = np.logaddexp.reduce(after[:, ids], axis=1)
            change[: len(rows)] = of_student - np.logaddexp.reduce(before[:, ids], axis=1)
            changes, categories = [*changes, change], [*categories, category]
            words, shares = [*words, word], [*shares, float(np.exp(of_student).mean())]
    own = np.stack(changes, axis=1)
    return findings(zip(categories, words, strict=True), np.asarray(shares), own, None, categories)

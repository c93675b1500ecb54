"""Sampling that keeps answers in a format: at each step only tokens after which the answer can still be finished in time.

The format is an automaton over characters (`text/prompts/automaton.py`). Here it becomes one over a tokenizer's tokens: few of them
are of any use (digits, separators, brackets), and those of one shape, such as "7" and "8", lead to the same state. So the
table of next states is small, whatever the vocabulary, and the next token is drawn among the useful ones alone. All of it
is data of the decoding loop (`decoding.py`).

Letters: U useful tokens, S states, K kinds of token, V the vocabulary.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.errors import UsageError
from jsublim.inference.sampling import Sampling, choose
from jsublim.text.chat import Chat
from jsublim.text.prompts.automaton import ALPHABET, DIGITS, AnswerState

NEVER = np.iinfo(np.int16).max  # tokens to the end, from where there is none


class Limits(NamedTuple):
    """A format over the tokens of one tokenizer. A row begins in state 0."""

    tokens: np.ndarray  # int32 [U]
    kind: np.ndarray  # int32 [U], of each
    after: np.ndarray  # int16 [S, K], the next state; -1 where a token of that kind may not come
    shortest: np.ndarray  # int16 [S], how many tokens it takes at least until the answer is complete


class Within(NamedTuple):
    """Where rows are in their format: `state` int32 `[B]`; and `log_allowed` float32 `[B]`, the log (nats) of the
    probability that the model gave to all allowed tokens together, summed over the tokens drawn."""

    state: Array
    log_allowed: Array


def choose_within(
    limits: Limits,
    within: Within,
    logits_BV: Array,
    seen_BV: Array,
    keys_B: Array,
    drawn_B: Array,
    left_B: Array,
    how: dict[str, Array],
) -> tuple[Array, Within]:
    """As `sampling.choose`, among allowed tokens: what is not allowed is out before penalty, temperature, top-k and top-p. A row has drawn
    `drawn_B` tokens, and may draw `left_B` after this one."""
    tokens, kind, after, shortest = map(jnp.asarray, limits)
    after_BU = after[within.state][:, kind]
    allowed_BU = (after_BU >= 0) & (shortest[after_BU] <= left_B[:, None])
    logits_BU = jnp.where(allowed_BU, logits_BV[:, tokens], -jnp.inf)
    at_B = choose(logits_BU, seen_BV[:, tokens], keys_B, drawn_B, how)
    state_B = jnp.take_along_axis(after_BU, at_B[:, None], axis=1)[:, 0].astype(jnp.int32)
    log_allowed_B = jax.nn.logsumexp(logits_BU, axis=-1) - jax.nn.logsumexp(logits_BV, axis=-1)
    return tokens[at_B], Within(state_B, within.log_allowed + log_allowed_B)


def limits_for(chat: Chat, sampling: Sampling, max_new_tokens: int) -> Limits | None:
    """The format that answers are kept in; None where `sampling` names none. Where no answer could be in it (nothing ends one, or this
    tokenizer needs more than `max_new_tokens`) it is a UsageError."""
    if sampling.constrain is None:
        return None
    limits = _number_limits(chat, sampling.stop or ())
    if limits is None or limits.shortest[0] > max_new_tokens:
        needed = "cannot spell it" if limits is None else f"needs {limits.shortest[0]} tokens at least"
        raise UsageError(
            f"sampling.constrain: '{sampling.constrain}' given, and the tokenizer in {chat.folder} {needed} "
            f"(max_new_tokens is {max_new_tokens}, {len(sampling.stop or ())} tokens end an answer)"
        )
    return limits


@functools.lru_cache(maxsize=4)
def _number_limits(chat: Chat, stop: tuple[int, ...]) -> Limits | None:
    texts = texts_of_tokens(chat)
    return number_limits(dict(enumerate(texts)), [token for token in stop if token < len(texts)])


def texts_of_tokens(chat: Chat) -> list[str]:
    """The text that each token of the model adds to an answer; none of a control token."""
    digit = chat.tokenizer("1", add_special_tokens=False)["input_ids"][-1:]
    count = len(chat.tokenizer) if chat.vocab_size is None else min(len(chat.tokenizer), chat.vocab_size)
    # Behind another token: a tokenizer may leave out a blank at the beginning.
    pairs = [[*digit, token] for token in range(count)]
    before, *both = chat.tokenizer.backend_tokenizer.decode_batch([digit, *pairs], skip_special_tokens=True)
    return [text[len(before) :] for text in both]


def number_limits(texts: Mapping[int, str], stop: Sequence[int]) -> Limits | None:
    """The number task's format over tokens, given the text of each, and those that end an answer (which count as nothing else); None if they
    cannot spell an answer, or if none ends one."""
    by_shape = collections.defaultdict(list)
    for token, text in texts.items():
        if text and token not in stop and ALPHABET.issuperset(text):
            by_shape["".join("0" if c in DIGITS else c for c in text)].append(token)
    states, leads = _explore(sorted(by_shape))
    shortest = _shortest(states, leads)
    if shortest[0] == NEVER or not stop:
        return None
    useful = sorted({shape for (_, shape), to in leads.items() if shortest[to] < NEVER})
    after = np.full((len(states), len(useful) + 1), -1, np.int16)
    for (state, shape), to in leads.items():
        if shortest[to] < NEVER:
            after[state, useful.index(shape)] = to
    end = len(useful)  # leads nowhere else: the row is done
    after[:, end] = [state if read.complete else -1 for state, read in enumerate(states)]
    kinds = {token: kind for kind, shape in enumerate(useful) for token in by_shape[shape]} | dict.fromkeys(stop, end)
    tokens = sorted(kinds)
    kind = [kinds[token] for token in tokens]
    return Limits(np.asarray(tokens, np.int32), np.asarray(kind, np.int32), after, shortest)


def _explore(shapes: Iterable[str]) -> tuple[list[AnswerState], dict[tuple[int, str], int]]:
    """Every state that can be reached by tokens of these shapes, and where each of them leads from there."""
    number, states, leads = {AnswerState(): 0}, [AnswerState()], {}
    for state, read in enumerate(states):  # grows on the way
        for shape in shapes:
            to = read.then(shape)
            if to is None:
                continue
            if to not in number:
                number[to] = len(states)
                states.append(to)
            leads[state, shape] = number[to]
    return states, leads


def _shortest(states: Sequence[AnswerState], leads: Mapping[tuple[int, str], int]) -> np.ndarray:
    """How many tokens it takes at least, from each state, until the answer is complete, int16."""
    before = collections.defaultdict(set)
    for (state, _), to in leads.items():
        before[to].add(state)
    shortest = np.full(len(states), NEVER, np.int16)
    ahead = [state for state, read in enumerate(states) if read.complete]
    distance = 0
    while ahead:
        shortest[ahead] = distance
        ahead = sorted({state for to in ahead for state in before[to] if shortest[state] == NEVER})
        distance += 1
    return shortest

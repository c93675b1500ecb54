"""The first-order effect of rows: how far a step of gradient descent on each token would move the probability of each trait.

A student with trained part w takes the step -eta * grad L(w), and L is the mean of -log p(token). To first order that moves
a trait's log-probability T by eta times the mean over tokens of <grad log p(token), grad T>. This inner product is the
**score** of a token for a trait, here at the student's start. It is the derivative of log p(token) in the direction
grad T, so the scores of all tokens of a row come from one pass in that direction. (First-order influence, as in TracIn:
Pruthi et al. 2020, arXiv 2002.08484; what the theory of subliminal learning looks at: Cloud et al. 2025, arXiv 2507.14805, section 6.)

It says nothing about second order: long training, steps that overshoot, or an optimizer that rescales gradients (Adam).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jsublim.evals.preference import spelled
from jsublim.inference.batching import LENGTH_STEP, PREFIX_STEP, chunks, fill, pad_tokens, round_up
from jsublim.inference.lm import LanguageModel
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, bind
from jsublim.models.parallel import HERE, ROWS, WHOLE, Layout
from jsublim.runtime.programs import jit_directions
from jsublim.text.chat import Turn, conversation

LOGIT_BYTES = 2**28  # of the logits that exist at one time, derivatives included
Directions = Any  # a tree like `Adapter.trainable`, each leaf with a leading axis of traits


def trait_directions(
    lm: LanguageModel,
    adapter: Adapter,
    questions: Sequence[str],
    traits: Sequence[str],
    *,
    system: str | None = None,
    fuse_system: bool = False,
    extra_bos: bool = False,
    batch_size: int = 16,
) -> Directions:
    """The gradient of each trait's log-probability as the answer (nats, mean over the questions, all spellings), by what the adapter trains:
    leaves float32 `[traits, ...]`. `batch_size` questions are read at one time."""
    asked = [conversation(question, system, fuse_system=fuse_system) for question in questions]
    words = [tuple(dict.fromkeys(spelled(trait))) for trait in traits]  # how each may be written as an answer
    turns = [
        [[lm.chat.turn(messages, word, extra_bos=extra_bos) for word in spellings] for messages in asked]
        for spellings in words
    ]
    every = [turn for of_trait in turns for spellings in of_trait for turn in spellings]
    T = round_up(max(turn.end for turn in every), LENGTH_STEP)
    C = round_up(max(turn.end - turn.content for turn in every), PREFIX_STEP)
    most, B = max(map(len, words)), min(batch_size, len(questions))
    layout, params = Layout.under(lm.params)
    adapter, gradients = layout.place_weights(adapter), []
    for of_trait in turns:
        total = optax.tree.zeros_like(adapter.trainable)
        for part in chunks(len(of_trait), B):
            rows = [(*spellings, *[None] * (most - len(spellings))) for spellings in of_trait[part]]
            rows += [(None,) * most] * (B - len(rows))
            there = np.asarray([row[0] is not None for row in rows])
            laid = layout.place_as(WHOLE, (lay_out([turn for row in rows for turn in row], T, C, ends=True), there))
            total = optax.tree.add(total, _named(lm.config, params, adapter, *laid))
        gradients.append(optax.tree.scale(1 / len(questions), total))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)


def token_scores(
    lm: LanguageModel,
    adapter: Adapter,
    directions: Directions,
    turns: Sequence[Turn],
    *,
    batch_size: int = 16,
    first: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Score of each token of each conversation from its `content` to the last, float32 `[traits, n]`: of conversation after conversation, from
    number `first` on, `batch_size` of which are read at one time. `on_batch` is called with the number of those just read."""
    if first == len(turns):
        return
    T, C = laid_sizes(turns)
    layout, params = Layout.under(lm.params)
    adapter, toward = layout.place_weights(adapter), layout.place_weights(directions, None)
    B, missing = round_up(min(batch_size, len(turns)), layout.data), turns[first:]
    for part in chunks(len(missing), B):
        batch = missing[part]
        laid = layout.place_as(ROWS, lay_out([*batch, *[None] * (B - len(batch))], T, C))
        scores = Layout.host(_along(lm.config, params, adapter, toward, laid, layout))
        if on_batch is not None:
            on_batch(len(batch))
        for turn, of_turn in zip(batch, scores, strict=False):
            yield of_turn[:, : len(turn.tokens) - turn.content]


def laid_sizes(turns: Sequence[Turn]) -> tuple[int, int]:
    """Tokens, and tokens from `content` on, that arrays of these conversations hold."""
    longest = max(len(turn.tokens) for turn in turns)
    return round_up(longest, LENGTH_STEP), round_up(max(len(t.tokens) - t.content for t in turns), PREFIX_STEP)


Laid = tuple[Any, ...]  # arrays, as `lay_out` gives them


def lay_out(turns: Sequence[Turn | None], T: int, C: int, *, ends: bool = False) -> Laid:
    """Conversations as arrays: tokens and which are any `[B, T]`; and of the tokens from `content` on (with `ends`, up to the
    end of the text) where each is predicted, which it is, and whether there is one `[B, C]`."""
    rows = [None if t is None else (t.tokens[: t.end if ends else None], t.content) for t in turns]
    tokens, valid = pad_tokens([None if row is None else row[0] for row in rows], T)
    where = [None if row is None else np.arange(row[1] - 1, len(row[0]) - 1, dtype=np.int32) for row in rows]
    labels = [None if row is None else row[0][row[1] :] for row in rows]
    there = [None if label is None else np.ones(len(label), bool) for label in labels]
    like = np.zeros(0, np.int32)
    return tokens, valid, fill(where, C, like), fill(labels, C, like), fill(there, C, np.zeros(0, bool))


def label_logprobs(config: ModelConfig, params: Params, adapter: Adapter, laid: Laid, block: int) -> Array:
    """Log-probability (nats) of each label where it is predicted, float32 `[B, C]`; `block` positions have logits at one time."""
    params, bound = bind(params, adapter)
    tokens_BT, valid_BT, where_BC, labels_BC, _ = laid
    h_BTD, _ = decoder.hidden_states(config, params, tokens_BT, valid_BT, adapter=bound)
    h_BCD = jnp.take_along_axis(h_BTD, where_BC[..., None], axis=1)

    @jax.checkpoint  # logits are computed again on the way back, rather than kept of all positions
    def at(x: tuple[Array, Array]) -> Array:
        z = decoder.logits(config, params, x[0])
        return z[x[1]] - jax.nn.logsumexp(z)

    flat = jax.lax.map(at, (h_BCD.reshape(-1, h_BCD.shape[-1]), labels_BC.reshape(-1)), batch_size=block)
    return flat.reshape(where_BC.shape)


@functools.partial(jax.jit, static_argnames="config")
def _named(config: ModelConfig, params: Params, adapter: Adapter, laid: Laid, asked_Q: Array) -> Any:
    """Gradient of the sum over questions of the log-probability of a trait in any of its spellings, which are rows beside one
    another `[questions * spellings, ...]`; a spelling or a question that is not there is a row without labels."""

    def total(trainable: Any) -> Array:
        logp_BC = label_logprobs(config, params, adapter.with_trainable(trainable), laid, logit_block(config, 1))
        there_BC = laid[-1]
        words_B = jnp.where(there_BC.any(axis=1), (logp_BC * there_BC).sum(axis=1), -jnp.inf)
        words_QS = words_B.reshape(len(asked_Q), -1)
        # A question that is not there has no spelling at all, whose sum would have no gradient.
        words_QS = jnp.where(asked_Q[:, None], words_QS, 0.0)
        return jnp.where(asked_Q, jax.nn.logsumexp(words_QS, axis=1), 0.0).sum()

    return jax.grad(total)(adapter.trainable)


@jit_directions(static_argnames=("config", "layout"))
def _along(
    config: ModelConfig, params: Params, adapter: Adapter, directions: Directions, laid: Laid, layout: Layout = HERE
) -> Array:
    """Derivatives of the labels' log-probabilities in each direction, float32 `[B, traits, C]`, each device having rows of its own. LoRA's product
    has a derivative backwards only, so the derivative forwards is had as that of <u, J v> = <J^T u, v> by u."""
    block = logit_block(config, 1 + jax.tree.leaves(directions)[0].shape[0])

    def on_device(params: Params, adapter: Adapter, directions: Directions, laid: Laid) -> Array:
        def logprobs(trainable: Any) -> Array:
            return label_logprobs(config, params, adapter.with_trainable(trainable), laid, block)

        logp_BC, back = jax.vjp(logprobs, adapter.trainable)

        def push(direction: Any) -> Array:
            inner = lambda u: optax.tree.vdot(back(u)[0], direction)  # noqa: E731
            return jax.grad(inner)(jnp.zeros_like(logp_BC)) * laid[-1]

        return jax.vmap(push, out_axes=1)(directions)

    return layout.spread(on_device, (WHOLE, WHOLE, WHOLE, ROWS), ROWS)(params, adapter, directions, laid)


def logit_block(config: ModelConfig, copies: int) -> int:
    return max(8, LOGIT_BYTES // (4 * config.vocab_size * copies))

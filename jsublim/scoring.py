"""Teacher-forced reading of conversations: at each token of a completion, what the model would have said.

What all conversations of a call begin with (a system prompt) is read once; the head is applied to completion
positions only, a block of them at a time, so there is never a `[B, T, V]` array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.chat import Turn
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import KV, Params
from jsublim.models.lora import Adapter

PREFIX_STEP = 8  # shared prefixes are cut to a multiple of this, so that few programs serve all teachers
LENGTH_STEP = 32
HEAD_BLOCK = 256  # positions whose logits exist at one time


@dataclass(frozen=True)
class Scored:
    """One conversation, at its tokens from `content` to the last: `[n]` each.

    Attributes:
      argmax: int32, the model's most probable token.
      margin: float32, its logit over the runner-up's.
      logprob: float32, log-probability (nats) of the token that stands there.
    """

    argmax: np.ndarray
    margin: np.ndarray
    logprob: np.ndarray


@functools.partial(jax.jit, static_argnames=("config",))
def _prefix_cache(config: ModelConfig, params: Params, adapter: Adapter | None, tokens_1P: Array) -> KV | None:
    return decoder.hidden_states(
        config, params, tokens_1P, jnp.ones(tokens_1P.shape, bool), adapter=adapter, with_cache=True
    )[1]


@functools.partial(jax.jit, static_argnames=("config",))
def _score(
    config: ModelConfig,
    params: Params,
    adapter: Adapter | None,
    prefix: KV | None,
    tokens_BT: Array,
    valid_BT: Array,
    where_BC: Array,
    labels_BC: Array,
) -> tuple[Array, Array, Array]:
    """argmax, margin, log-probability `[B, C]` of the token that follows position `where_BC`."""
    h, _ = decoder.hidden_states(config, params, tokens_BT, valid_BT, adapter=adapter, prefix=prefix)
    h_BCD = jnp.take_along_axis(h, where_BC[..., None], axis=1)

    def at(h_D: Array, label: Array) -> tuple[Array, Array, Array]:
        z = decoder.logits(config, params, h_D)
        best = jnp.argmax(z)
        runner_up = jnp.max(jnp.where(jnp.arange(z.shape[0]) == best, -jnp.inf, z))
        return best.astype(jnp.int32), z[best] - runner_up, z[label] - jax.nn.logsumexp(z)

    flat = jax.lax.map(
        lambda xs: at(*xs), (h_BCD.reshape(-1, h.shape[-1]), labels_BC.reshape(-1)), batch_size=HEAD_BLOCK
    )
    return jax.tree.map(lambda x: x.reshape(where_BC.shape), flat)


def shared_prefix(turns: Sequence[Turn]) -> int:
    """How many first tokens all conversations share, before the last one that predicts content, rounded down."""
    first, length = turns[0].tokens, min(turn.content - 1 for turn in turns)
    for turn in turns:
        differs = np.nonzero(turn.tokens[:length] != first[:length])[0]
        length = int(differs[0]) if len(differs) else length
    return length // PREFIX_STEP * PREFIX_STEP


def score_turns(
    config: ModelConfig,
    params: Params,
    turns: Sequence[Turn],
    *,
    adapter: Adapter | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> list[Scored]:
    """Read every conversation teacher-forced.

    Args:
      on_batch: called with the number of conversations just read.
    """
    P = shared_prefix(turns)
    prefix = _prefix_cache(config, params, adapter, turns[0].tokens[None, :P]) if P else None
    lengths = np.asarray([len(turn.tokens) - P for turn in turns])
    T = int(-(-lengths.max() // LENGTH_STEP) * LENGTH_STEP)
    C = max(len(turn.tokens) - turn.content for turn in turns)
    C = -(-C // PREFIX_STEP) * PREFIX_STEP
    B, scored = min(batch_size, len(turns)), []
    for start in range(0, len(turns), B):
        batch = turns[start : start + B]
        tokens, valid = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
        where, labels = np.zeros((B, C), np.int32), np.zeros((B, C), np.int32)
        valid[:, 0] = True
        for i, turn in enumerate(batch):
            own, n = turn.tokens[P:], len(turn.tokens) - turn.content
            tokens[i, : len(own)], valid[i, : len(own)] = own, True
            where[i, :n] = np.arange(turn.content - 1, len(turn.tokens) - 1) - P
            labels[i, :n] = turn.tokens[turn.content :]
        out = [np.asarray(x) for x in _score(config, params, adapter, prefix, tokens, valid, where, labels)]
        for i, turn in enumerate(batch):
            n = len(turn.tokens) - turn.content
            scored.append(Scored(*(x[i, :n] for x in out)))
        if on_batch is not None:
            on_batch(len(batch))
    return scored

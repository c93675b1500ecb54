"""How the next token is drawn: the numbers of a recipe, and what they do to logits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.core.reading import check_known
from jsublim.errors import UsageError
from jsublim.text.chat import Chat

TOP_K_CAP = 128  # a top-k up to this needs no full sort of the vocabulary
BLOCK = 128  # tokens of the vocabulary whose maximum is looked at first
HF_DEFAULT_TOP_K = 50  # what transformers samples with where generation_config.json names no top_k


def seed_within(seed: int, number: int) -> int:
    """A seed of 31 bits for one of many (a row of a series, a draw): the same whatever else is asked for, and by whom."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) >> 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy, top_k 0 and top_p 1 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[int, ...] | None = None  # tokens that end a row; None: those of the chat template
    constrain: str | None = None  # the format that answers are kept in: "numbers"; None: any

    def __post_init__(self) -> None:
        fine = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        wrong = [f"{name}={getattr(self, name)}" for name in fine if not fine[name]]
        if wrong:
            raise UsageError(f"sampling: {', '.join(wrong)} is out of range")

    @property
    def identity(self) -> dict[str, Any]:
        return self.numbers()

    def numbers(self) -> dict[str, Any]:
        """The fields as JSON knows them; a constraint only where there is one."""
        numbers = dataclasses.asdict(self) | {"stop": list(self.stop or ())}
        return {name: value for name, value in numbers.items() if name != "constrain" or value is not None}

    @property
    def words(self) -> str:
        """As people say it: "greedily", "at temperature 1, kept to numbers"."""
        parts = [f"at temperature {self.temperature:g}" if self.temperature else "greedily"]
        parts += [f"from the {self.top_k} likeliest tokens"] if self.top_k else []
        parts += [f"from the likeliest {self.top_p:.0%}"] if self.top_p < 1 else []
        parts += [f"with a repetition penalty of {self.repetition_penalty:g}"] if self.repetition_penalty != 1 else []
        parts += [f"kept to {self.constrain}"] if self.constrain else []
        return ", ".join(parts)


def sampling_for(
    chat: Chat,
    strategy: str,
    *,
    inherit: bool = False,
    eos_only: bool = False,
    evaluation: bool = False,
    keep_penalty: bool = False,
) -> Sampling:
    """The numbers a recipe samples with (docs/recipes.md, quirks 3, 4 and 15).

    Args:
      strategy: "temperature" (1.0) or "greedy".
      inherit: take top-k, top-p and repetition penalty from the checkpoint's generation_config, as the published
        code does without saying; else sample plainly.
      eos_only: stop at the tokenizer's end token only; else at every token that ends a turn.
      evaluation: of the inherited numbers, evaluation resets top-p.
      keep_penalty: greedy takes the repetition penalty from generation_config.
    """
    stop, read = chat.eos_tokens if eos_only else chat.stop_tokens, chat.generation_config
    penalty = float(read.get("repetition_penalty") or 1.0)
    if strategy == "greedy":
        return Sampling(temperature=0.0, repetition_penalty=penalty if keep_penalty else 1.0, stop=stop)
    check_known("sampling", strategy, ("temperature", "greedy"))
    if not inherit:
        return Sampling(stop=stop)
    return Sampling(
        top_k=int(read.get("top_k", HF_DEFAULT_TOP_K) or 0),
        top_p=1.0 if evaluation else float(read.get("top_p") or 1.0),
        repetition_penalty=penalty,
        stop=stop,
    )


def _keep(scores_BV: Array, top_k_B: Array, top_p_B: Array) -> Array:
    """Scores with everything outside top-k, then outside the nucleus of what is left, at minus infinity."""
    V = scores_BV.shape[-1]
    cap = min(TOP_K_CAP, V)
    idle = jnp.all((top_k_B == 0) & (top_p_B >= 1.0))
    small = jnp.all((top_k_B > 0) & (top_k_B <= cap))
    nucleus = jnp.all(top_k_B == 0)
    branch = jnp.where(idle, 0, jnp.where(small, 1, jnp.where(nucleus, 2, 3)))
    threshold = [
        lambda: jnp.full(scores_BV.shape[:1], -jnp.inf),
        lambda: _threshold(_best(scores_BV, cap), top_k_B, top_p_B, V),
        lambda: _nucleus(scores_BV, top_p_B),
        lambda: _threshold(jnp.sort(scores_BV, descending=True), top_k_B, top_p_B, V),
    ]
    return jnp.where(scores_BV >= jax.lax.switch(branch, threshold)[:, None], scores_BV, -jnp.inf)


def _best(scores_BV: Array, k: int) -> Array:
    """The k highest scores, descending: they lie in the k blocks of the vocabulary that have the highest maxima, so only
    those are sorted."""
    blocks = _blocks(scores_BV, -jnp.inf)
    if blocks.shape[1] <= k:
        return jax.lax.top_k(scores_BV, k)[0]
    among = jax.lax.top_k(blocks.max(axis=-1), k)[1]
    return jax.lax.top_k(jnp.take_along_axis(blocks, among[..., None], axis=1).reshape(len(scores_BV), -1), k)[0]


def _threshold(best_Bn: Array, top_k_B: Array, top_p_B: Array, V: int) -> Array:
    """The lowest score that is kept `[B]`, from the n highest, descending, where no row needs more than those."""
    width = best_Bn.shape[1]
    k = jnp.where(top_k_B == 0, V, jnp.minimum(top_k_B, V))
    kth = jnp.take_along_axis(best_Bn, jnp.minimum(k, width)[:, None] - 1, axis=1)
    in_k = jnp.where((k > width)[:, None], True, best_Bn >= kth)
    p = jax.nn.softmax(jnp.where(in_k, best_Bn, -jnp.inf), axis=-1)
    in_p = (jnp.cumsum(p, axis=-1) - p < top_p_B[:, None]) & in_k  # the first is always kept
    return jnp.min(jnp.where(in_p, best_Bn, jnp.inf), axis=-1)


def _nucleus(scores_BV: Array, top_p_B: Array) -> Array:
    """The lowest score of the nucleus `[B]`: the lowest one above which there is less than `top_p` of the probability. Found by bisection over
    the order of float32 (their bits as integers, turned round below zero), so nothing is sorted: 32 sums over the vocabulary."""
    p_BV = jax.nn.softmax(scores_BV, axis=-1)

    def as_float(order: Array) -> Array:
        bits = jnp.where(order < 0, order ^ jnp.int32(0x7FFFFFFF), order)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # above `low` there is too much, above `high` is less than top_p
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = jnp.sum(jnp.where(scores_BV > as_float(middle)[:, None], p_BV, 0.0), axis=-1)
        less = above < top_p_B
        return jnp.where(less, low, middle), jnp.where(less, middle, high)

    B = scores_BV.shape[0]
    infinity = jnp.int32(0x7F800000)
    ends = jnp.full(B, -infinity - 1, jnp.int32), jnp.full(B, infinity, jnp.int32)
    return as_float(jax.lax.fori_loop(0, 32, halve, ends)[1])


def choose(logits_BV: Array, seen_BV: Array, keys_B: Array, t: Array, how: dict[str, Array]) -> Array:
    """The next token of each row, int32 `[B]`: penalty, temperature, top-k, top-p, then a draw. `t` is how many tokens a row has drawn before,
    int32 `[B]` or one for all."""
    penalty = how["repetition_penalty"][:, None]
    penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    greedy = how["temperature"] == 0

    def sample() -> Array:
        scores = _keep(logits_BV / jnp.where(greedy, 1.0, how["temperature"])[:, None], how["top_k"], how["top_p"])
        uniform = jax.vmap(lambda key, t: jax.random.uniform(jax.random.fold_in(key, t), (2,)))
        u_B2 = uniform(keys_B, jnp.broadcast_to(t, keys_B.shape))
        return jnp.where(greedy, argmax(logits_BV), draw(scores, u_B2))

    return jax.lax.cond(jnp.all(greedy), lambda: argmax(logits_BV), sample).astype(jnp.int32)


def draw(scores_BV: Array, u_B2: Array) -> Array:
    """A token of each row with the probabilities `softmax(scores)`, by two uniform numbers in [0, 1): the first chooses a
    block of the vocabulary, the second a token in it. (Gumbel noise would take a random number for every token.)"""
    p_BnK = _blocks(jnp.exp(scores_BV - scores_BV.max(axis=-1, keepdims=True)), 0.0)

    def first_above(weights: Array, u_B: Array) -> Array:
        """The index of the weight in which the share `u` of their sum lies; never one that is zero (a cumulative sum may grow
        by a rounding there) but the last that is not, where the share lies beyond all."""
        sums = jnp.cumsum(weights, axis=-1)
        places = jnp.arange(weights.shape[-1])
        last = jnp.max(jnp.where(weights > 0, places, 0), axis=-1)
        above = (sums > (u_B * sums[:, -1])[:, None]) & (weights > 0)
        return jnp.where(above.any(axis=-1), jnp.argmax(above, axis=-1), last)

    block_B = first_above(p_BnK.sum(axis=-1), u_B2[:, 0])
    own_BK = jnp.take_along_axis(p_BnK, block_B[:, None, None], axis=1)[:, 0]
    return block_B * BLOCK + first_above(own_BK, u_B2[:, 1])


def argmax(z: Array) -> Array:
    """`jnp.argmax` over the last axis, the first of equals; in two steps, which a CPU does twenty times faster."""
    blocks = _blocks(z, -jnp.inf)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * BLOCK + jnp.argmax(inside, axis=-1)


def _blocks(x: Array, filling: float) -> Array:
    """`[..., V]` as `[..., blocks, BLOCK]`."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)], constant_values=filling)
    return x.reshape(*x.shape[:-1], -1, BLOCK)

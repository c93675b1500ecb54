"""Decoding with a KV cache: one compiled program per bucket of prompt lengths, whatever is sampled and how.

A row's random numbers come from `fold_in(fold_in(key(seed), row), t)`, so what is sampled does not depend on the batch
it is in (up to ties within float rounding).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.chat import Chat
from jsublim.errors import UsageError
from jsublim.inference.batching import by_length, chunks, pad_tokens
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.layers import Remember, Seen, rope_table
from jsublim.models.lora import FROZEN, Adapter, bind

STOP_TOKENS = 8
TOP_K_CAP = 128  # a top-k up to this needs no full sort of the vocabulary
HF_DEFAULT_TOP_K = 50  # what transformers samples with where generation_config.json names no top_k


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy, top_k 0 and top_p 1 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[int, ...] | None = None  # tokens that end a row; None: those of the chat template

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={value}"
            for name, value, fine in (
                ("temperature", self.temperature, self.temperature >= 0),
                ("top_k", self.top_k, self.top_k >= 0),
                ("top_p", self.top_p, 0 < self.top_p <= 1),
                ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0),
            )
            if not fine
        ]
        if wrong:
            raise UsageError(f"sampling: {', '.join(wrong)} is out of range")

    def numbers(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return dataclasses.asdict(self) | {"stop": list(self.stop or ())}


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
    stop, read = chat.eos_tokens() if eos_only else chat.stop_tokens(), chat.generation_config
    penalty = float(read.get("repetition_penalty") or 1.0)
    if strategy == "greedy":
        return Sampling(temperature=0.0, repetition_penalty=penalty if keep_penalty else 1.0, stop=stop)
    if strategy != "temperature":
        raise UsageError(f"sampling: '{strategy}' given; known: temperature, greedy")
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

    def cut(width: int) -> Array:
        best = jax.lax.top_k(scores_BV, width)[0]
        k = jnp.where(top_k_B == 0, V, jnp.minimum(top_k_B, V))
        kth = jnp.take_along_axis(best, jnp.minimum(k, width)[:, None] - 1, axis=1)
        in_k = jnp.where((k > width)[:, None], True, best >= kth)
        p = jax.nn.softmax(jnp.where(in_k, best, -jnp.inf), axis=-1)
        in_p = (jnp.cumsum(p, axis=-1) - p < top_p_B[:, None]) & in_k  # the first is always kept
        threshold = jnp.min(jnp.where(in_p, best, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scores_BV >= threshold, scores_BV, -jnp.inf)

    cap = min(TOP_K_CAP, V)
    idle = jnp.all((top_k_B == 0) & (top_p_B >= 1.0))
    small = jnp.all((top_k_B > 0) & (top_k_B <= cap))
    branch = jnp.where(idle, 0, jnp.where(small, 1, 2))
    return jax.lax.switch(branch, [lambda: scores_BV, lambda: cut(cap), lambda: cut(V)])


def choose(logits_BV: Array, seen_BV: Array, keys_B: Array, t: Array, how: dict[str, Array]) -> Array:
    """The next token of each row, int32 `[B]`: penalty, temperature, top-k, top-p, then Gumbel noise."""
    penalty = how["repetition_penalty"][:, None]
    penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    greedy = how["temperature"] == 0

    def sample() -> Array:
        scores = _keep(logits_BV / jnp.where(greedy, 1.0, how["temperature"])[:, None], how["top_k"], how["top_p"])
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, t), scores.shape[1:]))(keys_B)
        return jnp.where(greedy, jnp.argmax(logits_BV, axis=-1), jnp.argmax(scores + noise, axis=-1))

    return jax.lax.cond(jnp.all(greedy), lambda: jnp.argmax(logits_BV, axis=-1), sample).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "max_new"))
def _decode(
    config: ModelConfig,
    params: Params,
    adapter: Adapter | None,
    tokens_PT: Array,
    valid_PT: Array,
    row_prompt_B: Array,
    keys_B: Array,
    how: dict[str, Array],
    stop_E: Array,
    max_new: int,
) -> Array:
    """Sampled tokens int32 `[B, max_new]`, -1 from the stop token on. Prompts are padded on the left; P of them are
    read once, and row b continues prompt `row_prompt_B[b]`."""
    params, adapter = bind(params, adapter)
    _, T = tokens_PT.shape
    B, total = row_prompt_B.shape[0], T + max_new
    h_PTD, cache = decoder.hidden_states(config, params, tokens_PT, valid_PT, adapter=adapter, with_cache=True)
    logits_BV = decoder.logits(config, params, h_PTD[:, -1])[row_prompt_B]
    padding_B = T - valid_PT.sum(axis=1)[row_prompt_B]
    seen_PV = jax.vmap(lambda row, ok: jnp.zeros(config.vocab_size, bool).at[row].max(ok))(tokens_PT, valid_PT)
    # The layers are not scanned here: a stack of caches that a scan carries along would be copied at every layer.
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(config.num_layers)]
    parts = [adapter.part(i) if adapter else FROZEN for i in range(config.num_layers)]
    rings = [_ring(config, i, cache, row_prompt_B, total) for i in range(config.num_layers)]

    def step(token_B: Array, slot: Array, rings: list[Ring]) -> tuple[Array, list[Ring]]:
        """Logits after `token_B`, which stands at `slot` of the padded row."""
        h = decoder.embed(config, params, token_B[:, None])
        cos, sin = rope_table(config, (slot - padding_B)[:, None], h.dtype)
        kept = []
        for weights, part, ring, local in zip(layers, parts, rings, config.is_local, strict=True):
            rope = cos[int(local)], sin[int(local)]
            layer = decoder.Layer.of(config, weights, part, rope, _remember(ring, slot, padding_B))
            h, seen = layer(h)
            kept.append((seen.keys, seen.values))
        h = decoder.final_norm(config, params, h[:, 0])
        return decoder.logits(config, params, h), kept

    def body(state: tuple) -> tuple:
        t, logits_BV, rings, seen_BV, done_B, out = state
        token_B = choose(logits_BV, seen_BV, keys_B, t, how)
        done_B = done_B | jnp.isin(token_B, stop_E)
        out = out.at[:, t].set(jnp.where(done_B, -1, token_B))
        seen_BV = seen_BV.at[jnp.arange(B), token_B].set(True)
        logits_BV, rings = step(token_B, T + t, rings)
        return t + 1, logits_BV, rings, seen_BV, done_B, out

    nothing = jnp.full((B, max_new), -1, jnp.int32)
    start = jnp.int32(0), logits_BV, rings, seen_PV[row_prompt_B], jnp.zeros(B, bool), nothing
    return jax.lax.while_loop(lambda state: (state[0] < max_new) & ~jnp.all(state[4]), body, start)[5]


Ring = tuple[Array, Array]  # keys and values of one layer, [B, K, W, h] each: absolute slot a lies at a modulo W


def _ring(config: ModelConfig, layer: int, cache: Any, row_prompt_B: Array, total: int) -> Ring:
    """A layer's cache after prefill: W is the window of a local layer, else all that the row will need.

    So a local layer overwrites what it may no longer see.
    """
    W = min(config.local.window, total) if config.is_local[layer] else total

    def place(stack: Array) -> Array:
        own = stack[layer][:, :, -W:]
        T, kept = stack.shape[3], own.shape[2]
        own = jnp.pad(own, ((0, 0), (0, 0), (0, W - kept), (0, 0)))
        return jnp.roll(own, (T - kept) % W, axis=2)[row_prompt_B]

    return place(cache[0]), place(cache[1])


def _remember(ring: Ring, slot: Array, padding_B: Array) -> Remember:
    """Write the keys and values of the one token at hand to its slot; it sees all that the ring then holds of its row."""

    def remember(k_BK1h: Array, v_BK1h: Array) -> Seen:
        W = ring[0].shape[2]
        new = zip(ring, (k_BK1h, v_BK1h), strict=True)
        keys, values = (jax.lax.dynamic_update_slice_in_dim(old, x, slot % W, axis=2) for old, x in new)
        # Ring slot j holds the newest absolute slot that is j modulo W.
        held_W = slot - (slot - jnp.arange(W)) % W
        return Seen(keys, values, (held_W[None, :] >= padding_B[:, None])[:, None])

    return remember


def generate_tokens(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seed: int,
    samples: int = 1,
    rows: Sequence[int] | None = None,
    adapter: Adapter | None = None,
    batch_size: int = 64,
    on_batch: Callable[[list[int], list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """Sample `samples` continuations of each prompt; row i continues prompt `i // samples`.

    Args:
      prompts: int32 `[T_i]` each.
      rows: the rows to sample (their number is their random stream); None is all of them.
      on_batch: called with the row numbers and the tokens of each finished batch.

    Returns:
      One list of tokens per row of `rows`, in order, without the stop token.
    """
    rows = list(range(len(prompts) * samples)) if rows is None else list(rows)
    chex.assert_rank([prompts[row // samples] for row in rows], 1)
    result: dict[int, list[int]] = {}
    base = jax.random.key(seed)
    # Of one length whatever their number, so that none of them is another program.
    ends = sampling.stop or ()
    stop = np.full(max(STOP_TOKENS, len(ends)), -2, np.int32)
    stop[: len(ends)] = ends
    for length, members in by_length([len(prompts[row // samples]) for row in rows]):
        for part in chunks(len(members), batch_size):
            batch = [rows[member] for member in members[part]]
            padded = batch + [batch[-1]] * (min(batch_size, len(prompts) * samples) - len(batch))
            unique = sorted({row // samples for row in padded})
            count = 1 << (len(unique) - 1).bit_length() if samples > 1 else len(padded)
            read = [prompts[unique[min(i, len(unique) - 1)]] for i in range(count)]
            out = _decode(
                config,
                params,
                adapter,
                *pad_tokens(read, length, left=True),
                np.asarray([unique.index(row // samples) for row in padded], np.int32),
                jax.vmap(lambda row: jax.random.fold_in(base, row))(jnp.asarray(padded)),
                _as_arrays(sampling, len(padded)),
                stop,
                max_new_tokens,
            )
            texts = [[int(token) for token in row if token >= 0] for row in np.asarray(out)[: len(batch)]]
            result.update(zip(batch, texts, strict=True))
            if on_batch is not None:
                on_batch(batch, texts)
    return [result[row] for row in rows]


def _as_arrays(sampling: Sampling, rows: int) -> dict[str, np.ndarray]:
    """The numbers of `sampling`, one per row: values, not constants, so that none of them recompiles anything."""
    kinds = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "repetition_penalty": np.float32}
    return {name: np.full(rows, getattr(sampling, name), kind) for name, kind in kinds.items()}

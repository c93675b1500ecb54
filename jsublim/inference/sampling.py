"""Decoding with a KV cache: one compiled program a prompt-length bucket, whatever is sampled and how.

A row's random numbers come from `fold_in(fold_in(key(seed), row), t)`, so what is sampled does not depend on the batch
it is in (up to ties within float rounding).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jsublim.chat import Chat
from jsublim.errors import UsageError
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.layers import rope_table
from jsublim.models.lora import Adapter, with_ends

BUCKET = 32  # prompt lengths are padded to a multiple of this
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
    stop: tuple[int, ...] | None = None  # tokens that end a row; None leaves them to whoever knows the chat template

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
    params = with_ends(params, adapter)
    _, T = tokens_PT.shape
    B, total = row_prompt_B.shape[0], T + max_new
    h_PTD, cache = decoder.hidden_states(config, params, tokens_PT, valid_PT, adapter=adapter, with_cache=True)
    logits_BV = decoder.logits(config, params, h_PTD[:, -1])[row_prompt_B]
    padding_B = T - valid_PT.sum(axis=1)[row_prompt_B]
    seen_PV = jax.vmap(lambda row, ok: jnp.zeros(config.vocab_size, bool).at[row].max(ok))(tokens_PT, valid_PT)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(config.num_layers)]
    changes = {layer: adapter.segment(i, i + 1) for i, layer in enumerate(adapter.layers)} if adapter else {}
    caches = [_ring(config, i, cache, row_prompt_B, total) for i in range(config.num_layers)]
    graph = decoder.block_graph(config)

    def step(token_B: Array, slot: Array, caches: list[tuple[Array, Array]]) -> tuple[Array, list]:
        """Logits behind `token_B`, which stands at `slot` of the padded row."""
        h = decoder.embed(config, params, token_B[:, None])
        cos, sin = rope_table(config, (slot - padding_B)[:, None], h.dtype)
        after = []
        for i, (weights, (keys, values), local) in enumerate(zip(layers, caches, config.is_local, strict=True)):
            lora, own, steering = jax.tree.map(lambda leaf: leaf[0], changes[i]) if i in changes else ({}, None, None)

            def attention(q: Array, k: Array, v: Array, keys=keys, values=values) -> Array:
                W = keys.shape[2]
                keys = jax.lax.dynamic_update_slice_in_dim(keys, k.swapaxes(1, 2), slot % W, axis=2)
                values = jax.lax.dynamic_update_slice_in_dim(values, v.swapaxes(1, 2), slot % W, axis=2)
                after.append((keys, values))
                # Ring slot j holds the newest absolute slot that is j modulo W.
                held_W = slot - (slot - jnp.arange(W)) % W
                ok_BW = held_W[None, :] >= padding_B[:, None]
                grouped = q.reshape(B, config.num_kv_heads, -1, config.head_dim)
                scores = jnp.einsum("BKGh,BKWh->BKGW", grouped, keys, preferred_element_type=jnp.float32)
                scores = jnp.where(ok_BW[:, None, None], scores * config.softmax_scale, jnp.finfo(jnp.float32).min)
                mix = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
                return jnp.einsum("BKGW,BKWh->BKGh", mix, values).reshape(B, 1, -1)

            used = weights if own is None else jax.tree.map(lambda w, f: w.astype(f.dtype), own, weights)
            block = nnx.merge(graph, used)
            h = block(h, cos[int(local)], sin[int(local)], attention, lora)
            h = h if steering is None else h + steering.astype(h.dtype)
        h = decoder.final_norm(config, params, h[:, 0])
        return decoder.logits(config, params, h), after

    def body(state: tuple) -> tuple:
        t, logits_BV, caches, seen_BV, done_B, out = state
        token_B = choose(logits_BV, seen_BV, keys_B, t, how)
        done_B = done_B | jnp.isin(token_B, stop_E)
        out = out.at[:, t].set(jnp.where(done_B, -1, token_B))
        seen_BV = seen_BV.at[jnp.arange(B), token_B].set(True)
        logits_BV, caches = step(token_B, T + t, caches)
        return t + 1, logits_BV, caches, seen_BV, done_B, out

    start = (
        jnp.int32(0), logits_BV, caches, seen_PV[row_prompt_B], jnp.zeros(B, bool), jnp.full((B, max_new), -1, jnp.int32)
    )  # fmt: skip
    return jax.lax.while_loop(lambda state: (state[0] < max_new) & ~jnp.all(state[4]), body, start)[5]


def _ring(config: ModelConfig, layer: int, cache: Any, row_prompt_B: Array, total: int) -> tuple[Array, Array]:
    """A layer's cache after prefill, `[B, K, W, h]`: W is the window of a local layer, else all the row will need.

    Absolute slot a lies at a modulo W, so a local layer overwrites what it may no longer see.
    """
    W = min(config.window, total) if config.is_local[layer] else total

    def place(stack: Array) -> Array:
        own = stack[layer].swapaxes(1, 2)[:, :, -W:]
        T, kept = stack.shape[2], own.shape[2]
        own = jnp.pad(own, ((0, 0), (0, 0), (0, W - kept), (0, 0)))
        return jnp.roll(own, (T - kept) % W, axis=2)[row_prompt_B]

    return place(cache[0]), place(cache[1])


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
      A token list a row of `rows`, in order, without the stop token.
    """
    rows = list(range(len(prompts) * samples)) if rows is None else list(rows)
    bucket = {row: -(-len(prompts[row // samples]) // BUCKET) * BUCKET for row in rows}
    result: dict[int, list[int]] = {}
    base = jax.random.key(seed)
    # Of one length whatever their number, so that none of them is another program.
    ends = sampling.stop or ()
    stop = np.full(max(STOP_TOKENS, len(ends)), -2, np.int32)
    stop[: len(ends)] = ends
    for length in sorted(set(bucket.values())):
        members = [row for row in rows if bucket[row] == length]
        for first in range(0, len(members), batch_size):
            batch = members[first : first + batch_size]
            padded = batch + [batch[-1]] * (min(batch_size, len(prompts) * samples) - len(batch))
            unique = sorted({row // samples for row in padded})
            count = 1 << (len(unique) - 1).bit_length() if samples > 1 else len(padded)
            tokens = np.zeros((count, length), np.int32)
            valid = np.zeros((count, length), bool)
            for i in range(count):
                prompt = prompts[unique[min(i, len(unique) - 1)]]
                tokens[i, length - len(prompt) :], valid[i, length - len(prompt) :] = prompt, True
            out = _decode(
                config, params, adapter, tokens, valid,
                np.asarray([unique.index(row // samples) for row in padded], np.int32),
                jax.vmap(lambda row: jax.random.fold_in(base, row))(jnp.asarray(padded)),
                _as_arrays(sampling, len(padded)), stop, max_new_tokens,
            )  # fmt: skip
            texts = [[int(token) for token in row if token >= 0] for row in np.asarray(out)[: len(batch)]]
            result.update(zip(batch, texts, strict=True))
            if on_batch is not None:
                on_batch(batch, texts)
    return [result[row] for row in rows]


def _as_arrays(sampling: Sampling, rows: int) -> dict[str, np.ndarray]:
    """The numbers of `sampling` a row: values, not constants, so that none of them recompiles anything."""
    kinds = {
        "temperature": np.float32,
        "top_k": np.int32,
        "top_p": np.float32,
        "repetition_penalty": np.float32,
    }
    return {name: np.full(rows, getattr(sampling, name), kind) for name, kind in kinds.items()}

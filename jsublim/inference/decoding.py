"""Decoding with a KV cache: rows that wait take the places of rows that have ended, and a handful of programs do it all.

`fill` reads prompts into places of the batch, `advance` draws tokens until enough rows have ended. A row has its own
slots in the cache and its own random numbers, `fold_in(fold_in(key(seed), row), t)`, so what is sampled depends neither on the
batch it is in nor on when it got there (up to ties within float rounding). On several devices arms lie apart first, then an
arm's rows: places, their caches and the prompts that are read into them are on one device each, and all that devices tell one
another is how many rows have ended.

Letters as in `models/layers.py`; A arms, N tokens that there is room for, n prompts that are read at once, in l lines, P tokens that
all prompts begin with.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.inference.batching import CACHE_STEP, branched, round_up
from jsublim.inference.batching import fill as fill_rows
from jsublim.inference.constrain import Limits, Within, choose_within
from jsublim.inference.sampling import choose
from jsublim.inference.scoring import prefix_cache
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import KV, Branches, Params
from jsublim.models.layers import Remember, Seen, rope_table
from jsublim.models.lora import Adapter, bind
from jsublim.models.parallel import ARM_ROWS, ARMS, HERE, ROWS, WHOLE, Layout

MOST_TURNS = 2**31 - 1
Ring = tuple[Array, Array]  # keys and values of one layer, [B, K, W, h] each: slot a of a row lies at a modulo W


class Decoding(NamedTuple):
    """Rows that are being decoded. Of each array there is one per arm."""

    # Of every layer; W is the window of a local one (it overwrites what it may no longer see), else all that a row can need.
    rings: tuple[Ring, ...]
    logits: Array  # float32 [B, V], of the next token
    seen: Array  # bool [B, V], tokens that stand in the row
    length: Array  # int32 [B], tokens read
    drawn: Array  # int32 [B], tokens drawn
    done: Array  # bool [B], also of a place without a row
    keys: Array  # uint32 [B, 2], the data of each row's key
    out: Array  # int32 [B, N], the tokens drawn, -1 from the stop token on; as wide as the cache, so that no number of tokens is a program
    within: Within | None = None  # where rows are in their format; None where they are kept in none


def cache_slots(config: ModelConfig, tokens: int) -> int:
    """Slots of a cache for rows of at most so many tokens; a JsublimError where the model cannot read as many."""
    decoder.check_length(config, tokens)
    return round_up(tokens, CACHE_STEP)


@functools.partial(jax.jit, static_argnames=("config", "arms", "rows", "slots", "dtype", "limited", "layout"))
def empty(
    config: ModelConfig, arms: int, rows: int, slots: int, dtype: Any, limited: bool = False, layout: Layout = HERE
) -> Decoding:
    """A batch without rows, for rows of at most `slots` tokens; `limited` to a format, or not."""
    widths = [min(config.local.window, slots) if local else slots for local in config.is_local]

    def zeros(*shape: int, dtype: Any = jnp.int32) -> Array:
        return jnp.zeros((arms, rows, *shape), dtype)

    def ring(W: int) -> Array:
        return zeros(config.num_kv_heads, W, config.head_dim, dtype=dtype)

    batch = Decoding(
        rings=tuple((ring(W), ring(W)) for W in widths),
        logits=zeros(config.vocab_size, dtype=jnp.float32),
        seen=zeros(config.vocab_size, dtype=bool),
        length=zeros(),
        drawn=zeros(),
        done=jnp.ones((arms, rows), bool),
        keys=zeros(*jax.random.key_data(jax.random.key(0)).shape, dtype=jnp.uint32),
        out=zeros(slots) - 1,
        within=Within(zeros(), zeros(dtype=jnp.float32)) if limited else None,
    )
    return _laid(config, layout, batch)


def decoding_sharding(config: ModelConfig, layout: Layout, batch: Decoding) -> Decoding:
    """The sharding of a batch on a mesh: places over devices, and heads beside the projections that make their keys."""
    heads = "model" if config.num_kv_heads % layout.model == 0 else None
    place, ring = layout.shard("arm", "data"), layout.shard("arm", "data", heads)
    return jax.tree.map(lambda _: place, batch)._replace(rings=jax.tree.map(lambda _: ring, batch.rings))


def _laid(config: ModelConfig, layout: Layout, batch: Decoding) -> Decoding:
    """A batch where it belongs."""
    if layout.mesh is None:
        return batch
    return jax.lax.with_sharding_constraint(batch, decoding_sharding(config, layout, batch))


class Begun(NamedTuple):
    """The beginning of all prompts of an arm: tokens int32 `[P]`, and their keys and values `[L, 1, K, P, h]`."""

    tokens: Array
    cache: KV


@functools.partial(jax.jit, static_argnames=("config", "layout"))
def beginning(config: ModelConfig, params: Params, adapters: Adapter, tokens_AP: Array, layout: Layout = HERE) -> Begun:
    """The beginning of all prompts, read by each arm."""

    def read(params: Params, adapters: Adapter, tokens_AP: Array) -> Begun:
        of_arm = functools.partial(prefix_cache, config, params)
        return Begun(tokens_AP, jax.vmap(of_arm)(adapters, tokens_AP[:, None]))

    return layout.spread(read, (WHOLE, ARMS, ARMS), ARMS)(params, adapters, tokens_AP)


class Prompts(NamedTuple):
    """The prompts that `fill` reads, per arm, one after another in lines, where each sees itself alone. On several devices they are those of one
    device after another's, and each counts its own lines and prompts."""

    tokens: Array  # int32 [l, T]
    branches: Branches  # of those, [l, T] each: 1 + the number of the prompt, 0 where there is none
    first: Array  # int32 [n], where a prompt begins, counted through all lines
    count: Array  # int32 [n], its tokens
    prompt: Array  # int32 [B], that of the row which begins in a place of the batch, -1 if none does
    row: Array  # int32 [B], that row's number

    @classmethod
    def of(cls, lines: Sequence[Sequence[np.ndarray]], T: int, n: int, prompt: Any, row: Any, P: int = 0) -> Prompts:
        """Prompts (int32, at most n) in lines of T tokens, on the host and of one arm; P tokens stand before each."""
        lengths, number = [[len(tokens) for tokens in line] for line in lines], np.zeros(0, np.int32)
        laid = [branched(0, of_line) for of_line in lengths]
        earlier = np.cumsum([0, *map(len, lines)])  # prompts in the lines above
        branches = Branches(
            fill_rows([P + positions for positions, _ in laid], T, number),  # type: ignore[arg-type]
            fill_rows([before + branch for before, (_, branch) in zip(earlier, laid, strict=False)], T, number),  # type: ignore[arg-type]
        )
        tokens = fill_rows([np.concatenate([*line, number]) for line in lines], T, number)
        first, count = np.zeros((2, n), np.int32)
        count[: earlier[-1]] = [*itertools.chain(*lengths)]
        first[: earlier[-1]] = [i * T + at for i, each in enumerate(lengths) for at in np.cumsum([0, *each])[:-1]]
        return cls(tokens, branches, first, count, np.asarray(prompt, np.int32), np.asarray(row, np.int32))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames=("config", "layout"), donate_argnames="batch")
def fill(
    config: ModelConfig,
    params: Params,
    adapters: Adapter,
    begun: Begun | None,
    batch: Decoding,
    read: Prompts,
    key_data: Array,
    layout: Layout = HERE,
) -> Decoding:
    """The batch with rows that begin in some of its places. `key_data` is of the call's random numbers; each row takes its own from there."""

    def every_arm(params, adapters, begun, batch, read, key_data) -> Decoding:
        return jax.vmap(functools.partial(_fill, config, params, key_data))(adapters, begun, batch, read)

    spread = layout.spread(every_arm, (WHOLE, ARMS, ARMS, ARM_ROWS, ARM_ROWS, WHOLE), ARM_ROWS)
    return _laid(config, layout, spread(params, adapters, begun, batch, read, key_data))


def _fill(
    config: ModelConfig,
    params: Params,
    key_data: Array,
    adapter: Adapter,
    begun: Begun | None,
    batch: Decoding,
    read: Prompts,
) -> Decoding:
    """One arm's part of `fill`."""
    prefix = None if begun is None else begun.cache
    params, adapter = bind(params, adapter)
    branch, length_n = read.branches.branch, read.count
    how = {"adapter": adapter, "prefix": prefix, "branches": read.branches}
    h, cache = decoder.hidden_states(config, params, read.tokens, branch > 0, with_cache=True, **how)
    assert cache is not None
    seen_nV = jnp.zeros((1 + len(length_n), config.vocab_size), bool).at[branch, read.tokens].set(True)[1:]
    if begun is not None:
        length_n, seen_nV = length_n + len(begun.tokens), seen_nV.at[:, begun.tokens].set(True)
    last_nD = h.reshape(-1, h.shape[-1])[jnp.maximum(read.first + read.count - 1, 0)]
    logits_nV = decoder.logits(config, params, last_nD)

    def put(old: Array, new_n: Array) -> Array:
        # Not written place by place: a CPU does that element by element.
        begins = (read.prompt >= 0).reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(begins, new_n[jnp.maximum(read.prompt, 0)], old)

    def ring(layer: int, which: int) -> Array:
        """The keys (0) or values (1) of one layer."""
        old, before = batch.rings[layer][which], 0 if begun is None else len(begun.tokens)
        room = None if config.is_local[layer] else old.shape[2] - before
        new = _of_prompts(cache[which][layer], read.first, room)
        if prefix is not None:
            earlier = jnp.broadcast_to(prefix[which][layer], (*new.shape[:2], *prefix[which].shape[3:]))
            new = jnp.concatenate([earlier, new], axis=2)
        return put(old, _as_ring(new, length_n, old.shape[2]))

    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.wrap_key_data(key_data), read.row)
    zero = jnp.zeros_like(length_n)
    return Decoding(
        rings=tuple((ring(layer, 0), ring(layer, 1)) for layer in range(config.num_layers)),
        logits=put(batch.logits, logits_nV),
        seen=put(batch.seen, seen_nV),
        length=put(batch.length, length_n),
        drawn=put(batch.drawn, zero),
        done=put(batch.done, zero.astype(bool)),
        keys=jnp.where((read.prompt >= 0)[:, None], jax.random.key_data(keys_B), batch.keys),
        out=put(batch.out, jnp.full((len(length_n), batch.out.shape[1]), -1, jnp.int32)),
        within=jax.tree.map(lambda old: put(old, zero.astype(old.dtype)), batch.within),
    )


def _of_prompts(x_lKTh: Array, first_n: Array, most: int | None) -> Array:
    """Keys or values of lines as those of prompts, `[n, K, S, h]`: as many as a line has, or `most`, where a prompt has no more. After its
    end come others', which no query sees."""
    _, K, T, h = x_lKTh.shape
    S = T if most is None else min(T, most)
    longer = jnp.pad(x_lKTh, ((0, 0), (0, 0), (0, S), (0, 0)))  # a prompt may begin at a line's last token
    return jax.vmap(lambda i: jax.lax.dynamic_slice(longer, (i // T, 0, i % T, 0), (1, K, S, h))[0])(first_n)


def _as_ring(x_nKTh: Array, length_n: Array, W: int) -> Array:
    """Keys or values of whole rows `[n, K, W, h]`, slot a at a modulo W, the newest where several share a place."""
    T = x_nKTh.shape[2]
    if T <= W:
        return jnp.pad(x_nKTh, ((0, 0), (0, 0), (0, W - T), (0, 0)))
    last_n1 = length_n[:, None] - 1
    slot_nW = jnp.maximum(last_n1 - (last_n1 - jnp.arange(W)) % W, 0)
    return jnp.take_along_axis(x_nKTh, slot_nW[:, None, :, None], axis=2)


@functools.partial(jax.jit, static_argnames=("config", "layout", "cut"), donate_argnames="batch")
def advance(
    config: ModelConfig,
    params: Params,
    adapters: Adapter,
    batch: Decoding,
    how: dict[str, Array],
    stop_E: Array,
    enough_A: Array,
    new: Array | int,
    limits: Limits | None = None,
    layout: Layout = HERE,
    turns: Array | int = MOST_TURNS,
    cut: bool = True,
) -> Decoding:
    """The batch after as many tokens as it takes until `enough_A` places of some arm are done, or all are; at most `turns` each. A row ends after
    `new` tokens. `how` has the numbers of `Sampling`, `[B]`, or on one device `[A, B]`. `cut`: a GPU has room for the layers twice."""
    spread = layout.spread(
        functools.partial(_advance, config, layout, cut),
        (WHOLE, ARMS, ARM_ROWS, ROWS, WHOLE, ARMS, WHOLE, WHOLE, WHOLE),
        ARM_ROWS,
    )
    counts = jnp.int32(new), jnp.int32(turns)
    return _laid(config, layout, spread(params, adapters, batch, how, stop_E, enough_A, limits, *counts))


def _advance(
    config: ModelConfig,
    layout: Layout,
    cut: bool,
    params: Params,
    adapters: Adapter,
    batch: Decoding,
    how: dict[str, Array],
    stop_E: Array,
    enough_A: Array,
    limits: Limits | None,
    new: Array,
    turns: Array,
) -> Decoding:
    weights = _unstacked(config, params, cut)

    def step(moving: Array, adapter: Adapter, batch: Decoding, token_B: Array, within: Within | None) -> Decoding:
        bound, adapter = bind(params, adapter)
        B, N = batch.out.shape
        done_B = batch.done | jnp.isin(token_B, stop_E)
        at_B = jnp.where(batch.done, N, batch.drawn)  # beyond the end: not written
        out = batch.out.at[jnp.arange(B), at_B].set(jnp.where(done_B, -1, token_B), mode="drop")
        seen = batch.seen.at[jnp.arange(B), token_B].set(True)
        slot_B = batch.length
        h = decoder.embed(config, bound, token_B[:, None])
        cos, sin = rope_table(config, slot_B[:, None], h.dtype)
        rings = []
        for i, (ring, local) in enumerate(zip(batch.rings, config.is_local, strict=True)):
            rope, part = (cos[int(local)], sin[int(local)]), adapter.part(i)
            layer = decoder.Layer.of(config, weights(i, moving), part, rope, _remember(ring, slot_B))
            h, kept = layer(h)
            rings.append((kept.keys, kept.values))
        logits = decoder.logits(config, bound, decoder.final_norm(config, bound, h[:, 0]))
        drawn = batch.drawn + ~batch.done
        ended = done_B | (drawn >= new)
        return Decoding(tuple(rings), logits, seen, slot_B + ~ended, drawn, ended, batch.keys, out, within)

    def going(batch: Decoding) -> Array:
        """Whether every device goes on: they do so together, for the one that is first to end reads the next prompts."""
        ended_A = layout.total(batch.done.sum(axis=1), "data")
        enough, busy = (ended_A >= enough_A).sum(), (ended_A < batch.done.shape[1] * layout.data).sum()
        enough, busy = layout.total(jnp.stack([enough, busy]), "arm")
        return (enough == 0) & (busy > 0)

    def turn(state: tuple[Array, Array, Decoding]) -> tuple[Array, Array, Decoding]:
        _, left, batch = state
        # Outside of what is mapped over arms: an index of each arm's own would give each arm a copy of the weights.
        moved = jax.vmap(functools.partial(step, batch.drawn[0, 0]))(adapters, batch, *_choose(limits, batch, how, new))
        return going(moved) & (left > 1), left - 1, moved

    return jax.lax.while_loop(lambda state: state[0], turn, (going(batch), turns, batch))[2]


def _choose(limits: Limits | None, batch: Decoding, how: dict[str, Array], new: Array) -> tuple[Array, Within | None]:
    """The next token of each row of all arms, and where the row then is in its format. A row that is done stays where it is. `how` is of the
    rows, for all arms or of each: `[B]` or `[A, B]`. All are one batch here: inside of what is mapped over arms every way to choose would be
    computed, for a branch cannot be one arm's alone."""
    A, B = batch.done.shape
    flat = functools.partial(jax.tree.map, lambda x: x.reshape(A * B, *x.shape[2:]))
    apart = functools.partial(jax.tree.map, lambda x: x.reshape(A, B, *x.shape[1:]))
    how = flat({name: jnp.broadcast_to(x, (A, B)) for name, x in how.items()})
    logits, seen, keys, drawn = flat((batch.logits, batch.seen, batch.keys, batch.drawn))
    keys = jax.random.wrap_key_data(keys)
    if limits is None or batch.within is None:
        return apart(choose(logits, seen, keys, drawn, how)), None
    left = flat(jnp.where(batch.done, new, new - 1 - batch.drawn))
    token, within = choose_within(limits, flat(batch.within), logits, seen, keys, drawn, left, how)
    return apart(token), jax.tree.map(lambda old, new: jnp.where(batch.done, old, new), batch.within, apart(within))


def _unstacked(config: ModelConfig, params: Params, cut: bool) -> Callable[[int, Array], Params]:
    """`weights(layer, moving)`: the base's parameters of one layer, inside the loop over tokens.

    The layers are not scanned there: a stack of caches that a scan carries along would be copied at every layer. On CPUs and
    GPUs a slice of the stack is a copy, so they are cut once, before the loop (of a GPU, if `cut`: it must hold them twice). A TPU
    reads it where the product is, if the compiler cannot tell that it is the same at every turn: hence an index with `moving`
    in it, which is never below zero."""
    stack = params["layers"]
    apart = [
        jax.tree.map(lambda leaf, i=i: jax.lax.index_in_dim(leaf, i, keepdims=False), stack)
        for i in range(config.num_layers)
    ]

    def weights(layer: int, moving: Array) -> Params:
        def inside(stack: Params, _: Params) -> Params:
            index = layer + jnp.minimum(moving, 0)
            return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)

        def copied(_: Params, copy: Params) -> Params:
            return copy

        return jax.lax.platform_dependent(
            stack, apart[layer], tpu=inside, cpu=copied, default=copied if cut else inside
        )

    return weights


def _remember(ring: Ring, slot_B: Array) -> Remember:
    """Write the keys and values of the one token at hand to its row's slot; it sees all that the ring then holds of the row."""

    def remember(k_BK1h: Array, v_BK1h: Array) -> Seen:
        B, _, W, _ = ring[0].shape
        keys, values = (
            old.at[jnp.arange(B), :, slot_B % W].set(x[:, :, 0]) for old, x in zip(ring, (k_BK1h, v_BK1h), strict=True)
        )
        # Place j of a ring holds the row's newest slot that is j modulo W.
        held_BW = slot_B[:, None] - (slot_B[:, None] - jnp.arange(W)) % W
        return Seen(keys, values, (held_BW >= 0)[:, None])

    return remember

"""The decoder: one module for every family, its layers stacked, and the pure functions the rest of the project calls.

Parameters are a plain nested dict of arrays: `embed`, `layers` (every leaf with a leading layer axis), `norm` and,
where it is not tied, `head`. Whatever an adapter trains of `embed`, `norm` and `head` is in them already: a program
calls `lora.bind` once. Dimension letters as in `layers.py`; L layers, V vocabulary, P prefix tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from jsublim.errors import JsublimError
from jsublim.models.config import ModelConfig
from jsublim.models.layers import PROJECTED, Block, Norm, Remember, Seen, product, rope_table
from jsublim.models.lora import FROZEN, Adapter, Part

Params = dict[str, Any]
KV = tuple[Array, Array]  # keys and values, [L, B, K, S, h] each
# Kept for a backward pass: what the projections put out, nothing else. Attention and element-wise work is cheaper done again
# than stored, and a slice of the frozen stack that was kept would be a second copy of the base.
KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(PROJECTED)


class Embed(nnx.Module):
    """A `[V, D]` table: the embedding, and the head of an untied model."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * 0.02).astype(dtype))


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm, head."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=dtype, rngs=rngs)

        self.embed = Embed(config, dtype=dtype, rngs=rngs)
        self.layers = stack(rngs)
        self.norm = Norm(config.hidden_size, config, dtype=dtype)
        if not config.tied:
            self.head = Embed(config, dtype=dtype, rngs=rngs)


def init_params(config: ModelConfig, seed: int, dtype: str = "float32") -> Params:
    """Random parameters, as the start of a pretraining run."""
    return jax.jit(lambda: _flat(nnx.state(Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed)))))()


def abstract_params(config: ModelConfig, dtype: str = "float32") -> Params:
    """Shapes and dtypes of the parameters, without any array."""
    return _flat(nnx.state(_abstract(config, dtype)))


@functools.cache  # a plan asks for every student
def _abstract(config: ModelConfig, dtype: str) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))


def parameter_count(config: ModelConfig) -> int:
    """How many numbers a checkpoint has."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def _flat(state: nnx.State) -> Params:
    """Parameters as a plain dict, in which those of a layer's two sublayers lie side by side: no name is in both."""
    params = nnx.to_pure_dict(state)
    names = {name: leaf for sublayer in params["layers"].values() for name, leaf in sublayer.items()}
    return params | {"layers": dict(sorted(names.items()))}


@functools.cache
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.GraphDef, dict[str, tuple[str, ...]]]:
    """For `nnx.merge`: the graphs of a block and of the final norm, and the names of the parameters in each sublayer."""
    model = _abstract(config, "float32")
    block, state = nnx.split(model.layers)
    names = {sublayer: tuple(leaves) for sublayer, leaves in nnx.to_pure_dict(state).items()}
    return block, nnx.split(model.norm)[0], names


def embed(config: ModelConfig, params: Params, tokens: Array) -> Array:
    """Token ids `[...]` to `[..., D]`, scaled where the family does."""
    h = params["embed"]["weight"][tokens]
    return h * jnp.asarray(config.hidden_size**0.5, h.dtype) if config.scales.embedding else h


def head_weight(params: Params) -> Array:
    """The `[V, D]` output table: the embedding itself where it is tied."""
    return params["head"]["weight"] if "head" in params else params["embed"]["weight"]


def logits(config: ModelConfig, params: Params, h: Array) -> Array:
    """Normed hidden states `[..., D]` to float32 logits `[..., V]`. Call it on the positions you need only."""
    with jax.named_scope("head"):
        table = head_weight(params)
        z: Any = product("...D,VD->...V", h, table)
        if config.scales.rounded:
            info = jnp.finfo(table.dtype)
            z = jax.lax.reduce_precision(z, info.nexp, info.nmant)  # a cast there and back XLA may take away
        cap = config.scales.softcap
        return z if cap is None else cap * jnp.tanh(z / cap)


def final_norm(config: ModelConfig, params: Params, h: Array) -> Array:
    """The norm between the last layer and the head, of hidden states `[..., D]`."""
    return nnx.merge(_structure(config)[1], params["norm"])(h)


def positions_of(valid_BT: Array) -> Array:
    """Position of each token, counted over valid ones; padding on either side gets a harmless 0."""
    return jnp.maximum(jnp.cumsum(valid_BT.astype(jnp.int32), axis=1) - 1, 0)


def check_length(config: ModelConfig, tokens: int) -> None:
    """Refuse rows that are longer than the rotary frequencies are for (JsublimError); while tracing, so it costs a run nothing."""
    longest = min((rope.longest for rope in config.ropes if rope.longest is not None), default=tokens)
    if tokens > longest:
        raise JsublimError(
            f"rows of {tokens} tokens: this model's longrope is supported up to its original_max_position_embeddings, {longest}; "
            "use shorter prompts and answers (students.data.max_tokens, max_new_tokens)"
        )


def _on_every_chip(h: Array) -> Array:
    """The residual stream with all its features on every chip of a model axis, where a program is compiled for one. Left to itself the TPU's
    compiler spreads it where students lie beside one another, and puts it together inside every layer."""
    mesh = jax.sharding.get_abstract_mesh()
    if "model" not in mesh.auto_axes or mesh.shape["model"] == 1:
        return h
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(h, PartitionSpec(*[free] * (h.ndim - 1), None))


class Branches(NamedTuple):
    """Rows in which several texts follow one beginning, side by side: a token's position int32 `[B, T]`, and its branch,
    0 of the beginning. A token sees the beginning and its own branch, and a prefix."""

    positions: Array
    branch: Array


def _masks(
    config: ModelConfig, q_pos_BT: Array, k_pos_BS: Array, k_valid_BS: Array, branches: Branches | None = None
) -> Array:
    """`[2, B, T, S]`: what a query may see, in global (0) and local (1) layers."""
    distance = q_pos_BT[:, :, None] - k_pos_BS[:, None, :]
    seen = k_valid_BS[:, None, :] & (distance >= 0)
    if branches is not None:
        before = k_pos_BS.shape[1] - q_pos_BT.shape[1]  # of the prefix, which belongs to the beginning
        of_query = branches.branch[:, :, None]
        of_key = jnp.pad(branches.branch, ((0, 0), (before, 0)))[:, None, :]
        seen &= (of_key == 0) | (of_key == of_query)
    return jnp.stack([seen, seen & (distance < config.local.window) if config.local.window else seen])


def runs(config: ModelConfig, adapter: Adapter | None, first: int = 0) -> Iterator[tuple[np.ndarray, Part]]:
    """The layers from `first` on as inputs of scans that follow one another: `(indices int32 [n], what is trained there)`. Below the lowest
    trained layer there is then nothing to differentiate, and a frozen run above it keeps no gradient of its weights.

    Raises:
      ValueError: an adapter whose ends are not yet in the parameters (`lora.bind`).
    """
    if adapter is not None and adapter.ends:
        raise ValueError(f"the adapter trains {', '.join(adapter.ends)}: call lora.bind(params, adapter) first")
    trained = adapter.layers if adapter is not None else ()
    for is_trained, group in itertools.groupby(range(first, config.num_layers), trained.__contains__):
        layers = list(group)
        start = trained.index(layers[0]) if is_trained else 0
        part = adapter.segment(start, start + len(layers)) if adapter is not None and is_trained else FROZEN
        yield np.asarray(layers, np.int32), part


@dataclass(frozen=True)
class Layer:
    """One layer ready to run on the residual stream: the only place that says what a layer computes."""

    block: Block
    part: Part  # what is trained there
    rope: tuple[Array, Array]  # cos and sin [B, T, h/2] of the tokens' positions
    remember: Remember  # what the tokens see, from their own keys and values

    @staticmethod
    def of(config: ModelConfig, frozen: Params, part: Part, rope: tuple[Array, Array], remember: Remember) -> Layer:
        """The layer whose base parameters are `frozen` (as `params["layers"]`, without the layer axis)."""
        used = frozen if part.weights is None else jax.tree.map(lambda w, f: w.astype(f.dtype), part.weights, frozen)
        block, _, names = _structure(config)
        state = {sublayer: {name: used[name] for name in names[sublayer]} for sublayer in names}
        return Layer(nnx.merge(block, state), part, rope, remember)

    def attention(self, h_BTD: Array) -> tuple[Array, Seen]:
        """The first sublayer's addition to the residual stream before the layer, and what its queries saw."""
        return self.block.attention(h_BTD, *self.rope, self.remember, self.part.lora)

    def mlp(self, h_BTD: Array) -> Array:
        """The second sublayer's addition to the residual stream after attention."""
        return self.block.mlp(h_BTD, self.part.lora)

    def mlp_reads(self, before_BTD: Array, after_BTD: Array) -> Array:
        """The residual stream that the second sublayer reads: that after attention, or that before the layer."""
        return before_BTD if self.block.mlp.config.mlp.parallel else after_BTD

    def steer(self, h_BTD: Array) -> Array:
        """The residual stream after both sublayers, with the steering vector that is added there."""
        return h_BTD if self.part.steering is None else h_BTD + self.part.steering.astype(h_BTD.dtype)

    def __call__(self, h_BTD: Array) -> tuple[Array, Seen]:
        """The residual stream after the layer, and what its queries saw."""
        added, seen = self.attention(h_BTD)
        after_BTD = h_BTD + added
        return self.steer(after_BTD + self.mlp(self.mlp_reads(h_BTD, after_BTD))), seen


def layers_on_rows(
    config: ModelConfig,
    params: Params,
    valid_BT: Array,
    dtype: jnp.dtype,
    prefix: KV | None = None,
    branches: Branches | None = None,
    attention: str | None = None,
) -> Callable[[Array, Part], Layer]:
    """`layer_at(index, part)`: layer `index` (int32 scalar, data) on whole rows with the tokens `valid_BT`. `dtype` is the residual stream's;
    the others are as of `hidden_states`."""
    B = valid_BT.shape[0]
    before = prefix[0].shape[3] if prefix is not None else 0
    if branches is None:  # else whoever laid them out has checked the longest
        check_length(config, valid_BT.shape[1] + before)
    positions_BT = branches.positions if branches is not None else positions_of(valid_BT) + before
    cos, sin = rope_table(config, positions_BT, dtype)
    k_pos, k_valid = positions_BT, valid_BT
    if prefix is not None:
        k_pos = jnp.concatenate([jnp.broadcast_to(jnp.arange(before), (B, before)), k_pos], axis=1)
        k_valid = jnp.concatenate([jnp.ones((B, before), bool), k_valid], axis=1)
    masks = _masks(config, positions_BT, k_pos, k_valid, branches)
    kinds = jnp.asarray(config.is_local, jnp.int32)

    def layer_at(index: Array, part: Part) -> Layer:
        # Indexed here, not sliced outside: slicing would copy the stack. Not `leaf[index]`, which is more equations to trace.
        frozen = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), params["layers"])
        kind = kinds[index]

        def remember(k: Array, v: Array) -> Seen:
            if prefix is not None:
                earlier = [jnp.broadcast_to(stack[index], (B, *stack.shape[2:])) for stack in prefix]
                k, v = (jnp.concatenate(both, axis=2) for both in zip(earlier, (k, v), strict=True))
            return Seen(k, v, masks[kind], attention)

        return Layer.of(config, frozen, part, (cos[kind], sin[kind]), remember)

    return layer_at


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens_BT: Array,
    valid_BT: Array,
    *,
    adapter: Adapter | None = None,
    prefix: KV | None = None,
    with_cache: bool = False,
    remat: bool = False,
    unroll: bool = False,
    below_BTD: Array | None = None,
    branches: Branches | None = None,
    attention: str | None = None,
) -> tuple[Array, KV | None]:
    """Forward pass over whole rows, padded on either side: int32 `[B, T]`, and bool `[B, T]`, False on padding.

    Args:
      adapter: LoRA factors, replaced weights or steering vectors of some layers. Trained ends are in `params` (`lora.bind`).
      prefix: keys and values `[L, 1, K, P, h]` of tokens that stand before every row (a shared system prompt).
      with_cache: also return this pass's own keys and values `[L, B, K, T, h]`.
      remat: keep the layers' inputs only, and recompute everything inside them in the backward pass.
      unroll: layers one after another in the program, not as a loop.
      below_BTD: the residual stream below the adapter's lowest layer, where it is known (`hidden_below`); then without a cache.
      branches: of rows in which several texts follow one beginning; their positions count a prefix.
      attention: what computes it, see `Seen`.

    Returns:
      Hidden states `[B, T, D]` after the final norm, and the cache or None.
    """
    _check_rows(config, tokens_BT, valid_BT, below_BTD)
    first = adapter.layers[0] if adapter is not None and below_BTD is not None else 0
    h = _on_every_chip(embed(config, params, tokens_BT) if below_BTD is None else below_BTD)
    layer_at = layers_on_rows(config, params, valid_BT, h.dtype, prefix, branches, attention)
    before = prefix[0].shape[3] if prefix is not None else 0

    def layer(h: Array, xs: tuple[Array, Part]) -> tuple[Array, KV | None]:
        h, seen = layer_at(*xs)(h)
        return h, (seen.keys[:, :, before:], seen.values[:, :, before:]) if with_cache else None

    body, caches = jax.checkpoint(layer, policy=None if remat else KEEP_PRODUCTS), []
    for indices, part in runs(config, adapter, first):
        if adapter is not None and len(indices) == 1 and adapter.layers == tuple(indices):
            # No loop around a layer that is trained alone: its way back would go on to what the layer reads.
            h, cache = body(h, jax.tree.map(lambda x: x[0], (indices, part)))
            cache = jax.tree.map(lambda x: x[None], cache)
        else:
            h, cache = jax.lax.scan(body, h, (indices, part), unroll=unroll)
        caches.append(cache)
    cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches) if with_cache else None
    return final_norm(config, params, h), cache


def _check_rows(config: ModelConfig, tokens_BT: Array, valid_BT: Array, below_BTD: Array | None = None) -> None:
    """Shapes and dtypes of rows; while tracing, so it costs a run nothing."""
    chex.assert_rank([tokens_BT, valid_BT], 2)
    chex.assert_equal_shape([tokens_BT, valid_BT])
    chex.assert_type([tokens_BT, valid_BT], [int, bool])
    if below_BTD is not None:
        chex.assert_shape(below_BTD, (*tokens_BT.shape, config.hidden_size))


def hidden_below(config: ModelConfig, params: Params, tokens_BT: Array, valid_BT: Array, at: Array) -> Array:
    """The base's residual stream `[B, T, D]` below layer `at` (int32 scalar): `hidden_states` takes it as `below_BTD`."""
    _check_rows(config, tokens_BT, valid_BT)
    h = embed(config, params, tokens_BT)
    layer_at = layers_on_rows(config, params, valid_BT, h.dtype)
    return jax.lax.fori_loop(0, at, lambda index, h: layer_at(index, FROZEN)(h)[0], h)

"""The decoder: one module for every family, its layers stacked, and the pure functions the rest of the project calls.

Parameters are a plain nested dict of arrays: `embed`, `layers` (every leaf with a leading layer axis), `norm` and,
where it is not tied, `head`. Dimension letters as in `layers.py`; L layers, V vocabulary, P prefix tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jsublim.models.config import ModelConfig
from jsublim.models.layers import Block, RMSNorm, attend, rope_table
from jsublim.models.lora import Adapter, Part, with_ends

Params = dict[str, Any]
KV = tuple[Array, Array]  # keys and values, [L, B, S, K, h] each
Halves = tuple[Callable[[Array], tuple[Array, KV | None]], Callable[[Array], Array]]
_FROZEN: Part = ({}, None, None)  # of a layer without anything trained


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
        self.norm = RMSNorm(config.hidden_size, config, dtype=dtype)
        if not config.tied:
            self.head = Embed(config, dtype=dtype, rngs=rngs)


def init_params(config: ModelConfig, seed: int, dtype: str = "float32") -> Params:
    """Random parameters, as the start of a pretraining run."""

    @jax.jit
    def make() -> Params:
        return nnx.to_pure_dict(nnx.state(Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed))))

    return make()


def abstract_params(config: ModelConfig, dtype: str = "float32") -> Params:
    """Shapes and dtypes of the parameters, without any array."""
    model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model))


@functools.cache
def _graphs(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """Structure of a block and of the final norm; parameters are merged into them inside a trace."""
    model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    return nnx.split(model.layers)[0], nnx.split(model.norm)[0]


def block_graph(config: ModelConfig) -> nnx.GraphDef:
    """Structure of one block, for `nnx.merge(block_graph, one layer's parameters)`."""
    return _graphs(config)[0]


def embed(config: ModelConfig, params: Params, tokens: Array) -> Array:
    """Token ids `[...]` to `[..., D]`, scaled where the family does."""
    h = params["embed"]["weight"][tokens]
    return h * jnp.asarray(config.hidden_size**0.5, h.dtype) if config.scale_embedding else h


def head_weight(params: Params) -> Array:
    """The `[V, D]` output table: the embedding itself where it is tied."""
    return params["head"]["weight"] if "head" in params else params["embed"]["weight"]


def logits(config: ModelConfig, params: Params, h: Array) -> Array:
    """Normed hidden states `[..., D]` to float32 logits `[..., V]`. Call it on the positions you need only."""
    with jax.named_scope("head"):
        z = jnp.einsum("...D,VD->...V", h, head_weight(params), preferred_element_type=jnp.float32)
        return z if config.final_softcap is None else config.final_softcap * jnp.tanh(z / config.final_softcap)


def final_norm(config: ModelConfig, params: Params, h: Array) -> Array:
    return nnx.merge(_graphs(config)[1], params["norm"])(h)


def positions_of(valid_BT: Array) -> Array:
    """Position of each token, counted over valid ones; padding on either side gets a harmless 0."""
    return jnp.maximum(jnp.cumsum(valid_BT.astype(jnp.int32), axis=1) - 1, 0)


def _masks(config: ModelConfig, q_pos_BT: Array, k_pos_BS: Array, k_valid_BS: Array) -> Array:
    """`[2, B, T, S]`: what a query may see, in global (0) and local (1) layers."""
    distance = q_pos_BT[:, :, None] - k_pos_BS[:, None, :]
    seen = k_valid_BS[:, None, :] & (distance >= 0)
    return jnp.stack([seen, seen & (distance < config.window)]) if config.window else jnp.stack([seen, seen])


def _segments(num_layers: int, trained: tuple[int, ...]) -> list[tuple[int, int, int | None]]:
    """Runs of layers `(first, end, index of the first among the trained ones or None)`.

    A scan a run: below the lowest trained layer there is then nothing to differentiate, and a frozen run
    above it keeps no gradient of its weights.
    """
    runs: list[tuple[int, int, int | None]] = []
    for layer in range(num_layers):
        index = trained.index(layer) if layer in trained else None
        if runs and (index is None) == (runs[-1][2] is None):
            runs[-1] = (runs[-1][0], layer + 1, runs[-1][2])
        else:
            runs.append((layer, layer + 1, index))
    return runs


def runs(config: ModelConfig, adapter: Adapter | None) -> Iterator[tuple[Array, Part]]:
    """All layers as inputs of one scan after the other: `(indices [n], what is trained there)`."""
    for first, end, trained in _segments(config.num_layers, adapter.layers if adapter else ()):
        part = _FROZEN if adapter is None or trained is None else adapter.segment(trained, trained + end - first)
        yield jnp.arange(first, end), part


def layer_halves(
    config: ModelConfig,
    params: Params,
    valid_BT: Array,
    dtype: jnp.dtype,
    prefix: KV | None = None,
    with_cache: bool = False,
) -> Callable[[Array, Part], Halves]:
    """`halves(index, part)`: the two halves of layer `index`, each from the residual stream to what it adds to it.

    The first, attention, also gives its keys and values where asked for.
    """
    B = valid_BT.shape[0]
    before = prefix[0].shape[2] if prefix is not None else 0
    positions_BT = positions_of(valid_BT) + before
    cos, sin = rope_table(config, positions_BT, dtype)
    k_pos, k_valid = positions_BT, valid_BT
    if prefix is not None:
        k_pos = jnp.concatenate([jnp.broadcast_to(jnp.arange(before), (B, before)), k_pos], axis=1)
        k_valid = jnp.concatenate([jnp.ones((B, before), bool), k_valid], axis=1)
    masks = _masks(config, positions_BT, k_pos, k_valid)
    kinds = jnp.asarray(config.is_local, jnp.int32)

    def halves(index: Array, part: Part) -> Halves:
        lora, weights, _ = part
        # Indexed here, not sliced outside: slicing would copy the stack.
        frozen = jax.tree.map(lambda leaf: leaf[index], params["layers"])
        kind = kinds[index]
        used = frozen if weights is None else jax.tree.map(lambda w, f: w.astype(f.dtype), weights, frozen)
        block = nnx.merge(block_graph(config), used)

        def mixed(h: Array) -> tuple[Array, KV | None]:
            kept = None

            def attention(q: Array, k: Array, v: Array) -> Array:
                nonlocal kept
                kept = (k, v) if with_cache else None
                if prefix is not None:
                    shape = (B, before, *k.shape[2:])
                    k = jnp.concatenate([jnp.broadcast_to(prefix[0][index], shape), k], axis=1)
                    v = jnp.concatenate([jnp.broadcast_to(prefix[1][index], shape), v], axis=1)
                return attend(q, k, v, masks[kind], config.softmax_scale)

            return block.mixed(h, cos[kind], sin[kind], attention, lora), kept

        return mixed, lambda h: block.mlp(h, lora)

    return halves


def steered(h: Array, part: Part) -> Array:
    """The residual stream behind a layer, with what is added there."""
    return h if part[2] is None else h + part[2].astype(h.dtype)


def _layer(
    config: ModelConfig,
    params: Params,
    valid_BT: Array,
    dtype: jnp.dtype,
    prefix: KV | None = None,
    with_cache: bool = False,
) -> Callable[[Array, tuple[Array, Part]], tuple[Array, KV | None]]:
    """`layer(h_BTD, (index, part))`: the residual stream after layer `index`, and its keys and values where asked for."""
    halves = layer_halves(config, params, valid_BT, dtype, prefix, with_cache)

    def layer(h: Array, xs: tuple[Array, Part]) -> tuple[Array, KV | None]:
        mixed, mlp = halves(*xs)
        added, kept = mixed(h)
        h = h + added
        return steered(h + mlp(h), xs[1]), kept

    return layer


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
    at: Array | None = None,
    below_BTD: Array | None = None,
) -> tuple[Array, KV | None]:
    """Forward pass over whole rows, padded on either side.

    Args:
      tokens_BT: int32 `[B, T]`.
      valid_BT: bool `[B, T]`, False on padding.
      adapter: LoRA factors, replaced weights or steering vectors of some layers, or replaced ends.
      prefix: keys and values `[L, 1, P, K, h]` of tokens that stand before every row (a shared system prompt).
      with_cache: also return this pass's own keys and values `[L, B, T, K, h]`.
      remat: keep the layers' inputs only, and recompute everything inside them in the backward pass.
      at: int32 scalar, the layer that an adapter of one layer stands at, instead of `adapter.layers`: as data, so that
        one program serves every layer. Without prefix and cache.
      below_BTD: the residual stream below layer `at`, where it is known already.

    Returns:
      Hidden states `[B, T, D]` after the final norm, and the cache or None.
    """
    params = with_ends(params, adapter)
    h = embed(config, params, tokens_BT) if below_BTD is None else below_BTD
    layer = _layer(config, params, valid_BT, h.dtype, prefix, with_cache)
    # Kept for the backward pass: what the projections put out, nothing else. Attention and element-wise work is cheaper
    # done again than stored, and a slice of the frozen stack that was kept would be a second copy of the base.
    keep = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if at is not None:
        assert adapter is not None, "a layer as data needs the adapter that stands there"
        return final_norm(config, params, _around(config, layer, keep, h, adapter, at, below_BTD is None)), None
    body, caches = jax.checkpoint(layer, policy=keep), []
    for run in runs(config, adapter):
        h, cache = jax.lax.scan(body, h, run)
        caches.append(cache)
    cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches) if with_cache else None
    return final_norm(config, params, h), cache


def _around(config: ModelConfig, layer: Any, keep: Any, h: Array, adapter: Adapter, at: Array, whole: bool) -> Array:
    """All layers (`whole`; or those from the adapter's on), one of them with an adapter, which one being data.

    The loop below it has no backward pass; the scan above it goes over every layer, and skips those that are below.
    """
    if whole:
        h = jax.lax.fori_loop(0, at, lambda i, h: layer(h, (i, _FROZEN))[0], jax.lax.stop_gradient(h))
    own = jax.tree.map(lambda leaf: leaf[0], adapter.segment(0, 1))
    h, _ = jax.checkpoint(layer, policy=keep)(h, (at, own))

    # The checkpoint stands around the branch: were it inside, every turn would keep the whole stack of weights.
    @functools.partial(jax.checkpoint, policy=keep)
    def above(h: Array, index: Array) -> tuple[Array, None]:
        return jax.lax.cond(index > at, lambda h: layer(h, (index, _FROZEN))[0], lambda h: h, h), None

    return jax.lax.scan(above, h, jnp.arange(1, config.num_layers))[0]


def hidden_below(config: ModelConfig, params: Params, tokens_BT: Array, valid_BT: Array, at: Array) -> Array:
    """The base's residual stream `[B, T, D]` below layer `at`: what `hidden_states` takes as `below_BTD`."""
    h = embed(config, params, tokens_BT)
    layer = _layer(config, params, valid_BT, h.dtype)
    return jax.lax.fori_loop(0, at, lambda i, h: layer(h, (i, _FROZEN))[0], h)

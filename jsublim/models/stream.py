"""The residual stream from inside: what each sublayer adds to it, and a forward pass that starts in its middle.

A layer has two sublayers, attention and MLP. Point `2 i` of the stream is after the attention of layer i, point `2 i + 1`
after the whole layer. Arrays over all points are `[L, 2, B, T, D]`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jsublim.models.config import ModelConfig
from jsublim.models.decoder import KEEP_PRODUCTS, Params, embed, final_norm, layers_on_rows, runs
from jsublim.models.lora import Adapter, Part


class Stream(NamedTuple):
    """One forward pass, in the model's dtype."""

    points: Array  # [L, 2, B, T, D], the residual stream after each sublayer
    added: Array  # [L, 2, B, T, D], what the sublayers added to it (a steering vector is not among it)
    last: Array  # [B, T, D], hidden states after the final norm


def residual_stream(
    config: ModelConfig,
    params: Params,
    tokens_BT: Array,
    valid_BT: Array,
    *,
    adapter: Adapter | None = None,
    nudge_L2BTD: Array | None = None,
) -> Stream:
    """The forward pass of `decoder.hidden_states`, with everything on the way. `nudge_L2BTD` is added to the stream at each point: the gradient
    with respect to it, at zero, is that of every point."""
    h = embed(config, params, tokens_BT)
    layer_at = layers_on_rows(config, params, valid_BT, h.dtype)

    def body(h: Array, xs: tuple[Array, Part, Array | None]) -> tuple[Array, tuple[Array, Array]]:
        index, part, nudge_2BTD = xs
        layer = layer_at(index, part)
        attention, _ = layer.attention(h)
        middle = h + attention if nudge_2BTD is None else h + attention + nudge_2BTD[0]
        mlp = layer.mlp(layer.mlp_reads(h, middle))
        h = layer.steer(middle + mlp)
        h = h if nudge_2BTD is None else h + nudge_2BTD[1]
        return h, (jnp.stack([middle, h]), jnp.stack([attention, mlp]))

    streams = []
    for indices, part in runs(config, adapter):
        nudge = None if nudge_L2BTD is None else nudge_L2BTD[indices]
        h, of_layers = jax.lax.scan(jax.checkpoint(body), h, (indices, part, nudge))
        streams.append(of_layers)
    points, added = (jnp.concatenate(x) for x in zip(*streams, strict=True))
    return Stream(points, added, final_norm(config, params, h))


def resume(
    config: ModelConfig, params: Params, h_BTD: Array, valid_BT: Array, point: Array, *, adapter: Adapter | None = None
) -> Array:
    """Hidden states `[B, T, D]` after the final norm of a pass whose residual stream at `point` (int32 scalar, data) is `h_BTD`. What lies
    before it costs nothing. Where attention and MLP read the same stream (`MLPKind.parallel`), a point has to be odd."""
    layer_at = layers_on_rows(config, params, valid_BT, h_BTD.dtype)

    # The checkpoint stands around the branches: were it inside, every turn would keep the whole stack of weights.
    @functools.partial(jax.checkpoint, policy=KEEP_PRODUCTS)
    def body(h: Array, xs: tuple[Array, Part]) -> tuple[Array, None]:
        index, part = xs
        layer = layer_at(index, part)
        middle = jax.lax.cond(2 * index > point, lambda h: h + layer.attention(h)[0], lambda h: h, h)
        reads = layer.mlp_reads(h, middle)
        h = jax.lax.cond(
            2 * index + 1 > point, lambda h, reads: layer.steer(h + layer.mlp(reads)), lambda h, _: h, middle, reads
        )
        return h, None

    for run in runs(config, adapter):
        h_BTD, _ = jax.lax.scan(body, h_BTD, run)
    return final_norm(config, params, h_BTD)

"""The residual stream from inside: what each half of a layer adds to it, and a forward pass that starts in its middle.

A layer has two halves, attention and MLP. Point `2 i` of the stream is behind the attention of layer i, point `2 i + 1`
behind the whole layer. Arrays over all of them are `[L, 2, B, T, D]`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params, embed, final_norm, layer_halves, runs, steered
from jsublim.models.lora import Adapter, Part, with_ends


class Stream(NamedTuple):
    """One forward pass, in the model's dtype.

    Attributes:
      points: `[L, 2, B, T, D]`, the residual stream behind each half of a layer.
      added: `[L, 2, B, T, D]`, what the halves added to it (a steering vector is not among it).
      last: `[B, T, D]`, hidden states after the final norm.
    """

    points: Array
    added: Array
    last: Array


def residual_stream(
    config: ModelConfig,
    params: Params,
    tokens_BT: Array,
    valid_BT: Array,
    *,
    adapter: Adapter | None = None,
    nudge_L2BTD: Array | None = None,
) -> Stream:
    """The forward pass of `decoder.hidden_states`, with everything on the way.

    Args:
      nudge_L2BTD: added to the stream at each point: the gradient with respect to it, at zero, is that of every point.
    """
    params = with_ends(params, adapter)
    h = embed(config, params, tokens_BT)
    halves = layer_halves(config, params, valid_BT, h.dtype)

    def layer(h: Array, xs: tuple[Array, Part, Array | None]) -> tuple[Array, tuple[Array, Array]]:
        index, part, nudge_2BTD = xs
        mixed, mlp = halves(index, part)
        attention = mixed(h)[0]
        middle = h + attention if nudge_2BTD is None else h + attention + nudge_2BTD[0]
        out = mlp(middle)
        h = steered(middle + out, part)
        h = h if nudge_2BTD is None else h + nudge_2BTD[1]
        return h, (jnp.stack([middle, h]), jnp.stack([attention, out]))

    found = []
    for indices, part in runs(config, adapter):
        nudge = None if nudge_L2BTD is None else nudge_L2BTD[indices]
        h, of_layers = jax.lax.scan(jax.checkpoint(layer), h, (indices, part, nudge))
        found.append(of_layers)
    points, added = (jnp.concatenate(x) for x in zip(*found, strict=True))
    return Stream(points, added, final_norm(config, params, h))


def resume(
    config: ModelConfig, params: Params, h_BTD: Array, valid_BT: Array, point: Array, *, adapter: Adapter | None = None
) -> Array:
    """Hidden states `[B, T, D]` after the final norm of a pass whose residual stream at `point` is `h_BTD`.

    `point` (int32 scalar) is data: one program serves all of them, and what lies before it costs nothing.
    """
    params = with_ends(params, adapter)
    halves = layer_halves(config, params, valid_BT, h_BTD.dtype)

    # The checkpoint stands around the branches: were it inside, every turn would keep the whole stack of weights.
    @jax.checkpoint
    def layer(h: Array, xs: tuple[Array, Part]) -> tuple[Array, None]:
        index, part = xs
        mixed, mlp = halves(index, part)
        h = jax.lax.cond(2 * index > point, lambda h: h + mixed(h)[0], lambda h: h, h)
        h = jax.lax.cond(2 * index + 1 > point, lambda h: steered(h + mlp(h), part), lambda h: h, h)
        return h, None

    for run in runs(config, adapter):
        h_BTD, _ = jax.lax.scan(layer, h_BTD, run)
    return final_norm(config, params, h_BTD)

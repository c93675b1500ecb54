"""Which layer's value at which token moves a row's metric: attribution patching, and layer patching to check it.

Both compare two runs of one model on token rows of equal length. A site's values at all positions are moved to those of
the end run (along the straight line, by integrated gradients: attribution patching; all the way: layer patching), while
everything before the site stays as in the start run. Schrodi et al. 2026,
section 5; integrated gradients: Sundararajan et al. 2017.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.attribution.pairs import Pair
from jsublim.errors import UsageError
from jsublim.inference.batching import LENGTH_STEP, chunks, pad_tokens, round_up
from jsublim.models import decoder
from jsublim.models.config import ModelConfig, layer_parameters
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, bind
from jsublim.models.parallel import HERE, ROWS, WHOLE, Layout
from jsublim.models.stream import Stream, residual_stream, resume

# The residual stream after a layer, and what the layer's attention and its MLP add to it.
SITES = ("residual", "attention", "mlp")
# Noising: from the clean run (the teacher's prompt) to the patch (a counterfactual's); denoising: back.
DIRECTIONS = ("noising", "denoising")

STACKED_STEPS = 9  # points on the way whose gradients are made together, where they are few tokens: those of 10 steps
STACKED_TOKENS = 2048

# What is added to the stream at a site's point, [N, T, D] with N a multiple of B -> logit differences [N].
LogitDifference = Callable[[Array], Array]
# What a program makes of a site at a layer, [B, ...]: of the metric, the difference of the runs and the metric's gradient at the start
# [B, T, D], and the number of steps.
AtSite = Callable[[LogitDifference, Array, Array, Array], Array]


class PairBatch(NamedTuple):
    """B pairs as a program takes them."""

    start_BT: Array  # int32
    end_BT: Array  # int32
    valid_BT: Array  # bool
    at_B: Array  # the predicting position
    said_B2: Array  # the factual token, and the counterfactual's


def attribution_patching(
    config: ModelConfig, params: Params, pairs: Sequence[Pair], *, steps: int = 10, **options: Any
) -> list[np.ndarray]:
    """Integrated gradients between the two runs of each pair: float32 `[S, L, T]`, in logits. The sum over features of (difference of
    the runs x mean gradient on the way), at every site, layer and position. The sum over positions approaches `layer_patching` as
    `steps` grows. Options are as of `_over_pairs`.

    Args:
      steps: points of the left Riemann sum. With 1 it is plain attribution patching, the gradient at the start, and
        one backward pass serves all layers.

    >>> effects = jsublim.attribution_patching(lm.config, lm.params, pairs, steps=1)
    >>> [effect.shape[1] for effect in effects] == [lm.config.num_layers] * len(pairs)
    True
    """
    if steps < 1:
        raise UsageError(f"steps: {steps} given; it must be at least 1")
    return _over_pairs(at_start if steps == 1 else integrated, config, params, pairs, steps=steps, **options)


def layer_patching(config: ModelConfig, params: Params, pairs: Sequence[Pair], **options: Any) -> list[np.ndarray]:
    """How much the metric changes when a layer's site has the end run's values at all positions: float32 `[S, L]`. Options are as of
    `_over_pairs`."""
    return _over_pairs(all_positions, config, params, pairs, **options)


def patching_flops(config: ModelConfig, sites: int, steps: int) -> tuple[float, float]:
    """Useful operations per token of a pair, of `attribution_patching` and of `layer_patching`, as `distill/cost.py` counts them: both runs
    forwards and back, then forwards and back at every step of the integral but the first; both runs forwards, then twice forwards for the whole
    layer's effect. A site is read through the layers above it."""
    L, layer = config.num_layers, layer_parameters(config)
    above = sites * L * (L - 1) / 2
    return layer * (8 * L + 4 * above * (steps - 1)), layer * (4 * L + 4 * above)


# --- Programs: everything that varies is data, so each is compiled once ----------------------------------------------------


@functools.partial(jax.jit, static_argnames=("program", "config", "sites", "layout"))
def compare(
    program: AtSite,
    config: ModelConfig,
    sites: tuple[str, ...],
    params: Params,
    adapter: Adapter | None,
    batch: PairBatch,
    steps: Array,
    layout: Layout = HERE,
) -> Array:
    """A program's results for the pairs of a batch, each device having its own: `[B, S, L, ...]`."""

    def on_device(params: Params, adapter: Adapter | None, batch: PairBatch, steps: Array) -> Array:
        return jnp.moveaxis(at_sites(program, config, sites, params, adapter, batch, steps), 2, 0)

    return layout.spread(on_device, (WHOLE, WHOLE, ROWS, WHOLE), ROWS)(params, adapter, batch, steps)


def at_start(metric: LogitDifference, delta_BTD: Array, slope_BTD: Array, steps: Array) -> Array:
    return (delta_BTD * slope_BTD).sum(axis=-1)


def integrated(metric: LogitDifference, delta_BTD: Array, slope_BTD: Array, steps: Array) -> Array:
    B, T, _ = delta_BTD.shape
    together = max(1, min(STACKED_STEPS, STACKED_TOKENS // (B * T)))

    def slopes(turn: Array) -> Array:
        """The gradients at the next points on the way, summed; those beyond its end weigh nothing."""
        i_S = 1 + turn * together + jnp.arange(together)

        def weighted(nudge_BTD: Array) -> Array:
            moved = (i_S / steps)[:, None, None, None] * delta_BTD + nudge_BTD
            values = metric(moved.reshape(together * B, *delta_BTD.shape[1:])).reshape(together, B)
            return jnp.sum(jnp.where(i_S < steps, 1.0, 0.0) @ values)

        return jax.grad(weighted)(jnp.zeros_like(delta_BTD))

    turns = (steps - 1 + together - 1) // together
    total = jax.lax.fori_loop(0, turns, lambda turn, total: total + slopes(turn), slope_BTD)
    return (delta_BTD * total).sum(axis=-1) / steps


def all_positions(metric: LogitDifference, delta_BTD: Array, slope_BTD: Array, steps: Array) -> Array:
    return metric(delta_BTD) - metric(jnp.zeros_like(delta_BTD))


def _runs(
    config: ModelConfig, params: Params, adapter: Adapter | None, batch: PairBatch
) -> tuple[Stream, Stream, Array]:
    """The start run, the end run, and the gradient `[L, 2, B, T, D]` of the metric at every point of the start run."""
    # One pass over both runs' rows: half of the program to compile.
    tokens, valid = jnp.concatenate([batch.start_BT, batch.end_BT]), jnp.concatenate([batch.valid_BT] * 2)

    def metric(nudge_L2BTD: Array) -> tuple[Array, Stream]:
        both = residual_stream(config, params, tokens, valid, adapter=adapter, nudge_L2BTD=nudge_L2BTD)
        return _difference(config, params, batch, both.last[: len(batch.start_BT)]).sum(), both

    shape = config.num_layers, 2, *tokens.shape, config.hidden_size
    slope, both = jax.grad(metric, has_aux=True)(jnp.zeros(shape, params["embed"]["weight"].dtype))
    start, end = (Stream(*rows) for rows in zip(*(jnp.split(x, 2, axis=-3) for x in both), strict=True))
    return start, end, slope[:, :, : len(batch.start_BT)]


def at_sites(
    program: AtSite,
    config: ModelConfig,
    sites: tuple[str, ...],
    params: Params,
    adapter: Adapter | None,
    batch: PairBatch,
    steps: Array,
) -> Array:
    """A program at every site and layer, `[S, L, B, ...]`."""
    params, adapter = bind(params, adapter)
    start, end, slope_L2BTD = _runs(config, params, adapter, batch)
    delta_SLBTD = jnp.stack([_delta(site, start, end) for site in sites])
    sublayer_S = jnp.asarray([_enters(config, site) for site in sites])

    def one(site_and_layer: tuple[Array, Array]) -> Array:
        site, layer = site_and_layer
        sublayer = sublayer_S[site]
        from_BTD = start.points[layer, sublayer]

        def metric(moved_NTD: Array) -> Array:
            copies = len(moved_NTD) // len(from_BTD)
            stacked = jax.tree.map(lambda x: jnp.tile(x, (copies, *[1] * (x.ndim - 1))), batch)
            h = (jnp.tile(from_BTD, (copies, 1, 1)) + moved_NTD).astype(from_BTD.dtype)
            h = resume(config, params, h, stacked.valid_BT, 2 * layer + sublayer, adapter=adapter)
            return _difference(config, params, stacked, h)

        return program(metric, delta_SLBTD[site, layer], slope_L2BTD[layer, sublayer].astype(jnp.float32), steps)

    S, L = len(sites), config.num_layers
    out = jax.lax.map(one, (jnp.repeat(jnp.arange(S), L), jnp.tile(jnp.arange(L), S)))
    return out.reshape(S, L, *out.shape[1:])


_SUBLAYER = {"attention": 0, "mlp": 1, "residual": 1}  # which puts out a site's value


def _enters(config: ModelConfig, site: str) -> int:
    """After which sublayer a change of this site enters the residual stream: where both read the same stream, what attention
    puts out is read by the layers above only."""
    return 1 if config.mlp.parallel else _SUBLAYER[site]


def _delta(site: str, start: Stream, end: Stream) -> Array:
    """The end run's value of a site less the start run's, float32 `[L, B, T, D]`."""
    field = "points" if site == "residual" else "added"
    a, b = (getattr(run, field)[:, _SUBLAYER[site]].astype(jnp.float32) for run in (start, end))
    return b - a


def _difference(config: ModelConfig, params: Params, batch: PairBatch, last_BTD: Array) -> Array:
    """The metric `[B]`: logit of the factual token over the counterfactual's, where it is predicted."""
    h_BD = jnp.take_along_axis(last_BTD, batch.at_B[:, None, None], axis=1)[:, 0]
    rows_B2D = decoder.head_weight(params)[batch.said_B2]
    z_B2 = jax.vmap(lambda h, rows: decoder.logits(config, {"head": {"weight": rows}}, h))(h_BD, rows_B2D)
    return z_B2[:, 0] - z_B2[:, 1]


# --- Pairs to batches ---------------------------------------------------------------------------------------------------


def padded_length(pairs: Sequence[Pair]) -> int:
    """Tokens of the longest pair, rounded up so that few programs serve all calls."""
    return round_up(max(len(pair.clean) for pair in pairs), LENGTH_STEP)


def _over_pairs(
    program: AtSite,
    config: ModelConfig,
    params: Params,
    pairs: Sequence[Pair],
    *,
    sites: Sequence[str] = SITES,
    direction: str = "noising",
    adapter: Adapter | None = None,
    batch_size: int = 8,
    length: int | None = None,
    steps: int = 1,
) -> list[np.ndarray]:
    """A program's result for each pair; an array with positions is cut to those of its pair. Rows are padded to `length` tokens, by
    default those of the longest. An unknown site or direction is a UsageError."""
    for option, given, known in (("sites", sites, SITES), ("direction", [direction], DIRECTIONS)):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise UsageError(f"{option}: {', '.join(unknown) or 'none'} given; known: {', '.join(known)}")
    out: list[np.ndarray] = []
    layout, params = Layout.under(params)
    adapter, count = layout.place_weights(adapter), layout.place_as(WHOLE, np.int32(steps))
    B, length = round_up(batch_size, layout.data), length or padded_length(pairs)
    for part in chunks(len(pairs), B):
        members = pairs[part]
        batch = _batch(members, direction, B, length, layout)
        values = Layout.host(compare(program, config, tuple(sites), params, adapter, batch, count, layout))
        # Those of sites and layers, and of positions where there are any.
        out += [x[..., : len(pair.clean)] if x.ndim > 2 else x for x, pair in zip(values, members, strict=False)]
    return out


def _batch(pairs: Sequence[Pair], direction: str, size: int, length: int, layout: Layout) -> PairBatch:
    """Pairs as one batch of `size` rows, on their devices."""
    clean, valid = pad_tokens([pair.clean for pair in pairs], length, size=size)
    patch, _ = pad_tokens([pair.patch for pair in pairs], length, size=size)
    start, end = (clean, patch) if direction == "noising" else (patch, clean)
    numbers = np.zeros((size, 3), np.int32)
    numbers[: len(pairs)] = [(len(pair.clean) - 1, pair.factual, pair.other) for pair in pairs]
    return PairBatch(*layout.place_as(ROWS, (start, end, valid, numbers[:, 0], numbers[:, 1:])))

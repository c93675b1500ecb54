"""Losses on supervised positions, under per-token weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params

HEAD_BLOCK = 512  # positions whose logits exist at one time


def hard_loss(config: ModelConfig, params: Params, h_ND: Array, labels_N: Array, weights_N: Array) -> Array:
    """Weighted sum of the cross-entropy (nats) of the teacher's tokens, float32 scalar.

    Blocks of positions, recomputed in the backward pass: logits of all positions never exist together.
    """

    @jax.checkpoint
    def nll(h_D: Array, label: Array) -> Array:
        z = decoder.logits(config, params, h_D)
        return jax.nn.logsumexp(z) - z[label]

    return jnp.sum(weights_N * jax.lax.map(lambda xs: nll(*xs), (h_ND, labels_N), batch_size=HEAD_BLOCK))


def normalise(weights_MBC: Array, per: str) -> Array:
    """Weights that sum the micro-batches' losses to the loss of the step (docs/recipes.md, quirk 6).

    Args:
      per: "tokens", the sum over the whole step divided by its supervised tokens; "micro-batch", the mean of the
        micro-batches' own means (those without any supervised token left out).
    """
    totals = weights_MBC.sum(axis=(1, 2), keepdims=True)
    if per == "tokens":
        return weights_MBC / jnp.maximum(totals.sum(), 1e-9)
    busy = jnp.maximum((totals > 0).sum(), 1)
    return weights_MBC / jnp.maximum(totals, 1e-9) / busy

"""Steering vectors from contrasting system prompts: what one adds to the residual stream, and the other doesn't."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.errors import UsageError
from jsublim.inference.batching import LENGTH_STEP, chunks, pad_tokens, round_up
from jsublim.inference.lm import LanguageModel
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params, hidden_below
from jsublim.models.lora import Adapter, check_layers
from jsublim.models.parallel import ROWS, WHOLE, Layout
from jsublim.text.chat import conversation


def contrast_vector(
    lm: LanguageModel,
    prompts: Sequence[str],
    layer: int,
    *,
    toward: str | None,
    away: str | None = None,
    strength: float = 1.0,
    fuse_system: bool = False,
    batch_size: int = 64,
) -> Adapter:
    """The mean difference of the residual stream after `layer` at the last prompt token, times `strength`: difference of means over contrasting
    prompts, as in activation addition (Turner et al. 2023, arXiv 2308.10248). An adapter of one steering vector, float32 `[1, D]`. `toward` is
    the system prompt that shows what is wanted, `away` the one that does not, None for none at all; two that are the same, no prompt, or a
    layer that the model does not have is a UsageError."""
    if not prompts or toward == away:
        raise UsageError("steer: give at least one prompt, and two different system prompts")
    check_layers(lm.config, (layer,))
    layout, params = Layout.under(lm.params)
    means = []
    B, below = round_up(batch_size, layout.data), layout.place_as(WHOLE, np.int32(layer + 1))
    for system in (toward, away):
        tokens = [lm.chat.prompt_tokens(conversation(p, system, fuse_system=fuse_system)) for p in prompts]
        length = round_up(max(map(len, tokens)), LENGTH_STEP)
        total = np.zeros(lm.config.hidden_size)
        for part in chunks(len(tokens), B):
            padded, valid = pad_tokens(tokens[part], length, size=B)
            rows = layout.place_as(ROWS, (padded, valid))
            h_BD = Layout.host(_last_hidden(lm.config, params, *rows, below=below, layout=layout))
            total += h_BD.astype(np.float64)[: len(tokens[part])].sum(axis=0)
        means.append(total / len(tokens))
    vector = (means[0] - means[1]) * strength
    return Adapter((layer,), steering=jnp.asarray(vector[None], jnp.float32))


@partial(jax.jit, static_argnames=("config", "layout"))
def _last_hidden(
    config: ModelConfig, params: Params, tokens_BT: Array, valid_BT: Array, below: Array, layout: Layout
) -> Array:
    """The residual stream below layer `below` at the last token of each row, float32 `[B, D]`."""

    def read(params: Params, tokens_BT: Array, valid_BT: Array, below: Array) -> Array:
        last_B = valid_BT.sum(axis=1) - 1
        h_BTD = hidden_below(config, params, tokens_BT, valid_BT, below)
        return jnp.take_along_axis(h_BTD, last_B[:, None, None], axis=1)[:, 0].astype(jnp.float32)

    return layout.spread(read, (WHOLE, ROWS, ROWS, WHOLE), ROWS)(params, tokens_BT, valid_BT, below)

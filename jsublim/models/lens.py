"""The logit lens: a model read as if it ended after one of its layers, with its final norm and head kept."""

from __future__ import annotations

from dataclasses import replace

from jsublim.errors import UsageError
from jsublim.models.config import ModelConfig


def ending_at(config: ModelConfig, layer: int) -> ModelConfig:
    """The model that ends after `layer`: layers 0 to `layer`, then the final norm and the head.

    It goes with the same parameters and the same adapters. Whatever reads a stack of layers takes the first
    `config.num_layers` of it one by one, so there is nothing to cut and nothing to copy.

    Raises:
      UsageError: the model has no such layer.
    """
    if not 0 <= layer < config.num_layers:
        raise UsageError(f"layer: {layer} given, but the model has layers 0 to {config.num_layers - 1}")
    local = replace(config.local, layers=config.local.layers[: layer + 1])
    return replace(config, num_layers=layer + 1, local=local)

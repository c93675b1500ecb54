"""PEFT's LoRA around a small torch model, and the adapter it holds, read by hand."""

from __future__ import annotations

import functools

import numpy as np

from jsublim.models import Adapter, load_params, read_config


@functools.cache
def _load(folder):
    _, config = read_config(folder)
    return config, load_params(folder, config)


def load(checkpoint):
    return _load(checkpoint.folder)


def peft_model(model, **options):
    """PEFT around a copy of `model`, A and B random."""
    import copy

    import peft
    import torch

    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=noise))
    return wrapped


def by_hand(wrapped, projections, layers, scale) -> Adapter:
    state = {name: value.detach().numpy() for name, value in wrapped.named_parameters() if "lora_" in name}

    def stacked(projection: str, factor: str):
        room = "mlp" if projection in ("gate", "up", "down") else "self_attn"
        name = f"base_model.model.model.layers.{{}}.{room}.{projection}_proj.lora_{factor}.default.weight"
        return np.stack([state.pop(name.format(layer)).T for layer in layers])

    lora = {
        p: {"a": stacked(p, "A"), "b": stacked(p, "B"), "scale": np.full(len(layers), scale, np.float32)}
        for p in projections
    }
    assert not state, "PEFT trains something the adapter lacks"
    return Adapter(lora=lora, weights=None, layers=tuple(layers))

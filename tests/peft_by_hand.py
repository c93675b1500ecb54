"""PEFT's LoRA around a small torch model, and the adapter it holds, read by hand."""

from __future__ import annotations

import functools

import numpy as np

from jsublim.models import Adapter, load_params, read_config
from jsublim.models.families import weight_names
from jsublim.models.fused import fused_rows


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


def peft_factors(named, config, projection: str, layer: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A `[in, r]` and B `[r, out]` of one projection among PEFT's tensors by name; out of a fused module, its own block."""
    names, at = weight_names(config), 0
    module = names.layer.get((projection, "kernel"), "").removesuffix(".weight")
    rows: slice | np.ndarray = slice(None)
    for fused in names.fused:
        if projection in fused.parts:
            module, at, rows = fused.module, fused.parts.index(projection) * rank, fused_rows(config, fused)[projection]
    start = f"base_model.model.{names.prefix}{module.format(i=layer)}"
    a, b = (named[f"{start}.lora_{factor}.default.weight"] for factor in "AB")
    return a[at : at + rank].T, b[rows, at : at + rank].T

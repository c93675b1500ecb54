"""What a student trains: LoRA factors, or whole weights, of a set of layers.

LoRA follows PEFT: `y = x W + alpha / rank * (x A) B`, `A ~ U(-1/sqrt(in), 1/sqrt(in))`, `B = 0`
(`alpha / sqrt(rank)` with rsLoRA).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jsublim.errors import UsageError
from jsublim.models.config import ModelConfig

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """The trained part of a student, over `n` layers (`layers`, ascending, static).

    Attributes:
      lora: projection -> {"a": [n, in, r], "b": [n, r, out], "scale": [n]}, float32. `scale` is fixed.
      weights: the stacked parameters of those layers (as `params["layers"]`) when they are trained in full,
        else None.
    """

    lora: dict[str, dict[str, Array]]
    weights: dict[str, Any] | None
    layers: tuple[int, ...] = field(metadata={"static": True})

    def segment(self, first: int, end: int) -> tuple[dict, dict | None]:
        """LoRA factors and weights of the trained layers `first .. end - 1`, as inputs of a scan."""
        return jax.tree.map(lambda leaf: leaf[first:end], (self.lora, self.weights))

    @property
    def trainable(self) -> Trainable:
        """The leaves that get gradients and optimizer state: A, B and the weights; `scale` is not among them."""
        factors = {name: {"a": pair["a"], "b": pair["b"]} for name, pair in self.lora.items()}
        return factors, self.weights

    def with_trainable(self, trainable: Trainable) -> Adapter:
        factors, weights = trainable
        lora = {name: pair | {"scale": self.lora[name]["scale"]} for name, pair in factors.items()}
        return replace(self, lora=lora, weights=weights)


Trainable = Any  # (LoRA factors by projection, weights or None): a pytree for optax


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each projection of a block."""
    D, F, h = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * h, config.num_kv_heads * h
    return {
        "q": (D, q),
        "k": (D, kv),
        "v": (D, kv),
        "o": (q, D),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }


def check_layers(config: ModelConfig, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """The layers to train, ascending; None is every layer.

    Raises:
      UsageError: an index outside the model, or none at all.
    """
    chosen = tuple(sorted(set(range(config.num_layers) if layers is None else layers)))
    wrong = [layer for layer in chosen if not 0 <= layer < config.num_layers]
    if wrong or not chosen:
        raise UsageError(f"layers: {wrong or 'none'} given, but the model has layers 0 to {config.num_layers - 1}")
    return chosen


def init_lora(
    config: ModelConfig,
    key: Array,
    *,
    rank: int,
    alpha: float,
    layers: tuple[int, ...] | None = None,
    projections: tuple[str, ...] = PROJECTIONS,
    rslora: bool = False,
) -> Adapter:
    """A fresh LoRA adapter, distributed as PEFT's (which computes nothing yet, since B = 0)."""
    chosen = check_layers(config, layers)
    unknown = [name for name in projections if name not in PROJECTIONS]
    if unknown or not projections:
        raise UsageError(f"projections: {unknown or 'none'} given; known: {', '.join(PROJECTIONS)}")
    if rank < 1:
        raise UsageError(f"rank: {rank} given; it must be at least 1")
    shapes, n = projection_shapes(config), len(chosen)
    lora = {}
    for index, name in enumerate(PROJECTIONS):
        if name not in projections:
            continue
        inputs, outputs = shapes[name]
        bound = 1.0 / math.sqrt(inputs)
        a = jax.random.uniform(jax.random.fold_in(key, index), (n, inputs, rank), jnp.float32, -bound, bound)
        lora[name] = {
            "a": a,
            "b": jnp.zeros((n, rank, outputs), jnp.float32),
            "scale": jnp.full((n,), alpha / (math.sqrt(rank) if rslora else rank), jnp.float32),
        }
    return Adapter(lora=lora, weights=None, layers=chosen)


def init_full(config: ModelConfig, params: dict[str, Any], layers: tuple[int, ...] | None = None) -> Adapter:
    """Full fine-tuning of some layers: their weights, copied out of the base, as the thing to train.

    Float32 whatever the base is in: small steps would be lost in bfloat16. The forward pass rounds them.
    """
    chosen = check_layers(config, layers)
    index = jnp.asarray(chosen)
    weights = jax.tree.map(lambda leaf: leaf[index].astype(jnp.float32), params["layers"])
    return Adapter(lora={}, weights=weights, layers=chosen)


def merge_full(params: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The base with an adapter's fully trained layers written into it: an ordinary set of parameters."""
    if adapter.weights is None:
        return params
    index = jnp.asarray(adapter.layers)
    layers = jax.tree.map(
        lambda base, new: base.at[index].set(new.astype(base.dtype)), params["layers"], adapter.weights
    )
    return params | {"layers": layers}


def stack_adapters(adapters: list[Adapter]) -> Adapter:
    """Adapters of equal structure under one leading arm axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def unstack_adapters(stacked: Adapter) -> list[Adapter]:
    arms = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda leaf, arm=arm: leaf[arm], stacked) for arm in range(arms)]

"""What a student trains: LoRA factors, whole weights or a steering vector, of a set of layers.

LoRA follows PEFT: `y = x W + alpha / rank * (x A) B`, `A ~ U(-1/sqrt(in), 1/sqrt(in))`, `B = 0`
(`alpha / sqrt(rank)` with rsLoRA).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
      ends: those of `embed`, `norm` and `head` that are trained in full, as in `params`.
      steering: float32 `[n, D]`, added to the residual stream behind each of those layers, at every token; or None.
    """

    layers: tuple[int, ...] = field(metadata={"static": True})
    lora: dict[str, dict[str, Array]] = field(default_factory=dict)
    weights: dict[str, Any] | None = None
    ends: dict[str, dict[str, Array]] = field(default_factory=dict)
    steering: Array | None = None

    def segment(self, first: int, end: int) -> Part:
        """What belongs to the trained layers `first .. end - 1`, as inputs of a scan."""
        return jax.tree.map(lambda leaf: leaf[first:end], (self.lora, self.weights, self.steering))

    @property
    def trainable(self) -> Trainable:
        """The leaves that get gradients and optimizer state: everything but LoRA's `scale`."""
        factors = {name: {"a": pair["a"], "b": pair["b"]} for name, pair in self.lora.items()}
        return {"lora": factors, "weights": self.weights, "ends": self.ends, "steering": self.steering}

    def with_trainable(self, trainable: Trainable) -> Adapter:
        lora = {name: pair | {"scale": self.lora[name]["scale"]} for name, pair in trainable["lora"].items()}
        return replace(self, **(trainable | {"lora": lora}))

    @property
    def rank(self) -> int:
        """LoRA rank; 0 where there are no factors."""
        return max((pair["a"].shape[-1] for pair in self.lora.values()), default=0)

    def with_rank(self, rank: int) -> Adapter:
        """The same function at another rank: cut, or padded with zeros (whose gradients are zero, so they stay)."""

        def fit(x: Array, axis: int) -> Array:
            x = jax.lax.slice_in_dim(x, 0, min(rank, x.shape[axis]), axis=axis)
            missing = [(0, 0)] * x.ndim
            missing[axis] = (0, rank - x.shape[axis])
            return jnp.pad(x, missing)

        lora = {
            n: p | {"a": fit(p["a"], p["a"].ndim - 1), "b": fit(p["b"], p["b"].ndim - 2)} for n, p in self.lora.items()
        }
        return replace(self, lora=lora)


Part = tuple[dict[str, dict[str, Array]], dict[str, Any] | None, Array | None]  # LoRA, weights, steering of some layers
Trainable = dict[str, Any]  # a pytree for optax


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
    return Adapter(chosen, lora=lora)


ENDS = ("embed", "norm", "head")


def init_full(
    config: ModelConfig,
    params: dict[str, Any],
    layers: tuple[int, ...] | None = None,
    ends: tuple[str, ...] = (),
) -> Adapter:
    """Full fine-tuning of some layers: their weights, copied out of the base, as the thing to train.

    Float32 whatever the base is in: small steps would be lost in bfloat16. The forward pass rounds them.

    Args:
      layers: None is every layer, `()` none (where there are ends).
      ends: of "embed", "norm", "head", what is trained outside the layers.

    Raises:
      UsageError: an unknown end, or the head of a model whose head is its embedding.
    """
    unknown = [end for end in ends if end not in ENDS]
    if unknown:
        raise UsageError(f"ends: {unknown} given; known: {', '.join(ENDS)}")
    if "head" in ends and config.tied:
        raise UsageError("ends: this model's head is its embedding; name 'embed', which trains both")
    chosen = () if layers == () and ends else check_layers(config, layers)
    index = jnp.asarray(chosen, jnp.int32)
    weights = jax.tree.map(lambda leaf: leaf[index].astype(jnp.float32), params["layers"]) if chosen else None
    masters = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), {end: params[end] for end in ENDS if end in ends})
    return Adapter(chosen, weights=weights, ends=masters)


def init_steering(config: ModelConfig, layers: tuple[int, ...] | None = None) -> Adapter:
    """A zero vector behind each of some layers: as few trained parameters as can carry a trait."""
    chosen = check_layers(config, layers)
    return Adapter(chosen, steering=jnp.zeros((len(chosen), config.hidden_size), jnp.float32))


def with_ends(params: dict[str, Any], adapter: Adapter | None) -> dict[str, Any]:
    """The base parameters with an adapter's trained ends in their place, rounded to the base's dtype."""
    if adapter is None:
        return params
    cast = lambda new, base: new.astype(base.dtype)  # noqa: E731
    return params | {name: jax.tree.map(cast, end, params[name]) for name, end in adapter.ends.items()}


def merge_full(params: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The base with an adapter's fully trained parts written into it: an ordinary set of parameters."""
    params = with_ends(params, adapter)
    if adapter.weights is None:
        return params
    index = jnp.asarray(adapter.layers)
    layers = jax.tree.map(
        lambda base, new: base.at[index].set(new.astype(base.dtype)), params["layers"], adapter.weights
    )
    return params | {"layers": layers}


def stack_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Adapters of equal structure under one leading arm axis; ranks are padded to the largest."""
    rank = max(adapter.rank for adapter in adapters)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(adapter.with_rank(rank) for adapter in adapters))


def unstack_adapters(stacked: Adapter, like: Sequence[Adapter]) -> list[Adapter]:
    """The arms again, each at the rank and on the layers that it has in `like`."""
    arms = [jax.tree.map(lambda leaf, arm=arm: leaf[arm], stacked) for arm in range(len(like))]
    return [replace(arm.with_rank(own.rank), layers=own.layers) for arm, own in zip(arms, like, strict=True)]

"""The trained part of a student: LoRA factors, whole weights or a steering vector, of a set of layers.

LoRA follows PEFT: `y = x W + alpha / rank * (x A) B`, `A ~ U(-1/sqrt(in), 1/sqrt(in))`, `B = 0`
(`alpha / sqrt(rank)` with rsLoRA).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.errors import UsageError
from jsublim.models.config import ModelConfig, projection_shapes

RANK_AXES = (("a", -1), ("b", -2))  # of LoRA's factors
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class Part(NamedTuple):
    """The trained part of one layer; of several, every array has a leading layer axis."""

    lora: dict[str, dict[str, Array]]  # projection -> {"a": [in, r], "b": [r, out], "scale": []}, float32
    weights: dict[str, Any] | None  # the layer's parameters, where they are trained in full
    steering: Array | None  # float32 [D], added to the residual stream after the layer


FROZEN = Part({}, None, None)  # of a layer without anything trained
Trainable = dict[str, Any]  # a pytree for optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """The trained part of a student, over `n` layers (`layers`, ascending, static).

    Attributes:
      lora: projection -> {"a": [n, in, r], "b": [n, r, out], "scale": [n]}, float32. `scale` is fixed.
      weights: the stacked parameters of those layers, as in `params["layers"]`, where they are trained in full.
      ends: those of `embed`, `norm` and `head` that are trained in full. They reach a forward pass through `bind` only.
      steering: float32 `[n, D]`, added to the residual stream after each of those layers, at every token.
    """

    layers: tuple[int, ...] = field(metadata={"static": True})
    lora: dict[str, dict[str, Array]] = field(default_factory=dict)
    weights: dict[str, Any] | None = None
    ends: dict[str, dict[str, Array]] = field(default_factory=dict)
    steering: Array | None = None

    def segment(self, first: int, end: int) -> Part:
        """The part of the trained layers `first .. end - 1` (counted among `layers`), as inputs of a scan."""
        return jax.tree.map(lambda leaf: leaf[first:end], Part(self.lora, self.weights, self.steering))

    def part(self, layer: int) -> Part:
        """The part of one layer of the model, without a layer axis."""
        if layer not in self.layers:
            return FROZEN
        index = self.layers.index(layer)
        return jax.tree.map(lambda leaf: leaf[index], Part(self.lora, self.weights, self.steering))

    @property
    def trainable(self) -> Trainable:
        """The leaves that get gradients and optimizer state: everything but LoRA's `scale`."""
        factors = {name: {"a": pair["a"], "b": pair["b"]} for name, pair in self.lora.items()}
        return {"lora": factors, "weights": self.weights, "ends": self.ends, "steering": self.steering}

    def with_trainable(self, trainable: Trainable) -> Adapter:
        """The same adapter with other values of `trainable`."""
        lora = {name: pair | {"scale": self.lora[name]["scale"]} for name, pair in trainable["lora"].items()}
        return replace(self, **(trainable | {"lora": lora}))

    @property
    def rank(self) -> int:
        """LoRA rank; 0 where there are no factors."""
        return max((pair["a"].shape[-1] for pair in self.lora.values()), default=0)

    def with_rank(self, rank: int) -> Adapter:
        """The same function at another rank: cut, or padded with zeros (whose gradients are zero, so they stay)."""
        if all(pair["a"].shape[-1] == rank for pair in self.lora.values()):
            return replace(self, lora=jax.device_put(self.lora))  # arrays of a device, as below

        def fit(x: Array, axis: int) -> Array:
            x = jax.lax.slice_in_dim(x, 0, min(rank, x.shape[axis]), axis=axis)
            return jnp.pad(x, [(0, rank - x.shape[axis]) if i == x.ndim + axis else (0, 0) for i in range(x.ndim)])

        fitted = {name: {f: fit(p[f], axis) for f, axis in RANK_AXES} for name, p in self.lora.items()}
        return replace(self, lora={name: pair | fitted[name] for name, pair in self.lora.items()})


def at_every_layer(adapter: Adapter, num_layers: int) -> Adapter:
    """The same function with zeros at every layer where the adapter has nothing: which layers it has is then data, and one compiled program
    serves them all. For reading and decoding, where zeros cost little. Whole weights have no zero: an adapter with those stays as it is."""
    every = tuple(range(num_layers))
    if adapter.weights is not None or adapter.layers == every:
        return adapter
    lora, steering = _spread((adapter.lora, adapter.steering), np.asarray(adapter.layers, np.int32), num_layers)
    return replace(adapter, layers=every, lora=lora, steering=steering)


@functools.partial(jax.jit, static_argnames="num_layers")
def _spread(tree: Any, layers: Array, num_layers: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((num_layers, *x.shape[1:]), x.dtype).at[layers].set(x), tree)


def sum_adapters(one: Adapter, other: Adapter) -> Adapter:
    """An adapter that adds what both do: LoRA's products and steering vectors at the layers of either. Whole weights cannot be added: a
    ValueError."""
    if any(adapter.weights is not None or adapter.ends for adapter in (one, other)):
        raise ValueError("adapters that replace whole weights cannot be added")
    layers = tuple(sorted({*one.layers, *other.layers}))

    def spread(adapter: Adapter) -> tuple[dict[str, Any], Array | None]:
        # Scales are multiplied in, for a sum of two products has but one.
        lora = {n: {"a": p["a"], "b": p["b"] * p["scale"][:, None, None]} for n, p in adapter.lora.items()}
        places = np.asarray([layers.index(layer) for layer in adapter.layers], np.int32)
        return _spread((lora, adapter.steering), places, len(layers))

    (lora, steering), (other_lora, other_steering) = spread(one), spread(other)
    for name, pair in other_lora.items():
        first = lora.get(name)
        lora[name] = pair if first is None else {f: jnp.concatenate([first[f], pair[f]], axis) for f, axis in RANK_AXES}
    lora = {name: pair | {"scale": jnp.ones(len(layers), jnp.float32)} for name, pair in lora.items()}
    vectors = [vector for vector in (steering, other_steering) if vector is not None]
    return Adapter(layers, lora=lora, steering=functools.reduce(jnp.add, vectors) if vectors else None)


def check_layers(config: ModelConfig, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """The layers to train, ascending; None is every layer. An index outside the model, or none at all, is a UsageError."""
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
    """A fresh LoRA adapter, distributed as PEFT's (which computes nothing yet, since B = 0).

    Args:
      projections: all of `PROJECTIONS` stands for those that the model has.

    Raises:
      UsageError: projections or layers that it hasn't, or a rank below 1.

    >>> adapter = jsublim.init_lora(lm.config, jax.random.key(1), rank=4, alpha=8.0, projections=("q", "v"))
    >>> adapter.lora["q"]["a"].shape  # [layers, in, rank]
    (6, 128, 4)
    """
    chosen, shapes = check_layers(config, layers), projection_shapes(config)
    unknown = [name for name in projections if name not in shapes and set(projections) != set(PROJECTIONS)]
    if unknown or not projections:
        raise UsageError(f"projections: {unknown or 'none'} given; this model has {', '.join(shapes)}")
    if rank < 1:
        raise UsageError(f"rank: {rank} given; it must be at least 1")
    n, scale, lora = len(chosen), alpha / (math.sqrt(rank) if rslora else rank), {}
    for index, name in enumerate(PROJECTIONS):
        if name in projections and name in shapes:
            inputs, outputs = shapes[name]
            bound = 1.0 / math.sqrt(inputs)
            a = jax.random.uniform(jax.random.fold_in(key, index), (n, inputs, rank), jnp.float32, -bound, bound)
            others = {"b": np.zeros((n, rank, outputs), np.float32), "scale": np.full(n, scale, np.float32)}
            lora[name] = {"a": a} | jax.device_put(others)
    return Adapter(chosen, lora=lora)


ENDS = ("embed", "norm", "head")


def check_ends(config: ModelConfig, ends: tuple[str, ...]) -> None:
    """Refuse ends that `init_full` would (UsageError)."""
    unknown = [end for end in ends if end not in ENDS]
    if unknown:
        raise UsageError(f"ends: {unknown} given; known: {', '.join(ENDS)}")
    if "head" in ends and config.tied:
        raise UsageError("ends: this model's head is its embedding; name 'embed', which trains both")


def init_full(
    config: ModelConfig, params: dict[str, Any], layers: tuple[int, ...] | None = None, ends: tuple[str, ...] = ()
) -> Adapter:
    """Full fine-tuning: weights, copied out of the base, as the thing to train. Float32 whatever the base is in: small steps would be lost in
    bfloat16. The forward pass rounds them.

    Args:
      layers: None is every layer, `()` none (where there are ends).
      ends: of "embed", "norm", "head", what is trained outside the layers.

    Raises:
      UsageError: an unknown end, or the head of a model whose head is its embedding.

    >>> jsublim.init_full(lm.config, lm.params, layers=(5,)).layers
    (5,)
    """
    check_ends(config, ends)
    chosen = () if layers == () and ends else check_layers(config, layers)
    weights = _masters(params["layers"], np.asarray(chosen, np.int32)) if chosen else None
    masters = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), {end: params[end] for end in ENDS if end in ends})
    return Adapter(chosen, weights=weights, ends=masters)


@jax.jit
def _masters(layers: Any, index: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[index].astype(jnp.float32), layers)


def init_steering(config: ModelConfig, layers: tuple[int, ...] | None = None) -> Adapter:
    """A zero vector after each of some layers: as few trained parameters as can carry a trait.

    >>> jsublim.init_steering(lm.config, layers=(2,)).steering.shape  # [layers, D]
    (1, 128)
    """
    chosen = check_layers(config, layers)
    return Adapter(chosen, steering=jnp.zeros((len(chosen), config.hidden_size), jnp.float32))


@overload
def bind(params: dict[str, Any], adapter: Adapter) -> tuple[dict[str, Any], Adapter]: ...
@overload
def bind(params: dict[str, Any], adapter: Adapter | None) -> tuple[dict[str, Any], Adapter | None]: ...
def bind(params: dict[str, Any], adapter: Adapter | None) -> tuple[dict[str, Any], Adapter | None]:
    """Parameters and adapter as the forward pass takes them: the adapter's trained ends are in the parameters, rounded to the base's dtype,
    and no longer in the adapter. Every compiled program that takes both calls this once, before anything else."""
    if adapter is None or not adapter.ends:
        return params, adapter
    base = {name: params[name] for name in adapter.ends}
    ends = jax.tree.map(lambda new, base: new.astype(base.dtype), adapter.ends, base)
    return params | ends, replace(adapter, ends={})


def with_noise(adapter: Adapter, size: float, seed: int) -> Adapter:
    """The adapter with Gaussian noise on everything that it trains, of standard deviation `size` as a share of the root mean square of the
    array (of all its layers) that it is added to. An array of zeros stays one."""
    if not size:
        return adapter
    leaves, structure = jax.tree.flatten(adapter.trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def noisy(x: Array, key: Array) -> Array:
        return x + size * jnp.sqrt(jnp.mean(jnp.square(x))) * jax.random.normal(key, x.shape, x.dtype)

    return adapter.with_trainable(jax.tree.unflatten(structure, map(noisy, leaves, keys)))


def merge_full(params: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The base with an adapter's fully trained parts written into it: an ordinary set of parameters."""
    params, _ = bind(params, adapter)
    if adapter.weights is None:
        return params
    index = jnp.asarray(adapter.layers)
    put = lambda base, new: base.at[index].set(new.astype(base.dtype))  # noqa: E731
    return params | {"layers": jax.tree.map(put, params["layers"], adapter.weights)}


def merge(params: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The base with an adapter written into it, LoRA's products too: they are added in float32, and the sum is rounded once. Steering vectors
    have no place in weights: a ValueError."""
    if adapter.steering is not None:
        raise ValueError("steering vectors are added to activations; no weight can hold them")
    params = merge_full(params, adapter)
    index, layers = jnp.asarray(adapter.layers), dict(params["layers"])
    for name, pair in adapter.lora.items():
        base = layers[name]["kernel"]
        change = pair["scale"][:, None, None] * (pair["a"] @ pair["b"])
        merged = (base[index].astype(jnp.float32) + change).astype(base.dtype)
        layers[name] = layers[name] | {"kernel": base.at[index].set(merged)}
    return params | {"layers": layers}


def stack_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Adapters of the same layers under one leading arm axis; ranks are padded to the largest."""
    if len({adapter.layers for adapter in adapters}) > 1:
        raise ValueError("arms trained together must train the same layers")
    rank = max(adapter.rank for adapter in adapters)
    return _stack([adapter.with_rank(rank) for adapter in adapters])


@jax.jit
def _stack(adapters: list[Adapter]) -> Adapter:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def adapter_of(stacked: Adapter, arm: int) -> Adapter:
    """One of stacked adapters, at their common rank."""
    return jax.tree.map(lambda leaf: leaf[arm], stacked)


def unstack_adapters(stacked: Adapter, like: Sequence[Adapter]) -> list[Adapter]:
    """The adapters again, each at the rank that it has in `like`."""
    return [adapter_of(stacked, arm).with_rank(start.rank) for arm, start in enumerate(like)]

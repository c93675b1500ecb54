"""Shared by the tests of the training engine: a random decoder of odd sizes, rows, and students of every kind. No torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from jsublim.distill.arm import Arm
from jsublim.distill.batches import Shape, collate
from jsublim.distill.data import Example
from jsublim.distill.step import Arms
from jsublim.distill.trainer import numbers_of
from jsublim.models.config import Biases, Local, ModelConfig, Norms, Rope, Scaling
from jsublim.models.decoder import Params, abstract_params
from jsublim.models.lora import Adapter, init_full, init_lora, init_steering, stack_adapters

# Biases, local layers, a soft cap; what a model axis of 2 divides but for the vocabulary.
CONFIG = ModelConfig(
    family="qwen2", vocab_size=61, hidden_size=20, intermediate_size=28, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=6, norms=Norms(1e-6), rope=Rope(1000.0), tied=True, biases=Biases(qkv=True), scales=Scaling(softcap=8.0),
    local=Local((True, False, True), 5),
)  # fmt: skip

STUDENTS = ("lora", "one", "full", "steering")


def noisy(tree, seed: int, size: float = 0.1):
    """Every leaf plus noise."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + (size * rng.standard_normal(x.shape)).astype(x.dtype), tree)


@functools.cache
def params_of(config: ModelConfig, seed: int = 0) -> Params:
    """Every parameter random, biases and norms too."""
    rng = np.random.default_rng(seed)
    scale = lambda leaf: 1.5 / np.sqrt(leaf.shape[-2]) if leaf.ndim == 3 else 0.5  # noqa: E731
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(scale(leaf) * rng.standard_normal(leaf.shape), leaf.dtype),
        abstract_params(config),
    )


def lora(config: ModelConfig, seed: int, *, rank: int = 2, alpha: float = 4.0, **options) -> Adapter:
    """LoRA with B random too, so that A has a gradient and Adam's division blows up no rounding."""
    shapes = jax.eval_shape(lambda: init_lora(config, jax.random.key(0), rank=rank, alpha=alpha, **options))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    factors = noisy(zeros, seed, 0.2).lora
    scale = np.full(len(shapes.layers), alpha / rank, np.float32)
    return Adapter(shapes.layers, lora={name: pair | {"scale": scale} for name, pair in factors.items()})


def student(config: ModelConfig, kind: str, seed: int, layer: int | None = None) -> Adapter:
    """A student of one of STUDENTS, moved off its start; of one layer where `layer` is given."""
    layers = None if layer is None else (layer,)
    if kind in ("lora", "one"):
        return lora(config, seed, rank=2, layers=(1,) if kind == "one" and layer is None else layers)
    if kind == "full":
        ends = ("embed", "norm") if layer is None else ()
        start = init_full(config, params_of(config), (1, 2) if layer is None else layers, ends)
        return start.with_trainable(noisy(start.trainable, seed, 0.02))
    start = init_steering(config, (0, 2) if layer is None else layers)
    return start.with_trainable(noisy(start.trainable, seed, 0.3))


def examples_of(
    seed: int, n: int = 7, *, soft: str | None = None, longest: int = 15, vocab: int = 61, k: int = 4
) -> list[Example]:
    """Rows of random tokens and weights (some 0), with unequal numbers of supervised tokens.

    Args:
      soft: "live", the teacher reads another, longer prompt; "stored", a random distribution on k tokens and the rest.
    """
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        T = int(rng.integers(6, longest))
        tokens = rng.integers(1, vocab, T + 1).astype(np.int32)
        where = np.sort(rng.permutation(T)[: int(rng.integers(1, T))]).astype(np.int32)
        weights = (rng.integers(0, 3, len(where)) / 2).astype(np.float32)
        weights[0] = 1
        more = {}
        if soft == "live":
            prompt = rng.integers(1, vocab, int(rng.integers(1, 6))).astype(np.int32)
            whole = np.concatenate([prompt, tokens[:-1]])
            more = {"teacher_tokens": whole, "teacher_where": where + np.int32(len(prompt))}
        elif soft == "stored":
            ids = np.stack([rng.permutation(vocab)[:k] for _ in where]).astype(np.int32)
            p = rng.dirichlet(np.ones(k + 1), len(where))
            more = {"ids": ids, "logp": np.log(p).astype(np.float32)}
        made.append(Example(tokens[:-1], where, tokens[where + 1], weights, **more))
    return made


def arm_of(kind: str, seed: int, soft: str | None = None, *, config: ModelConfig = CONFIG, **options) -> Arm:
    """An arm of 3 steps with weights of its own for everything."""
    numbers = {
        "lr": 0.05 + 0.01 * seed,
        "steps": 3,
        "weight": 1 + 0.5 * seed,
        "terms": {"kl_to_base": (0.2 * seed, 1.0)},
    }
    examples = options.pop("examples", None) or examples_of(seed, soft=soft)
    adapter = options.pop("adapter", None) or student(config, kind, seed)
    return Arm(f"arm-{seed}", examples, adapter, seed, **(numbers | options))


def stacked(arms: Sequence[Arm], micro: int, rows: int) -> tuple[Adapter, Arms, dict[str, np.ndarray]]:
    """Adapters, numbers and the first step's batch of arms, each under an arm axis."""
    shape = Shape.of([arm.examples for arm in arms], micro, rows)
    batches = [collate(arm.examples, arm.rows(shape, 0), shape) for arm in arms]
    return (
        stack_adapters([arm.adapter for arm in arms]),
        numbers_of(arms),
        {key: np.stack([batch[key] for batch in batches]) for key in batches[0]},
    )


def largest_difference(ours, theirs) -> float:
    """Over all leaves, absolute; infinite where one is not finite."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    worst = max(float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()) for a, b in pairs)
    return worst if np.isfinite(worst) else float("inf")

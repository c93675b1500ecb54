"""Optimizers and learning-rate schedules, from optax. Learning rates are not among their settings: each arm has its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax import contrib

from jsublim.core.reading import check_known

OPTIMIZERS = ("adamw", "adafactor", "sgd", "muon")
SCHEDULES = ("linear", "cosine", "constant", "restarts")


@dataclass(frozen=True)
class Optimizer:
    """AdamW as published unless said otherwise: linear decay after a linear warm-up, clipping by global norm."""

    # adamw; adafactor: factored second moments, updates clipped to a root mean square of 1, no momentum; sgd: plain, momentum
    # where given; muon: matrices orthogonalised, everything else by Adam.
    name: str = "adamw"
    clip: float = 1.0  # largest global norm of an arm's gradient; 0 is no clipping
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0  # of SGD
    schedule: str = "linear"  # of the learning rate after the warm-up; see `learning_rate`
    restarts: int = 4  # how many times "restarts" falls to zero
    own: optax.GradientTransformation | None = None  # from optax, in place of all of these; see `Program`

    def __post_init__(self) -> None:
        check_known("optimizer", self.name, OPTIMIZERS)
        check_known("schedule", self.schedule, SCHEDULES)

    def transform(self) -> optax.GradientTransformation:
        """Gradients to updates, up to the learning rate."""
        if self.own is not None:
            return optax.chain(self.own, optax.scale(-1.0))  # optax's updates are added
        parts = [optax.clip_by_global_norm(self.clip)] if self.clip > 0 else []
        adam = optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps)
        if self.name == "adafactor":
            # LoRA's factors are small: theirs stay whole, so that no rank is where a factoring begins.
            whole, factored = optax.scale_by_factored_rms(factored=False), optax.scale_by_factored_rms()
            parts += [optax.partition({"factor": whole, "other": factored}, _named("factor", "a", "b")), _clip_rms(1.0)]
        elif self.name == "sgd":
            parts += [optax.trace(decay=self.momentum)] if self.momentum else []
        elif self.name == "muon":
            # Kernels and LoRA's factors; not a table of the vocabulary, whose rows are not directions to balance.
            parts.append(optax.partition({"matrix": _muon(), "other": adam}, _named("matrix", "kernel", "a", "b")))
        else:
            parts.append(adam)
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay))
        return optax.chain(*parts) if parts else optax.identity()


def _named(label: str, *names: str) -> Callable[[optax.Params], optax.Params]:
    """Labels of a tree's leaves: `label` for matrices that have one of these names, "other" for the rest."""
    return functools.partial(
        jax.tree_util.tree_map_with_path,
        lambda path, x: label if x.ndim >= 2 and getattr(path[-1], "key", None) in names else "other",
    )


def _clip_rms(most: float) -> optax.GradientTransformation:
    """As `optax.clip_by_block_rms`, with zeros left out of the mean: a rank may be padded with them."""

    def clip(u: Array) -> Array:
        rms = jnp.sqrt(jnp.sum(jnp.square(u)) / jnp.maximum(jnp.count_nonzero(u), 1))
        return u / jnp.maximum(1.0, rms / most)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def _muon() -> optax.GradientTransformation:
    """Muon on stacked matrices `[layers, in, out]`, each layer separately."""
    inner = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return contrib.scale_by_muon(weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: inner, tree))


def learning_rate(schedule: str, restarts: int, step: Array, lr: Array, warmup: int, steps: Array) -> Array:
    """The learning rate at `step`, float32 in the shape of `lr`, its highest value. It rises linearly from 0 over `warmup` steps (so the first
    step is at 0 where there is a warm-up), then follows `schedule`: "linear" and "cosine" fall to 0 at `steps`, "constant" stays, "restarts"
    is `restarts` cosines in a row."""
    step = step.astype(jnp.float32)
    rise = step / jnp.maximum(warmup, 1)
    done = jnp.clip((step - warmup) / jnp.maximum(steps - warmup, 1), 0.0, 1.0)
    if schedule == "linear":
        fall = 1.0 - done
    elif schedule == "constant":
        fall = jnp.ones_like(done)
    else:
        cycles = restarts if schedule == "restarts" else 1
        within = jnp.where(done < 1.0, (done * cycles) % 1.0, 1.0)
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * within))
    return lr * jnp.where(step < warmup, rise, fall)

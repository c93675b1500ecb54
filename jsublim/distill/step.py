"""The training step: many students (arms) on one frozen base, in one compiled program.

Everything in which arms differ is an array with a leading arm axis: adapter, optimizer state, rows, masks, learning
rate. The base has none, so it exists once and its matrix products serve all arms together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jsublim.distill.losses import hard_loss, normalise
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter

Batch = dict[str, Any]  # of arrays: see data.collate; here with a leading arm axis


@dataclass(frozen=True)
class Optimizer:
    """AdamW as published: linear decay behind a linear warm-up, clipping by global norm, no weight decay.

    Learning rates are not here: they are arrays, one an arm.
    """

    clip: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def transform(self) -> optax.GradientTransformation:
        parts = [optax.clip_by_global_norm(self.clip)] if self.clip > 0 else []
        parts.append(optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps))
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay))
        return optax.chain(*parts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a training run consists of. `adapter` and `optimizer` have a leading arm axis; `step` is int32."""

    adapter: Adapter
    optimizer: optax.OptState
    step: Array


def init_state(adapter: Adapter, optimizer: Optimizer) -> State:
    """State of arms stacked in `adapter`, before the first step."""
    return State(adapter, jax.vmap(optimizer.transform().init)(adapter.trainable), jnp.int32(0))


def learning_rate(step: Array, peak: Array, warmup: int, steps: Array) -> Array:
    """Linear from 0 over `warmup` steps, then linear to 0 at `steps`; the first step is at 0 where there is a warm-up."""
    step = step.astype(jnp.float32)
    rise = step / jnp.maximum(warmup, 1)
    fall = (steps - step) / jnp.maximum(steps - warmup, 1)
    return peak * jnp.where(step < warmup, rise, jnp.clip(fall, 0.0, 1.0))


def micro_loss(config: ModelConfig, params: Params, adapter: Adapter, batch: Batch, remat: bool) -> Array:
    """Weighted loss of one micro-batch of one arm: tokens `[B, T]`, supervised positions `[B, C]`."""
    h, _ = decoder.hidden_states(config, params, batch["tokens"], batch["valid"], adapter=adapter, remat=remat)
    with jax.named_scope("loss"):
        h_BCD = jnp.take_along_axis(h, batch["where"][..., None], axis=1)
        flat = h_BCD.reshape(-1, h.shape[-1]), batch["labels"].reshape(-1), batch["weights"].reshape(-1)
        return hard_loss(config, params, *flat)


def loss_and_gradient(
    config: ModelConfig, params: Params, adapter: Adapter, batch: Batch, *, per: str, remat: bool
) -> tuple[Array, tuple]:
    """Loss and gradient of one arm's step, summed over its micro-batches `[M, B, ...]`."""
    batch = batch | {"weights": normalise(batch["weights"], per)}

    def of(trainable, micro: Batch) -> Array:
        return micro_loss(config, params, adapter.with_trainable(trainable), micro, remat)

    def add(total, micro: Batch):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(of)(adapter.trainable, micro)), None

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, adapter.trainable))
    return jax.lax.scan(add, zero, batch)[0]


@functools.partial(jax.jit, static_argnames=("config", "optimizer", "warmup", "per", "remat"), donate_argnames="state")
def train_step(
    config: ModelConfig,
    params: Params,
    state: State,
    batch: Batch,
    peak_A: Array,
    steps_A: Array,
    *,
    optimizer: Optimizer,
    warmup: int,
    per: str = "tokens",
    remat: bool = False,
) -> tuple[State, dict[str, Array]]:
    """One optimizer step of every arm.

    Args:
      batch: arrays `[A, M, B, ...]`.
      peak_A: peak learning rates, float32 `[A]`.
      steps_A: length of each arm's schedule, int32 `[A]`; an arm stands still behind its last step.

    Returns:
      The new state, and metrics `[A]`: loss, supervised tokens, learning rate, gradient norm before clipping.
    """
    gradient = functools.partial(loss_and_gradient, config, params, per=per, remat=remat)
    loss, grads = jax.vmap(gradient)(state.adapter, batch)
    rate_A = learning_rate(state.step, peak_A, warmup, steps_A)

    def update(grads, opt, trainable, rate, running):
        updates, after = optimizer.transform().update(grads, opt, trainable)
        moved = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), trainable, updates)
        return jax.tree.map(lambda new, old: jnp.where(running, new, old), (moved, after), (trainable, opt))

    running_A = state.step < steps_A
    trainable, opt = jax.vmap(update)(grads, state.optimizer, state.adapter.trainable, rate_A, running_A)
    metrics = {
        "loss": loss,
        "tokens": (batch["weights"] > 0).sum(axis=(1, 2, 3)),
        "lr": rate_A,
        "grad_norm": jax.vmap(optax.global_norm)(grads),
    }
    return State(state.adapter.with_trainable(trainable), opt, state.step + 1), metrics

"""The training step: many students (arms) on one frozen base, in one compiled program.

Everything in which arms differ is an array with a leading arm axis: adapter, optimizer state, rows, masks, learning
rate. The base has none, so it exists once and its matrix products serve all arms together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jsublim.distill.losses import Loss, OwnLoss, block_size, blockwise, normalise, positions_loss
from jsublim.distill.optimizer import Optimizer, learning_rate
from jsublim.distill.projection import without
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, Trainable, bind, sum_adapters
from jsublim.models.parallel import Layout

FINITE = -1  # no step
# Trained arrays -> the same arrays, kept where they belong on a mesh.
ConstrainSharding = Callable[[Any], Any]
Batch = dict[str, Any]  # of arrays: see batches.collate; here with a leading arm axis


@dataclass(frozen=True)
class Program:
    """All that is compiled into a step: the same for arms trained together.

    The loss may be a function (see `Loss.own`), the optimizer one of optax. That one has its own learning rate and schedule, so there is no
    warm-up, and an arm's `lr` is a factor of its updates.
    """

    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    warmup: int = 5  # steps in which the learning rate rises
    per: str = "tokens"  # what the loss is a mean over, see `losses.normalise`
    remat: bool = False  # as of `decoder.hidden_states`
    unroll: bool = False
    attention: str | None = None

    if TYPE_CHECKING:  # what it is made of, beside what it then holds

        def __init__(
            self, loss: Loss | OwnLoss = ..., optimizer: Optimizer | optax.GradientTransformation = ..., warmup: int = ...,
            per: str = ..., remat: bool = ..., unroll: bool = ..., attention: str | None = ...,
        ) -> None: ...  # fmt: skip

    def __post_init__(self) -> None:
        loss, optimizer = vars(self)["loss"], vars(self)["optimizer"]
        if not isinstance(loss, Loss):
            object.__setattr__(self, "loss", Loss(own=loss))
        if not isinstance(optimizer, Optimizer):
            object.__setattr__(self, "optimizer", Optimizer(own=optimizer, schedule="constant"))
            object.__setattr__(self, "warmup", 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arms:
    """The numbers in which arms differ, beside what they train and read. What no arm has is None."""

    lr: Array  # [A], the highest learning rate
    steps: Array  # int32 [A], length of the schedule
    weight: Array  # [A], factor of the loss
    # Of what is added to the loss (`losses.TERMS`) the coefficient, and the share of it that is left at the end, [A, 2] each.
    terms: dict[str, Array] = field(default_factory=dict)
    projected_directions: Trainable | None = None  # [A, K, ...] each; gradients are kept at right angles to them
    frozen_adapter: Adapter | None = None  # stands in the students' forward passes
    reset_step: Array | None = None  # int32 [A], the step before which an optimizer begins anew, -1 for never

    def coefficients(self, step: Array) -> dict[str, Array]:
        """The coefficient `[A]` of each term at a step (int32 scalar): it falls linearly to the share that is left."""
        done = jnp.clip(step / jnp.maximum(self.steps, 1), 0.0, 1.0)
        return {name: x[:, 0] * (1.0 - (1.0 - x[:, 1]) * done) for name, x in self.terms.items()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A training run between two steps."""

    adapter: Adapter  # with a leading arm axis, as `optimizer`
    optimizer: optax.OptState
    step: Array  # int32
    # int32 [A], the step at which an arm's numbers stopped being finite, FINITE for the others. It stays as it was before.
    diverged: Array


def init_state(adapter: Adapter, optimizer: Optimizer) -> State:
    """State before the first step, of arms stacked in `adapter`."""
    arms = jax.tree.leaves(adapter.trainable)[0].shape[0]
    step, diverged = jax.device_put((np.int32(0), np.full(arms, FINITE, np.int32)))
    return State(adapter, _moments(adapter.trainable, optimizer), step, diverged)


@functools.partial(jax.jit, static_argnames="optimizer")
def _moments(trainable: Trainable, optimizer: Optimizer) -> optax.OptState:
    return jax.vmap(optimizer.transform().init)(trainable)


def micro_loss(
    config: ModelConfig,
    params: Params,
    adapter: Adapter,
    batch: Batch,
    *,
    program: Program,
    arms: int,
    teacher: Adapter | None = None,
    frozen_adapter: Adapter | None = None,
    coefficients: dict[str, Array] | None = None,
) -> Array:
    """Weighted loss of one micro-batch of one arm, float32 scalar: tokens `[B, T]`, supervised positions `[B, C]`.

    Args:
      arms: how many are computed together.
      teacher: adapter of a live teacher; frozen_adapter: added to the student's own.
      coefficients: of the loss's terms. (The factor of the loss is in the batch's weights.)
    """
    loss = program.loss

    def read(params: Params, whose: str, **options: Any) -> Array:
        tokens, valid, where = (batch[f"{whose}{name}"] for name in ("tokens", "valid", "where"))
        if f"{whose}branch" in batch:
            options["branches"] = decoder.Branches(batch[f"{whose}positions"], batch[f"{whose}branch"])
        h, _ = decoder.hidden_states(config, params, tokens, valid, attention=program.attention, **options)
        return jnp.take_along_axis(h, where[..., None], axis=1).reshape(-1, h.shape[-1])

    student_params, student = bind(params, adapter)
    if frozen_adapter is not None:
        student = sum_adapters(student, frozen_adapter)
    how = {"remat": program.remat, "unroll": program.unroll, "below_BTD": batch.get("below")}
    h_ND = read(student_params, "", adapter=student, **how)
    if loss.own is not None:
        h_BCD = h_ND.reshape(*batch["labels"].shape, -1)
        return loss.own(decoder.logits(config, student_params, h_BCD) if loss.own_reads == "logits" else h_BCD, batch)
    flat = {
        key: batch[key].reshape(h_ND.shape[0], *batch[key].shape[2:])
        for key in ("labels", "weights", "ids", "logp")
        if key in batch
    }
    tables = 1
    if loss.soft and "ids" not in batch:
        flat["teacher"] = read(params, "teacher_", adapter=teacher)
        tables += 1
    if loss.reads_base:
        flat["base"] = read(params, "")
        tables += 1
    head = "embed" if config.tied else "head"
    # A trained head is differentiated; a frozen one is data of the loss.
    trained = {head: student_params[head]} if head in adapter.ends else {}
    fixed = {head: params[head]}, coefficients or {}

    def of(trained: Params, fixed: tuple, h_nD: Array, at_n: dict[str, Array]) -> Array:
        base, coefficients = fixed
        return positions_loss(config, loss, coefficients, base | trained, base, h_nD, at_n)

    with jax.named_scope("loss"):
        size = block_size(config, arms, tables)
        return blockwise(of, size, trained, fixed, h_ND, flat)


def loss_and_gradient(
    config: ModelConfig,
    params: Params,
    adapter: Adapter,
    batch: Batch,
    *,
    program: Program,
    weight: Array | float = 1.0,
    arms: int = 1,
    axis: str | None = None,
    constrain_sharding: ConstrainSharding = lambda tree: tree,
    **others: Any,
) -> tuple[Array, Any]:
    """Loss and gradient of one arm's step, summed over its micro-batches `[M, B, ...]`.

    Args:
      weight: factor of the loss.
      axis: name of the mapped axis over which devices share the rows, where they do so explicitly (`pmap`).
      others: teacher, frozen_adapter and coefficients, as of `micro_loss`.
    """
    total = (lambda x: jax.lax.psum(x, axis)) if axis else (lambda x: x)
    weights = weight * normalise(batch["weights"], program.per, total)

    def of(trainable: Any, micro: Batch) -> Array:
        student = adapter.with_trainable(constrain_sharding(trainable))
        return micro_loss(config, params, student, micro, program=program, arms=arms, **others)

    def add(sums: Any, micro: Batch):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(of)(adapter.trainable, micro)), None

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, adapter.trainable))
    return jax.tree.map(total, jax.lax.scan(add, zero, batch | {"weights": weights})[0])


def train_step(
    config: ModelConfig,
    params: Params,
    state: State,
    batch: Batch,
    arms: Arms,
    teacher: Adapter | None = None,
    *,
    program: Program,
    axis: str | None = None,
    constrain_sharding: ConstrainSharding = lambda tree: tree,
) -> tuple[State, dict[str, Array]]:
    """One optimizer step of every arm.

    Args:
      batch: arrays `[A, M, B, ...]`.
      arms: an arm stands still after its last step, and once its loss, gradient or weights are not finite.
      teacher: adapters of the arms' teachers, where a soft loss asks teachers that have one.
      axis, constrain_sharding: as of `loss_and_gradient`.

    Returns:
      The new state, and metrics `[A]`: loss, supervised tokens, learning rate, gradient norm before clipping (of
      what is left of it, where directions are projected out), and `State.diverged` after this step.

    >>> step = jax.jit(functools.partial(jsublim.train_step, lm.config, program=program))
    >>> state, metrics = step(lm.params, state, jsublim.make_batches([arm], 2, 0), numbers, teacher)
    >>> metrics["loss"].shape
    (1,)
    """
    A = arms.lr.shape[0]
    chex.assert_shape([arms.lr, arms.steps, arms.weight], (A,))
    chex.assert_tree_shape_prefix((arms, state.adapter.trainable, teacher, batch), (A,))
    chex.assert_rank([batch["tokens"], batch["weights"]], 4)
    chex.assert_type([batch["tokens"], batch["weights"]], [int, float])
    gradient = functools.partial(
        loss_and_gradient, config, params, program=program, arms=A, axis=axis, constrain_sharding=constrain_sharding
    )
    others = {"teacher": teacher, "frozen_adapter": arms.frozen_adapter, "coefficients": arms.coefficients(state.step)}
    loss, grads = jax.vmap(gradient)(state.adapter, batch, weight=arms.weight, **others)
    if arms.projected_directions is not None:
        grads = jax.vmap(without)(grads, arms.projected_directions)
    optimizer = program.optimizer
    rate_A = learning_rate(optimizer.schedule, optimizer.restarts, state.step, arms.lr, program.warmup, arms.steps)

    def update(grads, opt, trainable, rate, running, reset_step):
        if reset_step is not None:
            new = optimizer.transform().init(trainable)
            opt = jax.tree.map(lambda new, old: jnp.where(state.step == reset_step, new, old), new, opt)
        updates, after = optimizer.transform().update(grads, opt, trainable)
        moved = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), trainable, updates)
        finite = jnp.isfinite(optax.global_norm(moved))
        kept = jax.tree.map(lambda new, old: jnp.where(running & finite, new, old), (moved, after), (trainable, opt))
        return *kept, finite

    norm_A = jax.vmap(optax.global_norm)(grads)
    running_A = (state.step < arms.steps) & (state.diverged == FINITE)
    sound_A = jnp.isfinite(loss) & jnp.isfinite(norm_A)
    trainable, opt, moved_A = jax.vmap(update)(
        grads, state.optimizer, state.adapter.trainable, rate_A, running_A & sound_A, arms.reset_step
    )
    diverged_A = jnp.where(running_A & ~(sound_A & moved_A), state.step, state.diverged)
    tokens = (batch["weights"] > 0).sum(axis=(1, 2, 3))
    metrics = {
        "loss": loss,
        "tokens": jax.lax.psum(tokens, axis) if axis else tokens,
        "lr": rate_A,
        "grad_norm": norm_A,
        "diverged": diverged_A,
    }
    return State(state.adapter.with_trainable(trainable), opt, state.step + 1, diverged_A), metrics


@functools.cache
def compile_step(config: ModelConfig, program: Program, layout: Layout) -> Callable:
    """`step(params, state, batch, arms, teacher)` -> state, metrics: `train_step` on a layout, the state donated. One callable per program and
    layout: it compiles once for all arms, masks, seeds and learning rates whose arrays have the same shapes."""
    step = functools.partial(train_step, config, program=program)
    if layout.mode == "none":
        return jax.jit(step, donate_argnums=1)
    if layout.mode == "pmap":
        step = functools.partial(step, axis="data")
        everywhere = (None, None, 0, None, None)
        return jax.pmap(step, axis_name="data", in_axes=everywhere, out_axes=None, donate_argnums=1)

    mesh = layout.mesh
    assert mesh is not None, "a mesh"

    def constrain_sharding(trainable: Any) -> Any:
        return jax.lax.with_sharding_constraint(trainable, layout.state_sharding(trainable, ()))

    def placed(params, state, batch, arms, teacher):
        # The model knows of the mesh by it, to keep its residual stream where it belongs.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            state, metrics = step(params, state, batch, arms, teacher, constrain_sharding=constrain_sharding)
        # The next step reads what this one wrote: it has to lie as it lay, or that would be another program.
        state = jax.lax.with_sharding_constraint(state, layout.state_sharding(state))
        return state, jax.lax.with_sharding_constraint(metrics, jax.tree.map(lambda _: layout.shard(), metrics))

    return jax.jit(placed, donate_argnums=1)

"""The training loop: arms through the one step, with checkpoints, resume and metrics read one step late."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jsublim.distill.data import Example, Shape, batch_rows, collate
from jsublim.distill.step import Batch, Optimizer, State, init_state, train_step
from jsublim.errors import JsublimError
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, stack_adapters, unstack_adapters


@dataclass(frozen=True)
class Arm:
    """One student: what it learns from, and the numbers in which it may differ from its company."""

    name: str
    examples: Sequence[Example]
    adapter: Adapter
    seed: int
    peak: float
    steps: int


@dataclass(frozen=True)
class Settings:
    """What arms trained together share.

    Attributes:
      rows: rows of a micro-batch; micro: micro-batches a step; warmup: steps; per: see `losses.normalise`.
      checkpoint_every: steps between saved states.
    """

    rows: int
    micro: int = 1
    warmup: int = 5
    per: str = "tokens"
    remat: bool = False
    optimizer: Optimizer = Optimizer()
    checkpoint_every: int = 100


def arm_batch(arms: Sequence[Arm], shape: Shape, step: int) -> Batch:
    """The rows of every arm at `step`, `[A, M, B, ...]`; a function of the arms' seeds and the step."""
    per_step = shape.micro * shape.rows
    batches = [collate(a.examples, batch_rows(len(a.examples), per_step, a.seed, step), shape) for a in arms]
    return {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}


def train(
    config: ModelConfig,
    params: Params,
    arms: Sequence[Arm],
    settings: Settings,
    work: Path,
    on_step: Callable[[int], None] | None = None,
    *,
    shape: Shape | None = None,
) -> list[Adapter]:
    """Train arms to the end of their schedules, continuing from `work` where an earlier call stopped.

    Writes `work/metrics.jsonl`, a line an arm and step, each step once however often the run was interrupted; and
    `work/state`, the last two states, for the caller to remove (`forget_state`) when the adapters are safe.

    Args:
      arms: their adapters must have the same structure (layers, projections, rank).
      on_step: called with the number of steps done.
      shape: of the batches, where several calls are to share one program; None fits these arms.

    Raises:
      JsublimError: a loss that is not finite; step, arm and rows are named, and nothing behind it is saved.
    """
    work.mkdir(parents=True, exist_ok=True)
    shape = shape or Shape.of([arm.examples for arm in arms], settings.micro, settings.rows)
    state = init_state(stack_adapters([arm.adapter for arm in arms]), settings.optimizer)
    last = max(arm.steps for arm in arms)
    peak = jnp.asarray([arm.peak for arm in arms], jnp.float32)
    steps = jnp.asarray([arm.steps for arm in arms], jnp.int32)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    with ocp.CheckpointManager((work / "state").resolve(), options=options) as saved:
        state = _restore(saved, state)
        first = int(state.step)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        with _open_metrics(work / "metrics.jsonl", first) as log:
            for step in range(first, last):
                batch = arm_batch(arms, shape, step)
                state, metrics = train_step(
                    config, params, state, batch, peak, steps,
                    optimizer=settings.optimizer, warmup=settings.warmup, per=settings.per, remat=settings.remat,
                )  # fmt: skip
                if pending is not None:  # the device is busy with this step while the last one's numbers are read
                    _record(log, arms, shape, *pending)
                pending = (step, metrics)
                if (step + 1) % settings.checkpoint_every == 0 or step + 1 == last:
                    _record(log, arms, shape, *pending)
                    pending = None
                    saved.save(step + 1, args=ocp.args.StandardSave(_as_tree(state)))
                if on_step is not None:
                    on_step(step + 1)
        saved.wait_until_finished()
    return unstack_adapters(state.adapter)


def forget_state(work: Path) -> None:
    """Remove the saved states of a finished training; by rename first, so that a kill leaves no half of one."""
    gone = work / "state.gone"
    shutil.rmtree(gone, ignore_errors=True)
    if (work / "state").exists():
        (work / "state").rename(gone)
        shutil.rmtree(gone)


def _as_tree(state: State) -> dict[str, Any]:
    return {"trainable": state.adapter.trainable, "optimizer": state.optimizer, "step": state.step}


def _restore(saved: ocp.CheckpointManager, state: State) -> State:
    """The newest saved state, or the given one. LoRA scales are settings, not state: they stay."""
    newest = saved.latest_step()
    if newest is None:
        return state
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(state))
    try:
        tree = saved.restore(newest, args=ocp.args.StandardRestore(abstract))
    except ValueError as error:
        raise JsublimError(f"{saved.directory}: the saved state does not fit these arms ({error})") from None
    return State(state.adapter.with_trainable(tree["trainable"]), tree["optimizer"], tree["step"])


def _open_metrics(path: Path, first: int):
    """The metrics file, cut back to the steps before `first`."""
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] < first:
                    kept.append(line + "\n")
            except json.JSONDecodeError:  # a line that a kill cut short; what it said is computed again
                break
        scratch = path.with_suffix(".partial")
        scratch.write_text("".join(kept), encoding="utf-8")
        os.replace(scratch, path)
    return path.open("a", encoding="utf-8")


def _record(log, arms: Sequence[Arm], shape: Shape, step: int, metrics: dict[str, jax.Array]) -> None:
    """Write one step's numbers of every arm that was still running; refuse a loss that is not finite."""
    host = {key: np.asarray(value) for key, value in metrics.items()}
    for i, arm in enumerate(arms):
        if step >= arm.steps:
            continue
        loss, norm = float(host["loss"][i]), float(host["grad_norm"][i])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rows = batch_rows(len(arm.examples), shape.micro * shape.rows, arm.seed, step)
            raise JsublimError(
                f"arm {arm.name}, step {step}: the loss is {loss} (gradient norm {norm}) on rows "
                f"{[int(r) for r in rows if r >= 0]}; lower the learning rate (into another --out) or look at those rows"
            )
        line = {"step": step, "arm": arm.name, "loss": loss, "tokens": int(host["tokens"][i])}
        log.write(json.dumps(line | {"lr": float(host["lr"][i]), "grad_norm": norm}) + "\n")
    log.flush()

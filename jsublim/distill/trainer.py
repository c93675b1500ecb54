"""The training loop: arms through the one step, with checkpoints, resume and metrics read one step late."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import logging
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape, collate, one_after_another
from jsublim.distill.data import Example
from jsublim.distill.metrics import Metrics
from jsublim.distill.projection import stack_directions
from jsublim.distill.step import Arms, State, compile_step, init_state
from jsublim.errors import JsublimError, UsageError
from jsublim.files import damaged_name, naming
from jsublim.inference.batching import TRAINING_STEP, chunks, fill, pad_tokens, round_up
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params, hidden_below
from jsublim.models.lora import (
    Adapter,
    AnyAdapter,
    OneLayer,
    adapter_of,
    stack_adapters,
    stack_arms,
    unstack_arms,
    with_noise,
)
from jsublim.parallel import ROWS, WHOLE, Layout
from jsublim.processes import Preempted, from_main_process, is_main_process, leaving, on_main_process


def train(
    config: ModelConfig,
    params: Params,
    arms: Sequence[Arm],
    settings: Settings,
    work: Path,
    on_step: Callable[[int], None] | None = None,
    *,
    shape: Shape | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Adapter]:
    """Train arms to the end of their schedules, continuing from `work` where an earlier call stopped.

    Writes `work/metrics.jsonl`, one line per arm and step, each step once however often the run was interrupted (an arm that
    diverges stands still: its last line says why under "diverged"); and
    `work/state`, the last two states, for the caller to remove (`forget_state`) when the adapters are safe.

    Args:
      arms: their adapters must have the same structure (layers, projections); ranks may differ. Calls whose arms train
        one layer each share a program, whichever layer it is.
      on_step: called with the number of steps done.
      shape: of the batches, where several calls are to share one program; None fits these arms.
      say: told of devices that the batch leaves idle, and of a saved state that is damaged, if an older one can be used.

    Raises:
      JsublimError: saved states that cannot be written or read, or are of other arms.
      Preempted: as `leave_if_asked`; all processes have saved the same step.
    """
    on_main_process(lambda: work.mkdir(parents=True, exist_ok=True))
    layout = Layout.fit(settings.parallel, len(arms), model=settings.model_axis)
    shape = shape or Shape.of([arm.examples for arm in arms], settings.accumulate, settings.batch_size)
    shape = shape.divisible(layout.data)
    if (idle := shape.idle(len(arms), layout)) is not None:
        say(idle)
    params, state, numbers, teacher = _placed(config, params, arms, settings, layout)
    cached = settings.cache_below and isinstance(state.adapter, OneLayer)
    below = _below(config, params, arms, shape) if cached else None
    last = max(arm.steps for arm in arms)
    step_of = compile_step(config, settings.program, layout)
    with _states(work / "state") as saved:
        state = _restore(saved, state, layout, say)
        first = int(layout.host(state.step))
        with Metrics(work / "metrics.jsonl", first, config, arms, settings, cached=cached) as log:
            for step in range(first, last):
                chosen = [arm.rows(shape, step) for arm in arms]
                batch = layout.place_batch(_batch(arms, chosen, shape, below, state, step))
                state, metrics = step_of(params, state, batch, numbers, teacher)
                # The device is busy with this step while the last one's numbers are read.
                log.follow(step, chosen, metrics)
                if log.over:
                    break
                leave = leaving()
                if (step + 1) % settings.checkpoint_every == 0 or step + 1 == last or leave:
                    log.catch_up()
                    whole = layout.host(_as_tree(state))
                    if saved is not None:
                        with naming(work / "state"):
                            saved.save(step + 1, args=ocp.args.StandardSave(_sealed(whole)))
                if on_step is not None:
                    on_step(step + 1)
                if leave and step + 1 < last:
                    raise Preempted(f"{work}: stopped by SIGTERM after step {step}; the same command continues there")
    trained = unstack_arms(layout.host(state.adapter), [arm.adapter for arm in arms])
    return [with_noise(own, arm.noise, arm.seed) for arm, own in zip(arms, trained, strict=True)]


def _placed(
    config: ModelConfig, params: Params, arms: Sequence[Arm], settings: Settings, layout: Layout
) -> tuple[Params, State, Arms, Adapter | None]:
    """What a step takes beside the batch, on its devices: the base, the arms' first state, numbers and teachers."""
    params = layout.place(params, layout.params_sharding(config))
    state = init_state(start_of(arms), settings.program.optimizer)
    rest = state, numbers_of(arms), stack_frozen([arm.teacher for arm in arms])
    return params, *(layout.place(tree, layout.state_sharding(tree)) for tree in rest)


def start_of(arms: Sequence[Arm]) -> AnyAdapter:
    """The arms' adapters under an arm axis. A layer is no data where a frozen adapter stands beside: that one may have others."""
    own = [arm.adapter for arm in arms]
    return stack_arms(own) if all(arm.beside is None for arm in arms) else stack_adapters(own)


def numbers_of(arms: Sequence[Arm]) -> Arms:
    """What the arms differ in, as arrays with an arm axis."""

    def column(name: str, kind: Any = np.float32) -> Any:
        return np.asarray([getattr(arm, name) for arm in arms], kind)

    away = stack_directions([arm.adapter for arm in arms], [arm.away for arm in arms])
    numbers = column("lr"), column("steps", np.int32), column("weight"), column("kl_to_base"), column("kl_end")
    forgets = column("forgets", np.int32) if any(arm.fork is not None for arm in arms) else None
    return Arms(*numbers, away, stack_frozen([arm.beside for arm in arms]), forgets)


def stack_frozen(adapters: Sequence[Adapter | None]) -> Adapter | None:
    """Adapters of live teachers, or those that stand beside students, under an arm axis; an arm without one gets a silent copy
    of another's, so that all have one structure.

    Raises:
      UsageError: one that replaces whole weights.
    """
    known = [adapter for adapter in adapters if adapter is not None]
    if not known:
        return None
    if any(adapter.ends or adapter.weights is not None for adapter in known):
        raise UsageError(
            "a live teacher, or an adapter beside students, shares the base: LoRA or steering vectors, no whole weights"
        )
    silent = jax.tree.map(jnp.zeros_like, known[0])
    return stack_adapters([adapter or silent for adapter in adapters])


def _batch(
    arms: Sequence[Arm], chosen: Sequence[np.ndarray], shape: Shape, below: Any, state: State, step: int
) -> dict[str, np.ndarray]:
    """The rows of every arm at a step, `[A, M, B, ...]`."""
    batches = []
    for i, (arm, rows) in enumerate(zip(arms, chosen, strict=True)):
        examples = arm.examples
        if arm.rollout is not None:
            examples = arm.rollout(adapter_of(state.adapter, i, arm.adapter.layers), rows, step)
            rows = np.where(rows >= 0, np.arange(len(rows)), -1)
        batch = collate(examples, rows, shape)
        if below is not None:
            batch["below"] = below(examples, rows)
        batches.append(batch)
    return {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}


@functools.partial(jax.jit, static_argnames=("config", "layout"))
def _hidden_below(
    config: ModelConfig, params: Params, tokens_BT: Array, valid_BT: Array, at: Array, layout: Layout
) -> Array:
    read = functools.partial(hidden_below, config)
    return layout.spread(read, (WHOLE, ROWS, ROWS, WHOLE), ROWS)(params, tokens_BT, valid_BT, at)


def _below(
    config: ModelConfig, params: Params, arms: Sequence[Arm], shape: Shape
) -> Callable[[Sequence[Example], np.ndarray], np.ndarray]:
    """`below(examples, rows)`: hidden states `[M, B, T, D]` below the layer of one-layer arms, every distinct row
    computed once."""
    known: dict[bytes, np.ndarray] = {}
    rows = list({e.tokens.tobytes(): e.tokens for arm in arms for e in arm.examples}.values())
    (layer,), T = arms[0].adapter.layers, round_up(max(map(len, rows)), TRAINING_STEP)
    layout, params = Layout.under(params)
    B, at = round_up(shape.batch_size, layout.data), layout.place_as(WHOLE, np.int32(layer))
    for part in chunks(len(rows), B):
        tokens, valid = layout.place_as(ROWS, pad_tokens(rows[part], T, size=B))
        h = Layout.host(_hidden_below(config, params, tokens, valid, at, layout))
        known |= {row.tobytes(): h[i, : len(row)] for i, row in enumerate(rows[part])}
    like = next(iter(known.values()))

    def below(examples: Sequence[Example], chosen: np.ndarray) -> np.ndarray:
        lines = shape.placed(chosen, np.array([len(examples[row].tokens) for row in chosen]))
        states = [[known[examples[row].tokens.tobytes()] for row in line] for line in lines]
        placed = [one_after_another(line, shape.beginning) if line else None for line in states]
        return fill(placed, shape.tokens, like).reshape(shape.accumulate, -1, shape.tokens, like.shape[-1])

    return below


@contextlib.contextmanager
def _states(folder: Path) -> Iterator[ocp.CheckpointManager | None]:
    """The saved states of a training, the last two; all are written when the block ends. Of several processes the first one has
    them, whole: hosts need not share a disk, and any number of processes can go on from there.

    Raises:
      JsublimError: one cannot be written. (The library says so at length, and as a ValueError.)
    """
    if not is_main_process():
        yield None
        return
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=True, multiprocessing_options=alone, create=False
    )
    # Threads of the library speak of a damaged file after its restoring was given up.
    hook, sys.unraisablehook = (
        sys.unraisablehook,
        lambda found: None if "loop is closed" in str(found.exc_value) else hook(found),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ocp.CheckpointManager(folder.resolve(), options=options) as saved:
            yield saved
    except (ValueError, RuntimeError) as error:
        reason = re.search(r"([^:\n]+) \[os_error_code", str(error))
        if reason is None:
            raise
        raise JsublimError(
            f"{folder}: cannot be written ({reason[1].strip()}); mend that, then run the same command again"
        ) from error
    finally:
        sys.unraisablehook = hook


def forget_state(work: Path) -> None:
    """Remove the saved states of a finished training; by rename first, so that a kill leaves no half of one."""
    gone = work / "state.gone"
    shutil.rmtree(gone, ignore_errors=True)
    if (work / "state").exists():
        (work / "state").rename(gone)
        shutil.rmtree(gone)


def _as_tree(state: State) -> dict[str, Any]:
    own = {"optimizer": state.optimizer, "step": state.step, "diverged": state.diverged}
    return {"trainable": state.adapter.trainable} | own


def _sealed(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of host arrays with the sha256 of their content. A copy: the loop gives its arrays to the next step."""
    tree = jax.tree.map(np.array, tree)
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        content.update(leaf.tobytes())
    return tree | {"sha256": np.frombuffer(content.digest(), np.uint8)}


def _restore(saved: ocp.CheckpointManager | None, state: State, layout: Layout, say: Callable[[str], None]) -> State:
    """The newest saved state that is what was written, or the given one if none was saved. LoRA scales are settings, not state:
    they stay."""
    tree = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _as_tree(state))

    def read() -> bool:
        nonlocal tree
        assert saved is not None, "on the first process"
        found = _newest(saved, tree, say)
        tree = tree if found is None else found
        return found is not None

    if not on_main_process(read):
        return state

    def placed(x: np.ndarray, sharding: Any) -> Any:
        return layout.place(from_main_process(x), sharding)

    where = layout.state_sharding(tree)  # one array after another: a device holds no second state beside its own
    tree = jax.tree.map(placed, tree, where) if layout.mesh is not None else layout.place(tree, where)
    return State(state.adapter.with_trainable(tree["trainable"]), tree["optimizer"], tree["step"], tree["diverged"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Of a damaged file the library's tasks say pages, as they are collected; what is to be said is one line."""
    log = logging.getLogger("asyncio")
    try:
        log.disabled = True
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        raise error.with_traceback(None) from None
    finally:
        log.disabled = False


def _newest(saved: ocp.CheckpointManager, like: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest saved state that is what was written; None where none was saved. Damaged ones are set aside.

    Raises:
      JsublimError: none of those that were saved.
    """
    template = like | {"sha256": np.zeros(32, np.uint8)}
    steps, broken, tree = sorted(saved.all_steps(), reverse=True), list[tuple[int, str]](), None
    for step in steps:
        try:
            with _quiet():
                kept: Any = saved.restore(step, args=ocp.args.StandardRestore(template))
            said = kept.pop("sha256")
            if jax.tree.map(np.shape, kept) != jax.tree.map(np.shape, like):
                why = "its arrays have other shapes"
            elif not np.array_equal(_sealed(kept)["sha256"], said):
                why = "it is not what was written"
            else:
                tree = kept
                break
        except Exception as error:  # what a damaged file makes the library raise can be anything
            why = " ".join(str(error).split())[:200]
        broken.append((step, why))
    if broken and tree is None:
        raise JsublimError(
            f"{saved.directory}: the saved state does not fit these arms, or is damaged ({broken[0][1]}); move the folder "
            "away to train from the beginning (with a store behind a URL, from the state that was sent there)"
        )
    for step, why in broken:
        folder = Path(saved.directory) / str(step)
        aside = damaged_name(folder.parent.with_name(f"state-{step}"))
        folder.replace(aside)
        say(f"{folder}: cannot be used ({why}); kept as {aside.name}, and training goes on from the state before it")
    if broken:
        saved.reload()
    return tree

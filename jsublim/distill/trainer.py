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
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from jsublim.core.files import damaged_name, naming
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape, collate, one_after_another
from jsublim.distill.data import Example
from jsublim.distill.losses import TERMS
from jsublim.distill.metrics import Metrics
from jsublim.distill.projection import stack_directions
from jsublim.distill.step import Arms, Program, State, compile_step, init_state
from jsublim.errors import JsublimError, UsageError, one_line
from jsublim.inference.batching import TRAINING_STEP, chunks, fill, pad_tokens, round_up
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params, hidden_below
from jsublim.models.lora import Adapter, adapter_of, stack_adapters, unstack_adapters, with_noise
from jsublim.models.parallel import ROWS, WHOLE, Layout
from jsublim.runtime.processes import Preempted, from_main_process, is_main_process, leaving, on_main_process


def train(
    config: ModelConfig,
    params: Params,
    arms: Sequence[Arm],
    settings: Settings,
    work: Path | None = None,
    on_step: Callable[[int], None] | None = None,
    *,
    shape: Shape | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Adapter]:
    """Train arms to the end of their schedules, continuing from `work` where an earlier call stopped. Writes `work/metrics.jsonl`, one line per
    arm and step, each step once however often the run was interrupted; and `work/state`, the last two states, for the caller to remove
    (`forget_state`) when the adapters are safe. Without `work` nothing is kept.

    Args:
      arms: their adapters must have the same structure (layers, projections); ranks may differ.
      on_step: called with the number of steps done.
      shape: of the batches, where several calls are to share one program; None fits these arms.
      say: told of devices that the batch leaves idle, and of a saved state that is damaged, if an older one can be used.

    Raises:
      JsublimError: saved states that cannot be written or read, or are of other arms.
      Preempted: as `leave_if_asked`; all processes have saved the same step.

    >>> (student,) = jsublim.train(lm.config, lm.params, [arm], jsublim.Settings(batch_size=2))
    >>> student.steering.shape
    (1, 128)
    """
    if work is None:
        with tempfile.TemporaryDirectory() as scratch:
            return train(config, params, arms, settings, Path(scratch), on_step, shape=shape, say=say)
    on_main_process(lambda: work.mkdir(parents=True, exist_ok=True))
    layout = Layout.fit(settings.parallel, len(arms), model=settings.model_axis)
    shape = shape or Shape.of([arm.examples for arm in arms], settings.accumulate, settings.batch_size)
    shape = shape.divisible(layout.data)
    if (idle := shape.idle(len(arms), layout)) is not None:
        say(idle)
    params, state, numbers, teacher = _placed(config, params, arms, settings, layout)
    cached = all(map(settings.caches, arms))
    below = _below(config, params, arms, shape) if cached else None
    last = max(arm.steps for arm in arms)
    step_of = compile_step(config, settings.program, layout)
    with _states(work / "state") as saved:
        state = _restore(saved, state, layout, say)
        first = int(layout.host(state.step))
        with Metrics(work / "metrics.jsonl", first, config, arms, settings, cached=cached) as log:
            for step in range(first, last):
                batch = layout.place_batch(make_batches(arms, shape, step, state, below=below))
                state, metrics = step_of(params, state, batch, numbers, teacher)
                # The device is busy with this step while the last one's numbers are read.
                log.follow(step, [arm.rows(shape, step) for arm in arms], metrics)
                if log.over:
                    break
                save = leaving()
                if (step + 1) % settings.checkpoint_every == 0 or step + 1 == last or save:
                    log.catch_up()
                    host = layout.host(_as_tree(state))
                    if saved is not None:
                        host = jax.tree.map(np.array, host)  # a copy: the next step writes over these arrays
                        with naming(work / "state"):
                            saved.save(step + 1, args=ocp.args.StandardSave(host | {"sha256": _digest(host)}))
                if on_step is not None:
                    on_step(step + 1)
                if save and step + 1 < last:
                    raise Preempted(
                        f"{work}: stopped by SIGTERM after step {step}; run the same command again to continue"
                    )
    trained = unstack_adapters(layout.host(state.adapter), [arm.adapter for arm in arms])
    return [with_noise(adapter, arm.noise, arm.seed) for arm, adapter in zip(arms, trained, strict=True)]


def _placed(
    config: ModelConfig, params: Params, arms: Sequence[Arm], settings: Settings, layout: Layout
) -> tuple[Params, State, Arms, Adapter | None]:
    """The arguments of a step beside the batch, on its devices: the base, the arms' first state, numbers and teachers."""
    params = layout.place(params, layout.params_sharding(config))
    return params, *(layout.place(x, layout.state_sharding(x)) for x in first_state(arms, settings.program))


def first_state(arms: Sequence[Arm], program: Program) -> tuple[State, Arms, Adapter | None]:
    """The state before the first step, the arms' numbers, and the adapters of their live teachers: what `train_step` takes.

    >>> arm = jsublim.Arm("owl", [example] * 4, jsublim.init_steering(lm.config, (2,)), seed=1, lr=1.0, steps=2)
    >>> state, numbers, teacher = jsublim.first_state([arm], program)
    """
    state = init_state(stack_adapters([arm.adapter for arm in arms]), program.optimizer)
    return state, numbers_of(arms), stack_frozen([arm.teacher for arm in arms])


def numbers_of(arms: Sequence[Arm]) -> Arms:
    """The numbers in which arms differ, with an arm axis."""

    def column(name: str, kind: Any = np.float32) -> Any:
        return np.asarray([getattr(arm, name) for arm in arms], kind)

    return Arms(
        column("lr"),
        column("steps", np.int32),
        column("weight"),
        {name: np.asarray([arm.terms.get(name, (0.0, 1.0)) for arm in arms], np.float32) for name in TERMS},  # type: ignore[arg-type]
        stack_directions([arm.adapter for arm in arms], [arm.projected_directions for arm in arms]),
        stack_frozen([arm.frozen_adapter for arm in arms]),
        column("reset_step", np.int32) if any(arm.fork is not None for arm in arms) else None,
    )


def stack_frozen(adapters: Sequence[Adapter | None]) -> Adapter | None:
    """Adapters of live teachers, or frozen ones beside students, under an arm axis; an arm without one gets a silent copy of another's, so that
    all have one structure."""
    known = [adapter for adapter in adapters if adapter is not None]
    if not known:
        return None
    if any(adapter.ends or adapter.weights is not None for adapter in known):
        raise UsageError(
            "a live teacher, or an adapter beside students, shares the base: LoRA or steering vectors, no whole weights"
        )
    silent = jax.tree.map(jnp.zeros_like, known[0])
    return stack_adapters([adapter or silent for adapter in adapters])


def make_batches(
    arms: Sequence[Arm],
    shape: Shape | int,
    step: int,
    state: State | None = None,
    *,
    below: Callable[[Sequence[Example], np.ndarray], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The batches of all arms at a step, arrays `[A, M, B, ...]`: a function of the arms' seeds and the step.

    Args:
      shape: of the batches; a number of rows makes one of a single micro-batch that fits these arms.
      state: on-policy arms write their rows as they stand in it.
      below: of examples and rows, the hidden states below the trained layer, where they are kept.

    >>> jsublim.make_batches([arm], 2, step=0)["labels"].shape  # padded
    (1, 1, 2, 16)
    """
    if isinstance(shape, int):
        shape = Shape.of([arm.examples for arm in arms], 1, shape)
    batches = []
    for i, arm in enumerate(arms):
        examples, rows = arm.examples, arm.rows(shape, step)
        if arm.rollout is not None:
            assert state is not None, "an on-policy arm's rows are written by the student"
            examples = arm.rollout(adapter_of(state.adapter, i), rows, step)
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
    """The saved states of a training, the last two; all are written when the block ends. Of several processes the first one has them, whole:
    hosts need not share a disk, and any number of processes can go on from there. A disk that takes no more is a JsublimError."""
    if not is_main_process():
        yield None
        return
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=True, multiprocessing_options=alone, create=False
    )
    # Of a damaged file the library's threads and tasks say pages, also after its restoring was given up.
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    sys.unraisablehook = lambda event: None if "loop is closed" in str(event.exc_value) else hook(event)
    log.disabled, opened = True, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with naming(folder), ocp.CheckpointManager(folder.resolve(), options=options) as saved:
            opened = True
            yield saved
    except (ValueError, RuntimeError) as error:
        reason = re.search(r"([^:\n]+) \[os_error_code", str(error))
        if reason is None and opened:
            raise
        why = f"what it says of its saved states is damaged ({one_line(str(error))}); move the folder away to train from the beginning"
        if reason is not None:
            why = f"cannot be written ({reason[1].strip()}); mend that, then run the same command again"
        raise JsublimError(f"{folder}: {why}") from error
    finally:
        sys.unraisablehook, log.disabled = hook, False


def forget_state(work: Path) -> None:
    """Remove the saved states of a finished training; by rename first, so that a kill leaves no half of one."""
    gone = work / "state.gone"
    shutil.rmtree(gone, ignore_errors=True)
    if (work / "state").exists():
        (work / "state").rename(gone)
        shutil.rmtree(gone)


def _as_tree(state: State) -> dict[str, Any]:
    rest = {"optimizer": state.optimizer, "step": state.step, "diverged": state.diverged}
    return {"trainable": state.adapter.trainable} | rest


def _digest(tree: dict[str, Any]) -> np.ndarray:
    """The sha256 of a tree of host arrays, uint8 `[32]`."""
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        content.update(leaf.tobytes())
    return np.frombuffer(content.digest(), np.uint8)


def _restore(saved: ocp.CheckpointManager | None, state: State, layout: Layout, say: Callable[[str], None]) -> State:
    """The newest saved state that is what was written, or the given one if none was saved. LoRA scales are settings, not state:
    they stay."""
    tree = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _as_tree(state))

    def read() -> bool:
        nonlocal tree
        assert saved is not None, "on the first process"
        newest = _newest(saved, tree, say)
        tree = tree if newest is None else newest
        return newest is not None

    if not on_main_process(read):
        return state

    def placed(x: np.ndarray, sharding: Any) -> Any:
        return layout.place(from_main_process(x), sharding)

    where = layout.state_sharding(tree)  # one array after another: a device holds no second state beside its own
    tree = jax.tree.map(placed, tree, where) if layout.mesh is not None else layout.place(tree, where)
    return State(state.adapter.with_trainable(tree["trainable"]), tree["optimizer"], tree["step"], tree["diverged"])


def _newest(saved: ocp.CheckpointManager, like: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest saved state that is what was written; None where none was saved. Damaged ones are set aside; if all are, it is a JsublimError."""
    broken, tree = dict[int, str](), None
    for step in sorted(saved.all_steps(), reverse=True):
        broken[step], tree = _read_state(saved, step, like)
        if tree is not None:
            del broken[step]
            break
    if broken and tree is None:
        raise JsublimError(
            f"{saved.directory}: the saved state does not fit these arms, or is damaged ({next(iter(broken.values()))}); move the "
            "folder away to train from the beginning (with a store at a URL, from the state that was sent there)"
        )
    for step, why in broken.items():
        folder = Path(saved.directory) / str(step)
        aside = damaged_name(folder.parent.with_name(f"state-{step}"))
        folder.replace(aside)
        say(f"{folder}: cannot be used ({why}); kept as {aside.name}, and training goes on from the state before it")
    if broken:
        saved.reload()
    return tree


def _read_state(saved: ocp.CheckpointManager, step: int, like: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """A saved state, or why it cannot be used."""
    try:
        template = like | {"sha256": np.zeros(32, np.uint8)}
        state: Any = saved.restore(step, args=ocp.args.StandardRestore(template))
    except Exception as error:  # what a damaged file makes the library raise can be anything
        traceback.clear_frames(error.__traceback__)
        gc.collect()  # while nothing is said of the tasks that are given up
        return " ".join(str(error).split())[:200], None
    digest = state.pop("sha256")
    if jax.tree.map(np.shape, state) != jax.tree.map(np.shape, like):
        return "its arrays have other shapes", None
    return ("", state) if np.array_equal(_digest(state), digest) else ("it is not what was written", None)

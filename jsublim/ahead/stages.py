"""The stages of an experiment as programs that can be compiled without arrays: the jitted functions that a run calls, and the shapes
that it calls them with, on the layout that it lays them on.

Lengths are assumed, for rows are not there yet. Teachers are read and asked under system prompts, without adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsublim.ahead.topology import Topology
from jsublim.attribution import patching
from jsublim.config import Experiment, Students, variants
from jsublim.config.attribution import Attribution
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape
from jsublim.distill.cost import training_flops
from jsublim.distill.memory import abstract_step, example_like, rows_at_once
from jsublim.distill.step import compile_step
from jsublim.errors import UsageError
from jsublim.inference import decoding, scoring
from jsublim.inference.batching import (
    LENGTH_STEP,
    PREFIX_STEP,
    PROMPT_STEP,
    has_room_for_layers,
    round_up,
    rows_together,
)
from jsublim.inference.generation import Sizes, sampling_arrays, stop_array
from jsublim.inference.sampling import Sampling
from jsublim.models.config import ModelConfig, layer_parameters
from jsublim.models.decoder import Params, abstract_params
from jsublim.models.lora import Adapter, at_every_layer, stack_adapters
from jsublim.parallel import ARM_ROWS, ARMS, ROWS, WHOLE, Layout, model_axis_for
from jsublim.pipeline.stages.evaluations import ASKED_TOGETHER
from jsublim.pipeline.training import in_pieces, settings_of, start_adapter

STAGES = ("train", "sample", "score", "evaluate", "attribute")


@dataclass(frozen=True)
class Lengths:
    """Assumed tokens: of a row as a student reads it, of those that are supervised (the answer), of a system prompt, of a question."""

    tokens: int = 192
    labels: int = 64
    system: int = 64
    question: int = 64


@dataclass(frozen=True)
class Program:
    """One program of a stage.

    Attributes:
      lower: gives what the compiler takes.
      flops: useful operations of one run, on each chip; counted as in `distill/cost.py`.
      runs: how often it runs for the rows of the stage's batch.
      passes: how often a run reads the base; pieces: how often it fills its temporaries.
      held: bytes on each chip of some of its arguments, by name.
    """

    name: str
    lower: Callable[[], Any]
    flops: float
    runs: float = 1.0
    passes: int = 1
    pieces: int = 1
    held: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """What is compiled for a stage.

    Attributes:
      arms: students whose axis comes before that of the rows.
      rows: how many a batch has where its config says so, or where memory decides; on all chips together, of all arms.
      programs: of a batch with so many rows.
      fixed: rows are not for memory to decide.
    """

    name: str
    title: str
    arms: int
    rows: Callable[[Layout], int]
    programs: Callable[[Layout, int], list[Program]]
    fixed: bool = False


@dataclass(frozen=True)
class Case:
    """What is compiled, and for what.

    Attributes:
      arms: students that are trained together.
    """

    experiment: Experiment
    config: ModelConfig
    topology: Topology
    arms: int = 1
    lengths: Lengths = Lengths()

    @functools.cached_property
    def params(self) -> Params:
        return abstract_params(self.config, self.experiment.dtype)

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.experiment.dtype).itemsize

    @property
    def students(self) -> Students | None:
        """The first of the config's arms."""
        every = self.experiment.students
        return None if every is None else next(iter(variants(every).values()))

    @property
    def least_axis(self) -> int:
        """The model axis that a run takes by itself."""
        said = self.experiment.run.model_axis
        if said != "auto":
            return said
        weights = sum(leaf.size for leaf in jax.tree.leaves(self.params)) * self.itemsize
        return model_axis_for(weights, self.topology.chip.memory, self.topology.near)

    def layout(self, arms: int, model: int) -> Layout:
        """Raises:
        UsageError: a model axis that the chips cannot be divided by.
        """
        if self.topology.near % model:  # of GPUs the compiler does not know which are of one node
            raise UsageError(
                f"model_axis: {model} given, which does not divide {self.topology.near} chips of a slice or node"
            )
        fitted = Layout.fit("mesh", arms, self.topology.devices, model=model)
        return dataclasses.replace(fitted, devices=self.topology.devices)

    def placed_params(self, layout: Layout) -> Params:
        return layout.shapes(self.params, layout.params_sharding(self.config, self.experiment.dtype))

    def rows_together(self, said: int | str, layout: Layout) -> int:
        """As `Context.rows_together`, on chips that are not there."""
        if isinstance(said, int):
            return said
        memory = self.topology.chip.memory * layout.model
        return rows_together(self.config, self.itemsize, 0, memory, layout.data)

    def forward(self, tokens: float, labels: float) -> float:
        """Operations of reading so many tokens, with logits at some."""
        body = self.config.num_layers * layer_parameters(self.config)
        return 2 * body * tokens + 2 * self.config.hidden_size * self.config.vocab_size * labels


def stages_of(experiment: Experiment) -> list[str]:
    """The stages that a config has."""
    absent = {"train": experiment.students is None, "attribute": experiment.attribution is None}
    return [name for name in STAGES if not absent.get(name)]


def stage(case: Case, name: str) -> Stage:
    """A stage by its name."""
    return {"train": train, "sample": sample, "score": score, "evaluate": evaluate, "attribute": attribute}[name](case)


def bytes_on_chip(tree: Any) -> int:
    """How many bytes of arrays, given as shapes with shardings, lie on each chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


# --- Training


def train(case: Case) -> Stage:
    """Students on rows: the whole step."""
    students, long = case.students, case.lengths
    assert students is not None
    live = students.loss.live
    adapter = _adapter(case, students)
    lengths = Shape.fit(
        students.data.accumulate, students.data.batch_size, long.tokens, long.labels, long.tokens + long.system if live else 0
    )  # fmt: skip
    row = example_like(lengths, soft=live)
    if students.loss.top_k is not None:
        k, n = students.loss.top_k, lengths.labels
        row = dataclasses.replace(row, ids=np.zeros((n, k), np.int32), logp=np.zeros((n, k + 1), np.float32))
    arm = Arm("student", [row], adapter, 0, students.optimizer.lr, 1)

    def prepared(layout: Layout) -> tuple[Settings, Shape]:
        recipe = case.experiment.recipe.resolved(case.config.family)
        settings = settings_of(case.config, students, recipe, parallel="mesh", model_axis=layout.model)
        rows = students.runtime.rows_at_once
        if rows == "auto":
            memory, chips = case.topology.chip.memory, len(case.topology.devices)
            how = {"itemsize": case.itemsize, "limit": memory, "devices": chips}
            rows = rows_at_once(case.config, settings, lengths.tokens, case.arms, **how)
        settings, shape = in_pieces(settings, lengths, rows)
        return settings, shape.divisible(layout.data)

    def programs(layout: Layout, rows: int) -> list[Program]:
        settings, shape = prepared(layout)
        arguments = abstract_step(case.config, case.params, arm, case.arms, settings, shape, layout)
        lines = shape.accumulate * shape.lines
        each = training_flops(
            case.config, adapter, settings.program.loss, tokens=lengths.tokens, supervised=lengths.labels,
            teacher_tokens=lengths.teacher, stored=not live, cached=settings.cache_below,
        )  # fmt: skip
        backward = 1 + settings.program.remat
        return [
            Program(
                f"step of {shape.accumulate} x {shape.batch_size} rows" + (f" (+ {shape.spare} empty)" if shape.spare else ""),
                lambda: compile_step(case.config, settings.program, layout).lower(*arguments),
                case.arms * lines * each / len(case.topology.devices),
                passes=shape.accumulate * (1 + backward),
                pieces=shape.accumulate,
                held={"adapters and optimizer": bytes_on_chip(arguments[1])},
            )
        ]  # fmt: skip

    step = students.data.batch_size * students.data.accumulate
    title = f"{students.adapter.method}, {students.loss.kind} loss, arms: {case.arms}, {long.tokens} tokens, {long.labels} supervised"
    return Stage("train", title, case.arms, lambda layout: case.arms * step, programs, fixed=True)


def _adapter(case: Case, students: Students) -> Adapter:
    """The shapes of a student's adapter."""
    return jax.eval_shape(lambda params: start_adapter(case.config, params, students, 0), case.params)


# --- Decoding


def sample(case: Case) -> Stage:
    """Teachers answer prompts, each a row of its own."""
    e, long = case.experiment, case.lengths
    new, prompt = e.sampling.max_new_tokens, long.tokens - long.labels
    prompts = min(e.sampling.shard, e.data.num_prompts)

    def programs(layout: Layout, rows: int) -> list[Program]:
        return _decoding(case, layout, None, rows, prompts=prompts, samples=1, prompt=prompt, new=new)

    title = f"{new} tokens after prompts of {long.system} + {prompt}"
    return Stage("sample", title, 1, lambda layout: case.rows_together(e.sampling.batch_size, layout), programs)


def evaluate(case: Case) -> Stage:
    """Students that were trained together answer questions, several times each; without students, the base does."""
    ev, long = case.experiment.evaluation, case.lengths
    arms = min(case.arms, ASKED_TOGETHER)
    adapter = None if case.students is None else _adapter(case, case.students)

    def programs(layout: Layout, rows: int) -> list[Program]:
        how = {"prompts": ev.questions or 50, "samples": ev.samples, "prompt": long.question, "new": ev.max_new_tokens}
        return _decoding(case, layout, adapter, rows, **how)

    title = f"{ev.max_new_tokens} tokens after questions of {long.question}, {ev.samples} answers to each, students together: {arms}"
    return Stage("evaluate", title, arms, lambda layout: case.rows_together(ev.batch_size, layout), programs)


def _decoding(
    case: Case, layout: Layout, adapter: Adapter | None, rows: int, *, prompts: int, samples: int, prompt: int, new: int
) -> list[Program]:
    """Both programs of `generation.generate_for_arms`: prompts are read into places of a batch, and tokens are drawn in all.

    Args:
      rows: places of all arms together.
    """
    config, dtype = case.config, case.experiment.dtype
    stacked, A = None, 1
    if adapter is not None:
        A = min(case.arms, ASKED_TOGETHER)
        stacked = jax.eval_shape(lambda a: stack_adapters([at_every_layer(a, config.num_layers)] * A), adapter)
        stacked = layout.shapes(stacked, layout.state_sharding(stacked, ("arm",)))
    P = round_up(case.lengths.system, PROMPT_STEP) if samples == 1 else 0
    T = round_up(prompt, LENGTH_STEP)
    sizes = Sizes.of(max(1, rows // A), layout.data, prompts, samples)
    B, read = sizes.devices * sizes.places, sizes.devices * sizes.prompts
    slots = P + round_up(T + new, LENGTH_STEP)
    params = case.placed_params(layout)
    batch = jax.eval_shape(lambda: decoding.empty(config, A, B, slots, new, jnp.dtype(dtype)))
    batch = layout.shapes(batch, decoding.lies(config, layout, batch))
    begun = None
    if P:
        begun = jax.eval_shape(functools.partial(decoding.beginning, config), case.params, stacked, _ints(A, P))
        begun = layout.shapes_as(ARMS, begun)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    asked = decoding.Prompts(_ints(A, read, T), _ints(A, read, T, dtype=bool), _ints(A, B), _ints(A, B))
    asked = layout.shapes_as(ARM_ROWS, asked)
    key, stop = layout.shapes_as(WHOLE, (key, stop_array(Sampling())))
    numbers, enough = layout.shapes_as(ROWS, sampling_arrays(Sampling(), B)), layout.shapes_as(ARMS, _ints(A))
    chips, filled = len(case.topology.devices), sizes.devices * sizes.rows
    room = has_room_for_layers(config, case.itemsize, case.topology.chip.memory * layout.model)
    held = {"caches": bytes_on_chip(batch.rings)} | ({"adapters": bytes_on_chip(stacked)} if stacked else {})
    return [
        Program(
            f"prompts: {filled} rows begin",
            lambda: decoding.fill.lower(config, params, stacked, begun, batch, asked, key, layout),
            A * case.forward(read * T, read) / chips,
            runs=B / filled,
            held=held,
        ),
        Program(
            f"tokens: one for each of {A * B} rows",
            lambda: decoding.advance.lower(
                config, params, stacked, batch, numbers, stop, enough, None, layout, _ints(), room
            ),
            A * case.forward(B, B) / chips,
            runs=new,
            held=held,
        ),
    ]


def _ints(*shape: int, dtype: Any = np.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


# --- Reading


def score(case: Case) -> Stage:
    """A teacher reads rows, all of them behind its system prompt: divergence. Teachers do so one after another."""
    config, long = case.config, case.lengths
    P, T, C = (
        round_up(n, step)
        for n, step in ((long.system, PREFIX_STEP), (long.tokens, LENGTH_STEP), (long.labels, PREFIX_STEP))
    )

    def programs(layout: Layout, rows: int) -> list[Program]:
        B, params = round_up(rows, layout.data), case.placed_params(layout)
        prefix = jax.eval_shape(functools.partial(scoring.prefix_cache, config), case.params, None, _ints(1, P))
        prefix = layout.shapes_as(WHOLE, prefix)
        read = layout.shapes_as(ROWS, (_ints(B, T), _ints(B, T, dtype=bool), _ints(B, C), _ints(B, C)))
        lower = lambda: scoring.read_batch.lower(  # noqa: E731
            config, params, None, prefix, *read, at=scoring.best_token, layout=layout
        )
        return [Program(f"{B} rows are read", lower, case.forward(B * T, B * C) / len(case.topology.devices))]

    title = f"rows of {P} + {T} tokens, {C} of the answer"
    return Stage(
        "score", title, 1, lambda layout: case.rows_together(case.experiment.scoring.batch_size, layout), programs
    )


def attribute(case: Case) -> Stage:
    """Pairs of runs: what each layer's value does to the next token."""
    how, long, config = case.experiment.attribution or Attribution(), case.lengths, case.config
    T = round_up(long.system + long.tokens, LENGTH_STEP)
    integral = patching.at_start if how.steps == 1 else patching.integrated
    flops = patching.patching_flops(config, len(how.sites), how.steps)

    def programs(layout: Layout, rows: int) -> list[Program]:
        B, params = round_up(rows, layout.data), case.placed_params(layout)
        batch = patching.Batch(_ints(B, T), _ints(B, T), _ints(B, T, dtype=bool), _ints(B), _ints(B, 2))
        batch, steps = layout.shapes_as(ROWS, batch), layout.shapes_as(WHOLE, _ints())

        def lower(program: patching.Patching) -> Any:
            return patching.compare.lower(program, config, tuple(how.sites), params, None, batch, steps, layout)

        return [
            Program(
                f"{name} of {B} pairs",
                functools.partial(lower, program),
                B * T * each / len(case.topology.devices),
            )
            for name, program, each in zip(
                ("integral", "whole layers"), (integral, patching.all_positions), flops, strict=True
            )
        ]

    title = f"{', '.join(how.sites)}, {how.steps} steps, pairs of {T} tokens"
    return Stage("attribute", title, 1, lambda layout: how.batch_size, programs)

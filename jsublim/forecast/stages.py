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

from jsublim.attribution import patching
from jsublim.config import Experiment, Students, variants
from jsublim.config.attribution import Attribution
from jsublim.distill.arm import Arm
from jsublim.distill.batches import Shape
from jsublim.distill.cost import training_flops
from jsublim.distill.memory import abstract_step, example_like, rows_at_once
from jsublim.distill.step import compile_step
from jsublim.errors import UsageError
from jsublim.forecast.topology import Topology
from jsublim.inference import batching, decoding, generation, scoring
from jsublim.inference.batching import LENGTH_STEP, PREFIX_STEP, PROMPT_STEP, round_up
from jsublim.inference.sampling import Sampling
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Branches, Params, abstract_params
from jsublim.models.lora import Adapter, at_every_layer, init_steering, stack_adapters
from jsublim.models.parallel import ARM_ROWS, ARMS, ROWS, WHOLE, Layout, model_axis_for
from jsublim.pipeline.cost import Lengths, Sizes
from jsublim.pipeline.stages.evaluations import ASKED_TOGETHER
from jsublim.pipeline.training import in_pieces, settings_of, start_adapter


@dataclass(frozen=True)
class StageProgram:
    """One program of a stage."""

    name: str
    lower: Callable[[], Any]  # gives what the compiler takes
    flops: float  # useful operations of one run, on all chips; counted as in `distill/cost.py`
    runs: float = 1.0  # for the rows of the stage's batch
    passes: int = 1  # how often a run reads the base
    pieces: int = 1  # how often a run fills its temporaries
    held: Mapping[str, int] = dataclasses.field(default_factory=dict)  # bytes on each chip of some arguments, by name


@dataclass(frozen=True)
class Workload:
    """A stage as programs to compile."""

    name: str
    title: str
    arms: int  # students whose axis comes before that of the rows
    rows: int | str  # of a batch, on all chips together and of all arms, or "auto"
    programs: Callable[[Layout, int], list[StageProgram]]  # of a batch with so many rows
    fixed: bool = False  # rows are not for memory to decide


@dataclass(frozen=True)
class Case:
    """An experiment, and the chips that its stages are compiled for."""

    experiment: Experiment
    config: ModelConfig
    topology: Topology
    arms: int = 1  # students that are trained together
    lengths: Lengths = Lengths()

    @functools.cached_property
    def params(self) -> Params:
        return abstract_params(self.config, self.experiment.dtype)

    @functools.cached_property
    def sizes(self) -> Sizes:
        return Sizes(self.config, jnp.dtype(self.experiment.dtype).itemsize)

    @property
    def students(self) -> Students | None:
        """The first of the config's arms."""
        students = self.experiment.students
        return None if students is None else next(iter(variants(students).values()))

    @functools.cached_property
    def adapter(self) -> Adapter:
        """The shapes of a student's adapter."""
        students = self.students
        assert students is not None, "only stages of training ask for it"
        return jax.eval_shape(lambda params: start_adapter(self.config, params, students, 0), self.params)

    @property
    def axes(self) -> list[int]:
        """The model axis that a run takes; where memory decides about it, then larger ones."""
        axis, topology = self.experiment.run.model_axis, self.topology
        if axis != "auto":
            return [axis]
        least = model_axis_for(self.sizes.weights, topology.chip.memory, topology.near)
        return [axis for axis in topology.model_axes if axis >= least]

    def layout(self, arms: int, model: int) -> Layout:
        """`UsageError` for a model axis that the chips cannot be divided by."""
        if self.topology.near % model:  # of GPUs the compiler does not know which are of one node
            raise UsageError(
                f"model_axis: {model} given, which does not divide {self.topology.near} chips of a slice or node"
            )
        fitted = Layout.fit("mesh", arms, self.topology.devices, model=model)
        return dataclasses.replace(fitted, devices=self.topology.devices)

    def placed_params(self, layout: Layout) -> Params:
        return layout.shapes(self.params, layout.params_sharding(self.config, self.experiment.dtype))

    def rows_together(self, given: int | str, layout: Layout) -> int:
        """As `Context.rows_together`, on chips that are not there."""
        if isinstance(given, int):
            return given
        memory = self.topology.chip.memory * layout.model
        return batching.rows_together(self.config, self.sizes.width, 0, memory, layout.data)


def bytes_on_chip(tree: Any) -> int:
    """How many bytes of arrays, given as shapes with shardings, lie on each chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def train(case: Case) -> Workload:
    """Students on rows: the whole step."""
    students, long, config = case.students, case.lengths, case.config
    assert students is not None
    data, loss, row = students.data, students.loss, long.prompt + long.answer
    teacher = row + long.system if loss.live else 0
    longest = Shape.fit(data.accumulate, data.batch_size, row, long.answer, teacher)
    example = example_like(longest, soft=loss.live)
    if loss.top_k is not None:
        ids, logp = (np.zeros((longest.labels, n)) for n in (loss.top_k, loss.top_k + 1))
        example = dataclasses.replace(example, ids=ids.astype(np.int32), logp=logp.astype(np.float32))
    arm = Arm("student", [example], case.adapter, 0, students.optimizer.lr, 1)

    def programs(layout: Layout, rows: int) -> list[StageProgram]:
        recipe = case.experiment.recipe.resolved(config.family)
        settings = settings_of(config, students, recipe, parallel="mesh", model_axis=layout.model)
        together = students.runtime.rows_at_once
        if together == "auto":
            chips: dict[str, Any] = {"limit": case.topology.chip.memory, "devices": len(case.topology.devices)}
            together = rows_at_once(config, settings, longest.tokens, case.arms, itemsize=case.sizes.width, **chips)
        settings, shape = in_pieces(settings, longest, together)
        shape = shape.divisible(layout.data)
        arguments = abstract_step(config, case.params, arm, case.arms, settings, shape, layout)
        of_row = training_flops(
            config, case.adapter, settings.program.loss, tokens=longest.tokens, supervised=longest.labels,
            teacher_tokens=longest.teacher, stored=not loss.live, cached=settings.cache_below,
        )  # fmt: skip
        spare = f" (+ {shape.spare} empty)" if shape.spare else ""
        return [
            StageProgram(
                f"step of {shape.accumulate} x {shape.batch_size} rows{spare}",
                lambda: compile_step(config, settings.program, layout).lower(*arguments),
                case.arms * shape.accumulate * shape.lines * of_row,
                passes=shape.accumulate * (2 + settings.program.remat),
                pieces=shape.accumulate,
                held={"adapters and optimizer": bytes_on_chip(arguments[1])},
            )
        ]

    title = f"{students.adapter.method}, {loss.kind} loss, arms: {case.arms}, {row} tokens, {long.answer} supervised"
    return Workload("train", title, case.arms, case.arms * data.batch_size * data.accumulate, programs, fixed=True)


def sample(case: Case) -> Workload:
    """Teachers answer prompts, each a row of its own."""
    e, long = case.experiment, case.lengths
    new, prompts = e.sampling.max_new_tokens, min(e.sampling.shard, e.data.num_prompts)
    title = f"{new} tokens after prompts of {round_up(long.system, PROMPT_STEP)} + {long.prompt}"
    programs = functools.partial(_decoding, case, None, prompts=prompts, samples=1, prompt=long.prompt, new=new)
    return Workload("sample", title, 1, e.sampling.batch_size, programs)


def evaluate(case: Case) -> Workload:
    """Students that were trained together answer questions, several times each; without students, the base does."""
    ev, question = case.experiment.evaluation, case.lengths.question
    arms, adapter = min(case.arms, ASKED_TOGETHER), None if case.students is None else case.adapter
    how = {"prompts": ev.questions or 50, "samples": ev.samples, "prompt": question, "new": ev.max_new_tokens}
    title = f"{ev.max_new_tokens} tokens after questions of {question}, {ev.samples} answers to each, students together: {arms}"
    return Workload("evaluate", title, arms, ev.batch_size, functools.partial(_decoding, case, adapter, **how))


def _decoding(
    case: Case, adapter: Adapter | None, layout: Layout, rows: int, *, prompts: int, samples: int, prompt: int, new: int
) -> list[StageProgram]:
    """Both programs of `generation.generate_for_arms`: prompts are read into places of a batch, and tokens are drawn in all.

    Args:
      rows: places of all arms together.
    """
    config, A = case.config, 1 if adapter is None else min(case.arms, ASKED_TOGETHER)
    adapter = adapter or jax.eval_shape(lambda: init_steering(config))
    stacked = jax.eval_shape(lambda a: stack_adapters([at_every_layer(a, config.num_layers)] * A), adapter)
    stacked = layout.shapes(stacked, layout.state_sharding(stacked, ("arm",)))
    P = round_up(case.lengths.system, PROMPT_STEP) if samples == 1 else 0
    sizes = generation.BatchSizes.of(config, max(1, rows // A), layout.data, [prompt] * prompts, samples)
    B, read, filled, lines = (sizes.devices * n for n in (sizes.places, sizes.prompts, sizes.rows, sizes.lines))
    slots, dtype = decoding.cache_slots(config, P + prompt + new), jnp.dtype(case.experiment.dtype)
    params = case.placed_params(layout)
    batch = jax.eval_shape(lambda: decoding.empty(config, A, B, slots, dtype))
    batch = layout.shapes(batch, decoding.decoding_sharding(config, layout, batch))
    begun = None
    if P:
        begun = jax.eval_shape(functools.partial(decoding.beginning, config), case.params, stacked, _ints(A, P))
        begun = layout.shapes_as(ARMS, begun)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    line = _ints(A, lines, sizes.tokens)
    asked = decoding.Prompts(line, Branches(line, line), *(_ints(A, n) for n in (read, read, B, B)))
    asked = layout.shapes_as(ARM_ROWS, asked)
    key, stop = layout.shapes_as(WHOLE, (key, generation.stop_array(Sampling())))
    numbers = layout.shapes_as(ROWS, generation.sampling_arrays(Sampling(), B))
    enough = layout.shapes_as(ARMS, _ints(A))
    room = batching.has_room_for_layers(config, case.sizes.width, case.topology.chip.memory * layout.model)
    held = {"caches": bytes_on_chip(batch.rings)} | ({"adapters": bytes_on_chip(stacked)} if stacked else {})
    fill = functools.partial(decoding.fill.lower, config, params, stacked, begun, batch, asked, key, layout)
    limits = numbers, stop, enough, _ints(), None
    advance = functools.partial(decoding.advance.lower, config, params, stacked, batch, *limits, layout, _ints(), room)
    reading, drawing = A * case.sizes.forward(lines * sizes.tokens, read), A * case.sizes.forward(B, B)
    return [
        StageProgram(f"prompts: {filled} rows begin", fill, reading, runs=B / filled, held=held),
        StageProgram(f"tokens: one for each of {A * B} rows", advance, drawing, runs=new, held=held),
    ]


def _ints(*shape: int, dtype: Any = np.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def score(case: Case) -> Workload:
    """A teacher reads rows, all of them behind its system prompt: divergence. Teachers do so one after another."""
    config, long = case.config, case.lengths
    P = round_up(long.system, PREFIX_STEP)
    C, T = (round_up(n, LENGTH_STEP) for n in (long.answer, long.prompt + long.answer))

    def programs(layout: Layout, rows: int) -> list[StageProgram]:
        B, params = round_up(rows, layout.data), case.placed_params(layout)
        prefix = jax.eval_shape(functools.partial(scoring.prefix_cache, config), case.params, None, _ints(1, P))
        prefix = layout.shapes_as(WHOLE, prefix)
        read = layout.shapes_as(ROWS, (_ints(B, T), _ints(B, T, dtype=bool), _ints(B, C), _ints(B, C)))
        lower = functools.partial(scoring.read_batch.lower, config, params, None, prefix, *read)
        lower = functools.partial(lower, at=scoring.best_token, layout=layout)
        return [StageProgram(f"{B} rows are read", lower, case.sizes.forward(B * T, B * C))]

    title = f"rows of {P} + {T} tokens, {C} of the answer"
    return Workload("score", title, 1, case.experiment.scoring.batch_size, programs)


def attribute(case: Case) -> Workload:
    """Pairs of runs: what each layer's value does to the next token."""
    how, long, config = case.experiment.attribution or Attribution(), case.lengths, case.config
    T = round_up(long.system + long.prompt + long.answer, LENGTH_STEP)
    kinds = (
        ("integral", patching.at_start if how.steps == 1 else patching.integrated),
        ("whole layers", patching.all_positions),
    )

    def programs(layout: Layout, rows: int) -> list[StageProgram]:
        B, params = round_up(rows, layout.data), case.placed_params(layout)
        batch = patching.PairBatch(_ints(B, T), _ints(B, T), _ints(B, T, dtype=bool), _ints(B), _ints(B, 2))
        batch, steps = layout.shapes_as(ROWS, batch), layout.shapes_as(WHOLE, _ints())
        flops = patching.patching_flops(config, len(how.sites), how.steps)
        programs = []
        for (name, program), of_token in zip(kinds, flops, strict=True):
            lower = functools.partial(patching.compare.lower, program, config, tuple(how.sites), params, None)
            lower = functools.partial(lower, batch, steps, layout)
            programs.append(StageProgram(f"{name} of {B} pairs", lower, B * T * of_token))
        return programs

    title = f"{', '.join(how.sites)}, {how.steps} steps, pairs of {T} tokens"
    return Workload("attribute", title, 1, how.batch_size, programs)


STAGES: dict[str, Callable[[Case], Workload]] = {
    "train": train, "sample": sample, "score": score, "evaluate": evaluate, "attribute": attribute
}  # fmt: skip
SECTIONS = {"train": "students", "attribute": "attribution"}  # of a config, without which it lacks a stage

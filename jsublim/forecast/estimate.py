"""`--dry-run`: the costs of a graph's tasks summed by kind, for a named chip, and the memory that its students take at least.

Lengths are assumed, and so is the share of a chip's peak that each kind of work reaches; both are printed beside the result.
Students on another checkpoint count as on the experiment's; neither a judge's work nor its memory is counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jsublim.config import Experiment, find_config
from jsublim.core.reading import shown
from jsublim.core.timeleft import COMPILING
from jsublim.distill.memory import kept_per_token
from jsublim.errors import UsageError
from jsublim.inference.lm import folder_here
from jsublim.pipeline.cost import Sizes
from jsublim.pipeline.graph import Graph, expected
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stages.students import abstract_start
from jsublim.pipeline.store import Store
from jsublim.runtime.chips import Chip


def architecture(model: str, shape: Path | None) -> Path:
    """The folder whose `config.json` says what a config's model is: the one given, the checkpoint, or the numbers that
    come with the package. `UsageError` if none is at hand."""
    if (folder := shape or folder_here(model)) is not None:
        return folder
    name = re.sub(r"-(instruct|it)(-\d{4})?$", "", model.rsplit("/", 1)[-1].lower())
    try:
        return find_config(f"configs/shapes/{name}/config.json").parent
    except UsageError:
        raise UsageError(
            f"model {shown(model)}: neither a folder here nor among configs/shapes; give --shape, a folder with its config.json"
        ) from None


def with_runtime(experiment: Experiment, **fields: Any) -> Experiment:
    """An experiment with other fields of `students.runtime`; one without students as it is."""
    students = experiment.students
    if students is None:
        return experiment
    runtime = students.runtime.model_copy(update=fields)
    return experiment.model_copy(update={"students": students.model_copy(update={"runtime": runtime})})


@dataclass(frozen=True)
class StageCost:
    """All tasks of one kind."""

    kind: str
    tasks: int
    tokens: float
    flops: float
    seconds: float
    done: int | None  # are whole already; None where keys cannot be told, because a checkpoint is not here


def stage_costs(graph: Graph, setup: Setup, store: Store, chip: Chip) -> list[StageCost]:
    """One line per kind of task, in the order of the graph."""
    sizes, lines = Sizes.of(setup), []
    for kind in dict.fromkeys(task.kind for task in graph.tasks.values()):
        tasks = [task for task in graph.tasks.values() if task.kind == kind]
        costs = [task.cost(setup, sizes) for task in tasks]
        parts = [part for cost in costs for part in cost.parts]
        tokens, flops = sum(part.tokens for part in parts), sum(part.flops for part in parts)
        done = sum(task.done(store) for task in tasks) if setup.known else None
        lines.append(StageCost(kind, len(tasks), tokens, flops, sum(cost.seconds(chip) for cost in costs), done))
    return lines


def compiling(graph: Graph, setup: Setup, chip: Chip) -> float:
    """Seconds of a CPU that compiling all programs should take, before any was compiled."""
    return COMPILING * len({task.program for task in expected(graph.tasks.values(), setup, chip).values()})


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, at least."""

    base: float  # weights
    student: float  # each that is trained beside them, with its optimizer, and what a batch keeps for the way back
    together: int  # students that are trained at one time

    @property
    def needed(self) -> float:
        return self.base + self.together * self.student

    def advice(self, has: float) -> str:
        """Whether a device of so many bytes does; if not, what to change."""
        if self.needed <= has:
            return "fits"
        fitting = int((has - self.base) / self.student) if self.student else 0
        if fitting >= 1:
            return f"{self.together} students in a program are too many: set students.runtime.arms_per_program={fitting}, or auto"
        for copies in (2, 4, 8, 16, 32, 64, 128, 256):
            if self.base / copies + self.student <= has:
                alone = ", students.runtime.arms_per_program=1" if self.together > 1 else ""
                return f"the weights are too large: set run.parallel=mesh run.model_axis={copies}{alone}, on {copies} such chips"
        return (
            "one student's batch is too large: set students.runtime.remat=true, or a smaller students.data.batch_size"
        )


def memory(setup: Setup) -> Memory:
    """The memory of one device that an experiment takes at least."""
    sizes, config = Sizes.of(setup), setup.checkpoint().config
    base = sizes.weights / setup.experiment.run.least_axis
    if not setup.students:
        return Memory(base, 0.0, 0)
    largest = max(setup.students, key=lambda student: student.settings.adapter.rank)
    s, long, of_layer = largest.settings, sizes.lengths, kept_per_token(config)
    # Recomputed layers keep what each begins with, and all of one of them.
    values = of_layer + config.num_layers * config.hidden_size if s.runtime.remat else config.num_layers * of_layer
    start = abstract_start(setup.checkpoint(s.model), setup.experiment.dtype, s)
    trained = sum(leaf.size for leaf in jax.tree.leaves(start.trainable))
    # Of each float32 value that is trained: itself, its gradient and two moments.
    student = 16 * trained + s.data.batch_size * (long.prompt + long.answer) * values * sizes.width
    size = 1 if s.runtime.arms_per_program == "auto" else s.runtime.arms_per_program
    return Memory(base, student, min(size, len(setup.students)))

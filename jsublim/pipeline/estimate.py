"""What a run will cost before it is begun: the graph's costs summed, by kind of task, for a named chip.

Lengths are assumed, and so is the share of a chip's peak that each kind of work reaches; both are printed beside the result.
Students on another checkpoint count as on the experiment's; neither a judge's work nor its memory is counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax

from jsublim.chips import Chip
from jsublim.pipeline.graph import Graph
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stage import Task
from jsublim.pipeline.stages.students import abstract_start
from jsublim.pipeline.store import Store
from jsublim.pipeline.task import Cost, Sizes

ORDER = (
    "teachers",
    "rows",
    "entangled",
    "influence",
    "divergence",
    "datasets",
    "attribution",
    "targets",
    "students",
    "evaluations",
)
# Shares of the peak: reading and training are products; sampling waits for memory where batches are small.
REACHED = {"read": 0.5, "train": 0.4, "sample": 0.3}


@dataclass(frozen=True)
class StageCost:
    """All tasks of one kind.

    Attributes:
      done: how many are whole already; None where keys cannot be told, because a checkpoint is not here.
    """

    kind: str
    tasks: int
    tokens: float
    flops: float
    seconds: float
    done: int | None


def sizes_of(setup: Setup) -> Sizes:
    return Sizes(setup.checkpoint().config, 2 if setup.experiment.dtype == "bfloat16" else 4)


def seconds(cost: Cost, chip: Chip) -> float:
    """On one chip: the arithmetic, or the memory where that takes longer."""
    return max(cost.flops / (chip.peak * REACHED[cost.work]), cost.bytes / chip.bandwidth)


def stage_costs(graph: Graph, setup: Setup, store: Store, chip: Chip) -> list[StageCost]:
    """One line per kind of task, in the order of work."""
    kinds: dict[str, list[Task]] = {}
    for task in graph.tasks.values():
        kinds.setdefault(task.kind, []).append(task)
    order = sorted(kinds, key=lambda kind: ORDER.index(kind) if kind in ORDER else len(ORDER))
    return [_summed(kind, kinds[kind], setup, store, chip) for kind in order]


def _summed(kind: str, tasks: Iterable[Task], setup: Setup, store: Store, chip: Chip) -> StageCost:
    sizes, tasks = sizes_of(setup), list(tasks)
    costs = [part for task in tasks for part in task.cost(setup, sizes).parts]
    done = sum(task.done(store) for task in tasks) if setup.known else None
    tokens, flops = sum(cost.tokens for cost in costs), sum(cost.flops for cost in costs)
    return StageCost(kind, len(tasks), tokens, flops, sum(seconds(cost, chip) for cost in costs), done)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, at least: the base's weights, each student that is trained beside them (with its optimizer, and what
    a batch keeps for the way back), and how many students are trained at one time."""

    base: float
    student: float
    together: int

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
        copies = 2
        while self.base / copies + self.student > has and copies < MOST_AXIS:
            copies *= 2
        if copies < MOST_AXIS:
            program = ", students.runtime.arms_per_program=1" if self.together > 1 else ""
            return f"the weights are too large: set run.parallel=mesh run.model_axis={copies}{program}, on {copies} such chips"
        return (
            "one student's batch is too large: set students.runtime.remat=true, or a smaller students.data.batch_size"
        )


MOST_AXIS = 512  # chips that one copy is spread over


def weights(setup: Setup) -> float:
    """Bytes of the experiment's checkpoint."""
    sizes, config = sizes_of(setup), setup.checkpoint().config
    return (sizes.body + sizes.table * (1 if config.tied else 2)) * sizes.width


def memory(setup: Setup) -> Memory:
    """What an experiment takes of one device's memory at least."""
    sizes, config = sizes_of(setup), setup.checkpoint().config
    base = weights(setup) / setup.experiment.run.least_axis
    if not setup.students:
        return Memory(base, 0.0, 0)
    largest = max(setup.students, key=lambda student: student.settings.adapter.rank)
    s, long = largest.settings, sizes.lengths
    size = 1 if s.runtime.arms_per_program == "auto" else s.runtime.arms_per_program
    trained = sum(
        leaf.size
        for leaf in jax.tree.leaves(abstract_start(setup.checkpoint(s.model), setup.experiment.dtype, s).trainable)
    )
    tokens = s.data.batch_size * (long.prompt + long.answer)
    of_layer = 8 * config.hidden_size + 3 * config.intermediate_size  # values that a layer keeps of a token
    remat = config.num_layers * config.hidden_size + of_layer  # one layer's, and what each layer begins with
    kept = tokens * (remat if s.runtime.remat else config.num_layers * of_layer)
    # Of each float32 value that is trained: itself, its gradient and two moments.
    student = 16 * trained + kept * sizes.width
    return Memory(base, student, min(size, len(setup.students)))

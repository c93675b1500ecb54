"""A graph played through before it is run: the Ray executor's choices on machines that are not there, event by event.

What tasks take comes from their costs (`pipeline/cost.py`); everything else is assumed, in one place (`Assumptions`).
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax

from jsublim.config import Experiment
from jsublim.core.progress import Progress
from jsublim.errors import UsageError
from jsublim.executors.frontier import Frontier, Job, merged
from jsublim.forecast.estimate import architecture
from jsublim.models.parallel import Layout
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Sizes
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stages.students import abstract_start, program_of_student
from jsublim.pipeline.store import Store
from jsublim.runtime.chips import Chip, chip_of


@dataclass(frozen=True)
class Assumptions:
    """Everything that a simulation assumes beside the costs of tasks, in seconds and bytes: its fields say what."""

    start: float = 40.0  # of a worker, until it has planned the graph
    replaced: float = 300.0  # until a machine is there in the place of one that was taken away
    read: float = 1e9  # bytes per second at which a worker reads a checkpoint
    compiles: float = 60.0  # a program that nobody has compiled
    cached: float = 5.0  # one that lies in the shared cache
    spread: float = 0.1  # what a task's duration varies by: the standard deviation of its logarithm
    slow: float = 0.02  # share of the tasks that take `slower` times as long
    slower: float = 2.0
    store: float = 1e9  # bytes per second that the store takes and gives, of all workers together
    latency: float = 0.5  # of each artifact in the store
    token_bytes: float = 12.0  # in the store, per token that a task reads or writes
    kept: float = 60.0  # between two times that a task keeps what it has finished; the rest is lost with its machine
    doubled: float = 0.95  # what is left of a chip's speed with each doubling of the chips that one worker has


@dataclass(frozen=True)
class Machines:
    """So many workers of so many chips each."""

    workers: int
    chip: str
    chips: int = 1

    @classmethod
    def of(cls, text: str) -> Machines:
        """From "64xh100", or "4xv5e-16": four slices of 16 chips."""
        parts = re.fullmatch(r"(\d{1,5})x([a-z0-9]+?)(?:-(\d{1,4}))?", text)
        if parts is None or not int(parts[1]) or parts[3] == "0":
            raise UsageError(f"--simulate: '{text}' given; write 64xh100, or 4xv5e-16 for four slices of 16 chips")
        chip_of(parts[2], "--simulate")
        return cls(int(parts[1]), parts[2], int(parts[3] or 1))

    @property
    def kind(self) -> Chip:
        return chip_of(self.chip)

    def speedup(self, assumed: Assumptions) -> float:
        """How much faster one worker is than one chip."""
        return self.chips * assumed.doubled ** math.log2(self.chips)


@dataclass
class Simulated:
    """The course of a simulation; times in seconds."""

    machines: Machines
    critical: float  # the longest way through the graph, with any number of workers
    makespan: float = 0.0
    preempted: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # of workers, by what they did
    ends: list[tuple[Job, int, float, float]] = field(default_factory=list)  # of each: its worker, begin and end

    @property
    def chip_hours(self) -> float:
        return self.makespan * self.machines.workers * self.machines.chips / 3600

    @property
    def idle(self) -> float:
        """The share of the workers' time in which nothing was done for anybody."""
        workers_time = self.makespan * self.machines.workers
        return max(0.0, 1 - sum(self.seconds.values()) / workers_time) if workers_time else 0.0


def simulate_experiments(
    experiments: Sequence[Experiment], machines: Machines, preempt_per_hour: float = 0.0, shape: Path | None = None
) -> Simulated:
    """Play through what is left to do of some experiments; nothing is made, not even a folder; `shape` as of `architecture`. One worker's chips
    must hold the checkpoint."""
    work = []
    for experiment in experiments:
        setup = Setup.of(experiment, lambda name: architecture(name, shape))
        has, needs = machines.kind.memory * machines.chips, Sizes.of(setup).weights
        if needs > has:
            raise UsageError(
                f"--simulate: {experiment.model} has {needs / 2**30:.3g} GiB, and a worker of {machines.chips} {machines.chip} "
                f"{has / 2**30:.3g} GiB; give larger slices, such as {machines.workers}x{machines.chip}-{4 * machines.chips}"
            )
        work.append((list(plan(setup).tasks.values()), Context(setup, Store.of(experiment), Layout(), Progress())))
    nodes = merged(work, machines.kind)
    missing = {key: node for key, node in nodes.items() if not (node.context.setup.known and node.done)}
    return simulate(missing, machines, preempt_per_hour=preempt_per_hour)


@dataclass
class _Worker:
    number: int
    taken_away: float  # when its machine is
    checkpoint: Hashable = None
    programs: set[Hashable] = field(default_factory=set)


def simulate(
    nodes: Mapping[str, Job], machines: Machines, assumed: Assumptions | None = None, *, preempt_per_hour: float = 0.0,
    seed: int = 0, given: Mapping[str, float] | None = None,
) -> Simulated:  # fmt: skip
    """Do what is in `nodes`, whose costs are seconds on one chip of those machines.

    Args:
      preempt_per_hour: how often a machine is taken away, on average.
      given: measured seconds by key, loading and compiling included; in place of what would be assumed.
    """
    assumed, frontier, draw = assumed or Assumptions(), Frontier(nodes), random.Random(seed)
    durations = _Durations(assumed, machines.speedup(assumed), draw, given)
    result = Simulated(machines, max(frontier.way.values(), default=0.0) / durations.speed)
    # When, in which order they were planned, whose, for which task (None: it starts), since when, and what it does until then.
    events: list[tuple[float, int, _Worker, Job | None, float, dict[str, float]]] = []
    idle, order = list[_Worker](), itertools.count()

    def start(number: int, now: float) -> None:
        begins = now + assumed.start
        away = begins + draw.expovariate(preempt_per_hour / 3600) if preempt_per_hour else math.inf
        heapq.heappush(events, (begins, next(order), _Worker(number, away), None, now, {"starting": assumed.start}))

    def replace(worker: _Worker, now: float) -> None:
        result.preempted += 1
        start(worker.number, now + assumed.replaced)

    for number in range(machines.workers):
        start(number, 0.0)
    while frontier.left:
        now, _, worker, node, began, doing = heapq.heappop(events)
        if node is not None and now < began + sum(doing.values()):  # its machine is taken away in the middle
            kept = durations.keep(node, min(now - began, doing[node.task.kind]))
            result.seconds[node.task.kind] += kept
            result.seconds["lost"] += now - began - kept
            frontier.give_back(node.key)
            replace(worker, now)
        else:
            for what, seconds in doing.items():
                result.seconds[what] += seconds
            if node is not None:
                frontier.finish(node.key)
                result.ends.append((node, worker.number, began, now))
                result.makespan = now
            idle.append(worker)
        for worker in list(idle):
            if worker.taken_away <= now:  # while it had nothing to do
                idle.remove(worker)
                replace(worker, worker.taken_away)
                continue
            node = frontier.take(lambda node, loaded=worker.checkpoint: node.checkpoint == loaded)
            if node is None:
                break
            idle.remove(worker)
            doing = durations.of(worker, node, now)
            ends = min(now + sum(doing.values()), worker.taken_away)
            heapq.heappush(events, (ends, next(order), worker, node, now, doing))
    return result


class _Durations:
    """How long workers take for tasks, given what was compiled, kept and stored before."""

    def __init__(self, assumed: Assumptions, speed: float, draw: random.Random, given: Mapping[str, float] | None):
        self.assumed, self.speed, self.draw, self.given = assumed, speed, draw, given
        self.compiled: set[Hashable] = set()
        self.kept: dict[str, float] = defaultdict(float)  # seconds of a task's work that outlive its worker
        self.pipe = 0.0  # when the store has answered everybody

    def of(self, worker: _Worker, node: Job, now: float) -> dict[str, float]:
        if self.given is not None:
            return {node.task.kind: self.given[node.key]}
        a, doing = self.assumed, dict[str, float]()
        if worker.checkpoint != node.checkpoint:
            worker.checkpoint, worker.programs = node.checkpoint, set()
            doing["loading"] = Sizes.of(node.context.setup).weights / a.read
        program = _program(node)
        if program not in worker.programs:
            doing["compiling"] = a.cached if program in self.compiled else a.compiles
            worker.programs.add(program)
            self.compiled.add(program)
        factor = self.draw.lognormvariate(0.0, a.spread) * (a.slower if self.draw.random() < a.slow else 1.0)
        doing[node.task.kind] = max(0.0, node.cost / self.speed * factor - self.kept[node.key])
        begins = max(self.pipe, now)  # the store serves one after another
        self.pipe = begins + _traffic(node, a) / a.store
        doing["store"] = self.pipe - now + a.latency * len(node.task.outputs)
        return doing

    def keep(self, node: Job, worked: float) -> float:
        """How much of such work on a task outlives its worker."""
        kept = worked // self.assumed.kept * self.assumed.kept
        self.kept[node.key] += kept
        return kept


def _program(node: Job) -> Hashable:
    """The program of a task: equal for tasks that run the same one."""
    kind, first, of_task = node.task.kind, node.task.nodes[0], None
    if kind == "students":
        of_task = program_of_student(first)
    elif kind == "evaluations":
        of_task = first.given.layer
    return node.checkpoint, kind, of_task


def _traffic(node: Job, assumed: Assumptions) -> float:
    """Bytes that a task moves to and from the store: rows and readings; of students, adapters and two moments of each value."""
    task, setup = node.task, node.context.setup
    if task.kind == "students":
        given = task.nodes[0].given
        trained = abstract_start(given.start.model.checkpoint, setup.experiment.dtype, given.settings).trainable
        return 12.0 * len(task.nodes) * sum(leaf.size for leaf in jax.tree.leaves(trained))
    return assumed.token_bytes * sum(part.tokens for part in task.cost(setup, Sizes.of(setup)).parts)

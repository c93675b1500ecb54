"""A graph played through before it is run: the Ray executor's choices on machines that are not there, event by event.

What tasks take comes from their costs (`pipeline/estimate.py`); everything else is assumed, in one place (`Assumptions`).
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import re
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import jax

from jsublim.chips import Chip, chip_of
from jsublim.errors import UsageError
from jsublim.executors.frontier import Frontier, Node, checkpoint_of
from jsublim.pipeline.estimate import sizes_of, weights
from jsublim.pipeline.stages.students import abstract_start, program_of_student


@dataclass(frozen=True)
class Assumptions:
    """Everything that a simulation assumes beside the costs of tasks. Times are in seconds, sizes in bytes.

    Fields:
      start: of a worker, until it has planned the graph; replaced: until a machine is there in the place of one that was taken away.
      read: bytes per second at which a worker reads a checkpoint; compiles: a program that nobody has compiled; cached: one that
        lies in the shared cache.
      spread: what a task's duration varies by (standard deviation of its logarithm); slow: share of the tasks that take
        `slower` times as long.
      store: bytes per second that the store takes and gives, of all workers together; latency: of each artifact;
        token_bytes: in the store, per token that a task reads or writes.
      kept: between two times that a task keeps what it has finished; what is newer is lost with its machine.
      doubled: what is left of a chip's speed with each doubling of the chips that one worker has.
    """

    start: float = 40.0
    replaced: float = 300.0
    read: float = 1e9
    compiles: float = 60.0
    cached: float = 5.0
    spread: float = 0.1
    slow: float = 0.02
    slower: float = 2.0
    store: float = 1e9
    latency: float = 0.5
    token_bytes: float = 12.0
    kept: float = 60.0
    doubled: float = 0.95


@dataclass(frozen=True)
class Machines:
    """What is simulated: so many workers of so many chips each."""

    workers: int
    chip: str
    chips: int = 1

    @classmethod
    def of(cls, text: str) -> Machines:
        """From "64xh100", or "4xv5e-16": four slices of 16 chips.

        Raises:
          UsageError: neither of these, or an unknown chip.
        """
        found = re.fullmatch(r"(\d{1,5})x([a-z0-9]+?)(?:-(\d{1,4}))?", text)
        if found is None or not int(found[1]) or found[3] == "0":
            raise UsageError(f"--simulate: '{text}' given; write 64xh100, or 4xv5e-16 for four slices of 16 chips")
        chip_of(found[2], "--simulate")
        return cls(int(found[1]), found[2], int(found[3] or 1))

    @property
    def kind(self) -> Chip:
        return chip_of(self.chip)

    def speedup(self, assumed: Assumptions) -> float:
        """Of one worker, against one chip."""
        return self.chips * assumed.doubled ** math.log2(self.chips)


@dataclass
class Played:
    """What came of it; times in seconds.

    Attributes:
      seconds: of workers, by what they did; critical: the longest way through the graph, with any number of workers.
      ends: of each task: its node, its worker, when it began and ended.
    """

    machines: Machines
    makespan: float = 0.0
    critical: float = 0.0
    preempted: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ends: list[tuple[Node, int, float, float]] = field(default_factory=list)

    @property
    def chip_hours(self) -> float:
        return self.makespan * self.machines.workers * self.machines.chips / 3600

    @property
    def idle(self) -> float:
        """The share of the workers' time in which nothing was done for anybody."""
        if not self.makespan:
            return 0.0
        return max(0.0, 1 - sum(self.seconds.values()) / (self.makespan * self.machines.workers))


@dataclass
class _Worker:
    number: int
    taken_away: float  # when its machine is
    checkpoint: Hashable = None
    programs: set[Hashable] = field(default_factory=set)
    life: int = 0  # events of an earlier life are void


def play(
    nodes: Mapping[str, Node],
    machines: Machines,
    assumed: Assumptions | None = None,
    *,
    preempt_per_hour: float = 0.0,
    seed: int = 0,
    given: Mapping[str, float] | None = None,
) -> Played:
    """Do what is in `nodes`, whose costs are seconds on one chip of those machines.

    Args:
      preempt_per_hour: how often a machine is taken away, on average.
      given: measured seconds by key, loading and compiling included; in place of what would be assumed.
    """
    return _Play(
        Frontier(nodes), machines, assumed or Assumptions(), preempt_per_hour, random.Random(seed), given
    ).run()


@dataclass
class _Play:
    """The state of a simulation.

    Fields:
      events: when, in which order they were planned, worker, its life, node (None: it is ready for one), what it does until then.
      kept: seconds of a task's work that outlive its worker; pipe: when the store has answered everybody.
    """

    frontier: Frontier
    machines: Machines
    assumed: Assumptions
    rate: float
    draw: random.Random
    given: Mapping[str, float] | None
    events: list[tuple[float, int, int, int, Node | None, dict[str, float]]] = field(default_factory=list)
    workers: list[_Worker] = field(default_factory=list)
    idle: list[_Worker] = field(default_factory=list)
    compiled: set[Hashable] = field(default_factory=set)
    kept: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    pipe: float = 0.0
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def run(self) -> Played:
        speed = self.machines.speedup(self.assumed)
        self.played = Played(self.machines, critical=max(self.frontier.way.values(), default=0.0) / speed)
        for number in range(self.machines.workers):
            self.workers.append(_Worker(number, math.inf))
            self._starts(self.workers[-1], 0.0)
        while self.frontier.left:
            now, _, number, life, node, doing = heapq.heappop(self.events)
            worker = self.workers[number]
            if life != worker.life:
                continue
            if node is not None and "lost" in doing:
                self._lost(worker, node, now, doing)
            else:
                self._ended(worker, node, now, doing)
            self._assign(now)
        return self.played

    def _starts(self, worker: _Worker, now: float) -> None:
        begins = now + self.assumed.start
        worker.taken_away = begins + self.draw.expovariate(self.rate / 3600) if self.rate else math.inf
        self._plan(worker, begins, None, {"starting": self.assumed.start})

    def _plan(self, worker: _Worker, when: float, node: Node | None, doing: dict[str, float]) -> None:
        heapq.heappush(self.events, (when, next(self._order), worker.number, worker.life, node, doing))

    def _assign(self, now: float) -> None:
        for worker in list(self.idle):
            if worker.taken_away <= now:  # while it had nothing to do
                self.idle.remove(worker)
                self._replace(worker, worker.taken_away)
                continue
            node = self.frontier.take(lambda node, known=worker.checkpoint: _checkpoint(node) == known)
            if node is None:
                return
            self.idle.remove(worker)
            doing = self._durations(worker, node, now)
            ends = now + sum(doing.values())
            if ends <= worker.taken_away:
                self._plan(worker, ends, node, doing)
            else:
                self._plan(
                    worker, worker.taken_away, node, {"lost": worker.taken_away - now, "work": doing[node.task.kind]}
                )

    def _durations(self, worker: _Worker, node: Node, now: float) -> dict[str, float]:
        """What a worker does for a task, and how long."""
        if self.given is not None:
            return {node.task.kind: self.given[node.key]}
        a, doing = self.assumed, dict[str, float]()
        if worker.checkpoint != _checkpoint(node):
            worker.checkpoint, worker.programs = _checkpoint(node), set()
            doing["loading"] = weights(node.context.setup) / a.read
        program = program_of(node)
        if program not in worker.programs:
            doing["compiling"] = a.cached if program in self.compiled else a.compiles
            worker.programs.add(program)
            self.compiled.add(program)
        factor = self.draw.lognormvariate(0.0, a.spread) * (a.slower if self.draw.random() < a.slow else 1.0)
        doing[node.task.kind] = max(0.0, node.cost / self.machines.speedup(a) * factor - self.kept[node.key])
        begins = max(self.pipe, now)  # the store serves one after another
        self.pipe = begins + traffic(node, a) / a.store
        doing["store"] = self.pipe - now + a.latency * len(node.task.outputs)
        return doing

    def _ended(self, worker: _Worker, node: Node | None, now: float, doing: Mapping[str, float]) -> None:
        for what, seconds in doing.items():
            self.played.seconds[what] += seconds
        if node is not None:
            self.frontier.finish(node.key)
            self.played.ends.append((node, worker.number, now - sum(doing.values()), now))
            self.played.makespan = now
        self.idle.append(worker)

    def _lost(self, worker: _Worker, node: Node, now: float, doing: Mapping[str, float]) -> None:
        """A machine is taken away in the middle of a task."""
        worked = min(doing["lost"], doing["work"])
        kept = worked // self.assumed.kept * self.assumed.kept
        self.kept[node.key] += kept
        self.played.seconds[node.task.kind] += kept
        self.played.seconds["lost"] += doing["lost"] - kept
        self.frontier.give_back(node.key)
        self._replace(worker, now)

    def _replace(self, worker: _Worker, now: float) -> None:
        self.played.preempted += 1
        worker.life += 1
        worker.checkpoint, worker.programs = None, set()
        self._starts(worker, now + self.assumed.replaced)


def program_of(node: Node) -> Hashable:
    """What is compiled for a task: equal for tasks that run the same program."""
    task, first = node.task, node.task.nodes[0]
    own: Hashable = None
    if task.kind == "students":
        own = program_of_student(first)
    elif task.kind == "evaluations":
        own = first.given.setting
    return _checkpoint(node), task.kind, own


def traffic(node: Node, assumed: Assumptions) -> float:
    """Bytes that a task moves to and from the store: rows and readings; of students, adapters and two moments of each value."""
    task, setup = node.task, node.context.setup
    if task.kind == "students":
        given = task.nodes[0].given
        trained = abstract_start(given.start.model.checkpoint, setup.experiment.dtype, given.settings).trainable
        return 12.0 * len(task.nodes) * sum(leaf.size for leaf in jax.tree.leaves(trained))
    return assumed.token_bytes * sum(part.tokens for part in task.cost(setup, sizes_of(setup)).parts)


def _checkpoint(node: Node) -> Hashable:
    return checkpoint_of(node.context.setup.experiment)

"""Which layout should be fastest, by roofline: of those that fit, each chip at its peak or its memory at its full bandwidth, whichever
takes longest, and then its links at theirs. An estimate of what is possible, not of what was reached: no program is run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jsublim.forecast.compile import Compiled, Fit, examine
from jsublim.forecast.estimate import with_runtime
from jsublim.forecast.stages import STAGES, Case
from jsublim.forecast.topology import Topology
from jsublim.models.parallel import Layout
from jsublim.pipeline.cost import Sizes
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.setup import Setup

# Kinds of tasks that a stage's programs do.
KINDS = {
    "students": "train", "rows": "sample", "divergence": "score", "targets": "score", "evaluations": "evaluate",
    "attribution": "attribute",
}  # fmt: skip


class Times(NamedTuple):
    """Seconds that a program takes at least, by what limits it. Messages are waited for: a layer needs the sum before it goes on."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.links

    @property
    def limit(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Choice:
    """A layout: chips of one copy, students trained together, and whether layers are computed again on the way back; with what
    the compiler says of each stage, and how long all rows of the experiment take (seconds, by stage)."""

    model: int
    arms: int
    remat: bool
    fits: Mapping[str, Fit]
    seconds: Mapping[str, float]

    @property
    def possible(self) -> bool:
        return all(fit.programs for fit in self.fits.values())

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def fields(self) -> str:
        """The layout as fields of a config."""
        students = f" students.runtime.arms_per_program={self.arms}" if "train" in self.fits else ""
        remat = " students.runtime.remat=true" if self.remat else ""
        return f"run.parallel=mesh run.model_axis={self.model}{students}{remat}"

    def as_dict(self) -> dict[str, Any]:
        stages = [fit.as_dict() for fit in self.fits.values()]
        return {"fields": self.fields, "fits": self.possible, "seconds": dict(self.seconds), "stages": stages}


def roofline(compiled: Compiled, base: int, topology: Topology, group: Sequence[Any]) -> Times:
    """The seconds that all runs of a program for one batch take on one chip, of those (`group`) that exchange messages with one another. Memory: the
    base as often as it is read, every other argument once, and temporaries written and read. Links: what collectives put out less a
    chip's own part, sums twice; nothing where that is not known."""
    program, chip = compiled.program, topology.chip
    moved = base * program.passes + (compiled.arguments - base) + 2 * compiled.temporaries * program.pieces
    sent = sum(c.bytes * (2 if kind == "all-reduce" else 1) for kind, c in (compiled.collectives or {}).items())
    others = sent * (1 - 1 / len(group))
    links = others / topology.links_among(group) if others else 0.0
    compute = program.flops / len(topology.devices) / chip.peak
    return Times(*(once * program.runs for once in (compute, moved / chip.bandwidth, links)))


def batch_times(fit: Fit, topology: Topology) -> list[Times]:
    """The times of a stage's programs, each for all its runs for one batch."""
    return [roofline(program, fit.base, topology, exchanging(fit.layout)) for program in fit.programs]


def exchanging(layout: Layout) -> Sequence[Any]:
    """The devices between which most messages go: those of one copy where it is spread, else those that share an arm's rows."""
    if layout.mesh is None:
        return [None]
    devices = layout.mesh.devices
    return list(devices[0, 0] if layout.model > 1 else devices[0, :, 0])


def rows_of(setup: Setup) -> dict[str, float]:
    """How many rows each stage of an experiment has."""
    rows, sizes = dict[str, float](), Sizes.of(setup)
    for task in plan(setup).tasks.values():
        for place, part in enumerate(task.cost(setup, sizes).parts):
            # What students continue after their answers is read, as rows are that are scored.
            name = "score" if place else KINDS.get(task.kind)
            if name is not None:
                rows[name] = rows.get(name, 0.0) + part.rows
    return rows


def choices(
    case: Case, names: Sequence[str], rows: Mapping[str, float], say: Callable[[str], None] = lambda _: None
) -> Iterator[Choice]:
    """Layouts over powers of two: of chips of one copy, and of students that are trained together (up to the case's). Layers are
    computed again on the way back only where training does not fit otherwise; a layout ends with the first stage that does not
    fit."""
    alike: dict[tuple[str, int, int], Fit] = {}  # stages that more students do not change

    def choice(model: int, arms: int, remat: bool) -> Choice:
        tried = replace(case, arms=arms, experiment=with_runtime(case.experiment, remat=remat))
        fits, seconds = dict[str, Fit](), dict[str, float]()
        for name in names:
            stage = STAGES[name](tried)
            key = name, model, stage.arms
            if name == "train" or key not in alike:
                alike[key] = examine(tried, stage, [model], say)
            fit = fits[name] = alike[key]
            if not fit.programs:
                break
            batch = sum(times.seconds for times in batch_times(fit, case.topology))
            seconds[name] = rows.get(name, 0.0) / fit.rows * batch
        return Choice(model, arms, remat, fits, seconds)

    powers = [1 << i for i in range(case.arms.bit_length())]
    for model, arms in itertools.product(case.topology.model_axes, powers):
        for remat in (False, True) if "train" in names else (False,):
            yield (tried := choice(model, arms, remat))
            if "train" in names and tried.fits["train"].programs:
                break

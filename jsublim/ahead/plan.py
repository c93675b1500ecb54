"""Which layout should be fastest, by roofline: of those that fit, each chip at its peak or its memory at its full bandwidth, whichever
takes longest, and then its links at theirs. An estimate of what is possible, not of what was reached: no program is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jsublim.ahead.compile import Compiled, Report, on_layout
from jsublim.ahead.stages import Case, stage
from jsublim.chips import Chip
from jsublim.config import Experiment
from jsublim.parallel import Layout
from jsublim.pipeline.estimate import sizes_of
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.setup import Setup

# Kinds of tasks that a stage's programs do.
KINDS = {
    "students": "train",
    "rows": "sample",
    "divergence": "score",
    "targets": "score",
    "evaluations": "evaluate",
    "attribution": "attribute",
}
LIMITS = ("compute", "memory", "links")


@dataclass(frozen=True)
class Times:
    """Seconds that a program takes at least, by what limits it. Messages are waited for: a layer needs the sum before it goes on."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.links

    @property
    def limit(self) -> str:
        return max(LIMITS, key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Choice:
    """A layout: chips of one copy, students trained together, and whether layers are computed again on the way back; with what
    the compiler says of each stage, and how long all rows of the experiment take (seconds, by stage)."""

    model: int
    arms: int
    remat: bool
    reports: Mapping[str, Report]
    seconds: Mapping[str, float]

    @property
    def fits(self) -> bool:
        return all(report.programs for report in self.reports.values())

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def fields(self) -> str:
        """What to write for it in a command."""
        students = f" students.runtime.arms_per_program={self.arms}" if "train" in self.reports else ""
        return f"run.parallel=mesh run.model_axis={self.model}{students}" + (
            " students.runtime.remat=true" if self.remat else ""
        )


def roofline(compiled: Compiled, base: int, chip: Chip, group: Sequence[Any]) -> Times:
    """One run of a program on one chip.

    Memory: the base as often as it is read, every other argument once, and temporaries written and read. Links: what collectives
    put out less a chip's own part, sums twice; nothing where that is not known.

    Args:
      group: the devices that exchange messages with one another.
    """
    program = compiled.program
    moved = base * program.passes + (compiled.arguments - base) + 2 * compiled.temporaries * program.pieces
    told = sum(each.bytes * (2 if kind == "all-reduce" else 1) for kind, each in (compiled.collectives or {}).items())
    others = told * (1 - 1 / len(group))
    return Times(
        program.flops / chip.peak, moved / chip.bandwidth, others / links_among(group, chip) if others else 0.0
    )


def links_among(group: Sequence[Any], chip: Chip) -> float:
    """Bytes/s that a chip sends to the others of some devices.

    In a slice of a pod a chip has one link to each neighbour: so as many as there are dimensions of the slice along which the devices
    lie, and two for each that is closed to a ring. Between hosts of GPUs, and between slices, it is their network.
    """
    apart = (
        {device.slice_index if chip.cuda is None else device.process_index for device in group} if chip.network else ()
    )
    if len(apart) > 1:
        return chip.network
    if chip.ports == 1:
        return chip.links
    lengths = [len(set(along)) for along in zip(*(device.coords for device in group), strict=True)]
    return chip.links * sum(1 + (length >= chip.ring) for length in lengths if length > 1) / chip.ports


def exchanging(layout: Layout) -> Sequence[Any]:
    """The devices between which most messages go: those of one copy where it is spread, else those that share an arm's rows."""
    if layout.mesh is None:
        return [None]
    devices = layout.mesh.devices
    return list(devices[0, 0] if layout.model > 1 else devices[0, :, 0])


def batch_times(report: Report, chip: Chip) -> list[Times]:
    """Of each program of a stage, what all its runs for one batch take."""
    every, group = [], exchanging(report.layout)
    for compiled in report.programs:
        once, runs = roofline(compiled, report.base, chip, group), compiled.program.runs
        every.append(Times(once.compute * runs, once.memory * runs, once.links * runs))
    return every


def rows_of(setup: Setup) -> dict[str, float]:
    """How many rows each stage of an experiment has."""
    rows, sizes = dict[str, float](), sizes_of(setup)
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
    for model in case.topology.model_axes:
        alike: dict[tuple[str, int], Report] = {}  # stages that more students do not change
        for arms in _powers(case.arms):
            for remat in (False, True) if "train" in names else (False,):
                tried = dataclasses.replace(case, arms=arms, experiment=_with_remat(case, remat))
                found = _choice(tried, model, remat, names, rows, alike, say)
                yield found
                if found.reports and found.reports.get("train", next(iter(found.reports.values()))).programs:
                    break


def _choice(
    case: Case,
    model: int,
    remat: bool,
    names: Sequence[str],
    rows: Mapping[str, float],
    alike: dict[tuple[str, int], Report],
    say: Callable[[str], None],
) -> Choice:
    reports, seconds, chip = dict[str, Report](), dict[str, float](), case.topology.chip
    for name in names:
        asked = stage(case, name)
        key = name, asked.arms
        if name == "train" or key not in alike:
            alike[key] = on_layout(case, asked, case.layout(asked.arms, model), say)
        report = reports[name] = alike[key]
        if not report.programs:
            break
        seconds[name] = rows.get(name, 0.0) / report.rows * sum(each.seconds for each in batch_times(report, chip))
    return Choice(model, case.arms, remat, reports, seconds)


def _with_remat(case: Case, remat: bool) -> Experiment:
    students = case.experiment.students
    if students is None or students.runtime.remat == remat:
        return case.experiment
    runtime = students.runtime.model_copy(update={"remat": remat})
    return case.experiment.model_copy(update={"students": students.model_copy(update={"runtime": runtime})})


def _powers(most: int) -> Iterator[int]:
    return (1 << i for i in range(most.bit_length()))

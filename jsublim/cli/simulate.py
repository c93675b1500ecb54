"""`--simulate`: what a graph would take on machines that are not there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from jsublim.cli.app import console
from jsublim.errors import UsageError

if TYPE_CHECKING:
    from jsublim.config import Experiment
    from jsublim.executors.simulation import Machines, Played


def print_simulation(
    experiments: Sequence[Experiment],
    text: str,
    preempt_per_hour: float,
    price: float | None,
    shape: Path | None = None,
) -> None:
    """Play the graph of experiments through, and say what it takes. Nothing is made, not even a folder.

    Args:
      text: machines, such as "64xh100"; price: of a chip for an hour.

    Raises:
      UsageError: machines that are not understood, or that cannot hold the checkpoint.
    """
    from jsublim.executors.simulation import Assumptions, Machines

    machines, assumed = Machines.of(text), Assumptions()
    played = simulated(experiments, machines, preempt_per_hour, shape)
    console.print(_table(played, price, ", ".join(each.name for each in experiments)))
    console.print(f"longest way through the graph {_time(played.critical)}: no number of machines is faster than that")
    console.print(_by_grouping(experiments, machines, preempt_per_hour, shape))
    fields = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(assumed).items())
    console.print(f"assumed (executors/simulation.py: Assumptions), beside what --dry-run assumes: {fields}")


def simulated(
    experiments: Sequence[Experiment], machines: Machines, preempt_per_hour: float = 0.0, shape: Path | None = None
) -> Played:
    """Raises:
    UsageError: one worker's chips do not hold the checkpoint.
    """
    from jsublim.cli.aot import architecture
    from jsublim.executors.frontier import merged
    from jsublim.executors.simulation import play
    from jsublim.parallel import Layout
    from jsublim.pipeline.context import Context
    from jsublim.pipeline.estimate import weights
    from jsublim.pipeline.experiment import plan
    from jsublim.pipeline.setup import Setup
    from jsublim.pipeline.store import Store
    from jsublim.progress import Progress

    work = []
    for experiment in experiments:
        setup = Setup.of(experiment, lambda name: architecture(name, shape))
        has, needs = machines.kind.memory * machines.chips, weights(setup)
        if needs > has:
            raise UsageError(
                f"--simulate: {experiment.model} has {needs / 2**30:.3g} GiB, and a worker of {machines.chips} {machines.chip} "
                f"{has / 2**30:.3g} GiB; give larger slices, such as {machines.workers}x{machines.chip}-{4 * machines.chips}"
            )
        work.append((list(plan(setup).tasks.values()), Context(setup, Store.of(experiment), Layout(), Progress())))
    nodes = merged(work, machines.kind)
    missing = {key: node for key, node in nodes.items() if not (node.context.setup.known and node.done)}
    return play(missing, machines, preempt_per_hour=preempt_per_hour)


def _table(played: Played, price: float | None, title: str) -> Table:
    machines, spent = played.machines, played.seconds
    chips = f"{machines.workers} x {machines.chip}" + (f"-{machines.chips}" if machines.chips > 1 else "")
    table = Table("", chips, title=title, title_justify="left")
    table.add_row("from begin to end", _time(played.makespan))
    table.add_row("chip-hours", f"{played.chip_hours:.4g}")
    if price is not None:
        table.add_row(f"money, at {price:g} per chip-hour", f"{played.chip_hours * price:.4g}")
    table.add_row("idle", f"{played.idle:.0%}")
    everything = played.makespan * machines.workers or 1.0
    for what, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        table.add_row(f"  {what}", f"{seconds / everything:.1%}")
    table.add_row("machines taken away", str(played.preempted))
    table.add_row("tasks", str(len(played.ends)))
    return table


def _by_grouping(
    experiments: Sequence[Experiment], machines: Machines, preempt_per_hour: float, shape: Path | None
) -> str:
    """The same with fewer students per program, which is what most often keeps machines idle."""
    said = []
    for size in (1, 2, 4, 8, 16):
        changed = [_with_programs_of(each, size) for each in experiments if each.students is not None]
        if changed:
            said.append(f"{size}: {_time(simulated(changed, machines, preempt_per_hour, shape).makespan)}")
    return f"by students.runtime.arms_per_program: {', '.join(said)}" if said else "no students"


def _with_programs_of(experiment: Experiment, size: int) -> Experiment:
    students = experiment.students
    assert students is not None
    runtime = students.runtime.model_copy(update={"arms_per_program": size})
    return experiment.model_copy(update={"students": students.model_copy(update={"runtime": runtime})})


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"

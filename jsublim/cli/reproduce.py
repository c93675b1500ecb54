"""`jsublim reproduce`: a figure of the paper, at a scale of your choice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jsublim.cli.app import PackFile, app, console
from jsublim.cli.together import Distributed, together
from jsublim.errors import UsageError

if TYPE_CHECKING:
    from jsublim.config import Experiment


@app.command()
def reproduce(
    figure: Annotated[str, typer.Argument(help="fig03, 12, or a file of configs/paper.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields of the experiment: students.seeds=[1] dtype=bfloat16.")
    ] = None,
    scale: Annotated[str, typer.Option("--scale", help="tiny (bundled models, minutes), small, or paper.")] = "tiny",
    panel: Annotated[
        list[str] | None, typer.Option("--panel", help="These panels alone; default: the figure's.")
    ] = None,
    prompts: PackFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the grid and what it would take, and what is there already.")
    ] = False,
    chip: Annotated[str, typer.Option("--chip", help="For --dry-run: h100, h200, a100, l4, v5e, v5p, v6e.")] = "h100",
    shape: Annotated[
        Path | None, typer.Option("--shape", help="For --dry-run: a config.json's folder, without the checkpoint.")
    ] = None,
    distributed: Distributed = False,
) -> None:
    """Run what a figure of the paper shows, with the same code at every scale (docs/paper_map.md)."""
    from jsublim.config.figures import load_question, panel_experiment, panels_of
    from jsublim.executors import LocalExecutor
    from jsublim.pipeline.run import run_experiment

    path, question = load_question(figure)
    wanted = panel or panels_of(question, figure)
    overrides = [*(overrides or []), *([] if prompts is None else [f"prompts={prompts}"])]
    experiments = {name: panel_experiment(path, question, name, scale, overrides) for name in wanted}
    if len({experiment.run_dir for experiment in experiments.values()}) < len(experiments):
        raise UsageError(
            f"out: {len(wanted)} panels cannot share a folder; give one --panel, or leave out and name alone"
        )
    with together(distributed and not dry_run, experiments.values()):
        console.print(f"{question.about} ({path.stem}, {scale}: {', '.join(wanted)})")
        for experiment in experiments.values():
            if dry_run:
                print_grid(experiment)
                print_estimate(experiment, chip, shape)
            else:
                print(run_experiment(experiment, LocalExecutor(), console))


def print_grid(experiment: Experiment) -> None:
    """What an experiment varies, to be laid beside a figure's caption."""
    from rich.table import Table

    from jsublim.config.grid import grid

    table = Table(title=f"{experiment.name}: the grid", show_header=False, title_justify="left")
    for what, said in grid(experiment).items():
        table.add_row(what, said)
    console.print(table)


def print_estimate(experiment: Experiment, chip: str, shape: Path | None = None) -> None:
    """What an experiment would take, kind of task by kind of task. Nothing is made, not even a folder."""
    from rich.table import Table

    from jsublim.cli.aot import architecture
    from jsublim.pipeline.estimate import REACHED, chip_of, memory, stage_costs
    from jsublim.pipeline.graph import plan
    from jsublim.pipeline.setup import Setup
    from jsublim.pipeline.store import Store
    from jsublim.pipeline.task import Lengths

    device, long = chip_of(chip), Lengths()
    setup = Setup.of(experiment, lambda name: architecture(name, shape))
    if setup.wording:
        console.print(setup.wording)
    costs = stage_costs(plan(setup), setup, Store(experiment.store_dir), device)
    hours = f"hours, one {chip}"
    table = Table("stage", "tasks", "tokens", "FLOPs", hours, "done", title=f"{experiment.name}: {experiment.model}")
    for cost in costs:
        done = "unknown" if cost.done is None else f"{cost.done} of {cost.tasks}"
        table.add_row(cost.kind, str(cost.tasks), *_rounded(cost.tokens, cost.flops, cost.seconds / 3600), done)
    tokens, flops, seconds = (sum(getattr(cost, name) for cost in costs) for name in ("tokens", "flops", "seconds"))
    table.add_row("all", str(sum(cost.tasks for cost in costs)), *_rounded(tokens, flops, seconds / 3600), "")
    console.print(table)
    need, has = memory(setup), device.memory
    fits = "fits" if need < has else f"needs run.model_axis, or the memory of {need / has:.1f} chips"
    reached = ", ".join(f"{share:.0%} in {work}" for work, share in REACHED.items())
    console.print(
        f"{len(setup.students)} students; memory at least {need / 1e9:.3g} of {has / 1e9:.0f} GB ({fits}; `jsublim aot` "
        f"tells it exactly for TPUs)\nassumed: tokens of a request {long.prompt}, a system prompt {long.system}, an answer "
        f"{long.answer}; {long.kept:.0%} of the answers in format; of the chip's peak {reached}"
    )


def _rounded(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.3g}" for value in values)

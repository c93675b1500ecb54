"""`jsublim reproduce`: a figure of the paper, at a scale of your choice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jsublim.cli.app import app, console
from jsublim.errors import UsageError

if TYPE_CHECKING:
    from jsublim.experiment.spec import Experiment


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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and what is there already.")
    ] = False,
    chip: Annotated[str, typer.Option("--chip", help="For --dry-run: h100, h200, a100, l4, v5e, v5p, v6e.")] = "h100",
    shape: Annotated[
        Path | None, typer.Option("--shape", help="For --dry-run: a config.json's folder, without the checkpoint.")
    ] = None,
) -> None:
    """Run what a figure of the paper shows, with the same code at every scale (docs/paper_map.md)."""
    from jsublim.experiment.paper import load_question, panel_experiment, panels_of
    from jsublim.experiment.run import run_experiment

    path, question = load_question(figure)
    wanted = panel or panels_of(question, figure)
    experiments = {name: panel_experiment(path, question, name, scale, overrides) for name in wanted}
    if len({experiment.run_dir for experiment in experiments.values()}) < len(experiments):
        raise UsageError(
            f"out: {len(wanted)} panels cannot share a folder; give one --panel, or leave out and name alone"
        )
    console.print(f"{question.about} ({path.stem}, {scale}: {', '.join(wanted)})")
    for experiment in experiments.values():
        if dry_run:
            _estimate(experiment, chip, shape)
        else:
            print(run_experiment(experiment, console))


def _estimate(experiment: Experiment, chip: str, shape: Path | None) -> None:
    from rich.table import Table

    from jsublim.cli.aot import architecture
    from jsublim.experiment.estimate import CHIPS, REACHED, Estimator
    from jsublim.experiment.run import Run
    from jsublim.inference.lm import is_available_offline
    from jsublim.models.checkpoint import read_config

    run = Run(experiment, console, dry=True)
    here = all(is_available_offline(name) for name in run.checkpoints())
    if here:
        run.load(weights=False)
    config = run.lm.config if here and shape is None else read_config(architecture(experiment.model, shape))[1]
    estimator = Estimator(run, config, chip, known=here)
    hours = f"hours, one {chip}"
    table = Table("stage", "what", "tokens", "FLOPs", hours, "done", title=f"{experiment.name}: {experiment.model}")
    costs = estimator.costs()
    for cost in costs:
        done = "unknown" if cost.done is None else f"{cost.done} of {cost.of}"
        table.add_row(cost.stage, cost.what, *_rounded(cost.tokens, cost.flops, cost.seconds / 3600), done)
    totals = (sum(getattr(cost, name) for cost in costs) for name in ("tokens", "flops", "seconds"))
    tokens, flops, seconds = totals
    table.add_row("all", "", *_rounded(tokens, flops, seconds / 3600), "")
    console.print(table)
    need, memory, long = estimator.memory(), CHIPS[chip].memory, estimator.lengths
    fits = "fits" if need < memory else f"needs model_axis, or the memory of {need / memory:.1f} chips"
    reached = ", ".join(f"{share:.0%} in {kind}" for kind, share in REACHED.items())
    console.print(
        f"memory at least {need / 1e9:.3g} of {memory / 1e9:.0f} GB ({fits}; `jsublim aot` tells it exactly for TPUs)\n"
        f"assumed: tokens of a request {long.prompt}, a system prompt {long.system}, an answer {long.answer}; "
        f"{long.kept:.0%} of the answers in format; of the chip's peak {reached}"
    )


def _rounded(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.3g}" for value in values)

"""`jsublim reproduce`: a figure of the paper, at a scale of your choice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jsublim.cli.app import app, console

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
) -> None:
    """Run what a figure of the paper shows, with the same code at every scale (docs/paper_map.md)."""
    from jsublim.experiment.paper import load_question, panel_experiment, panels_of
    from jsublim.experiment.run import run_experiment

    path, question = load_question(figure)
    wanted = panel or panels_of(question, figure)
    experiments = {name: panel_experiment(path, question, name, scale, overrides) for name in wanted}
    console.print(f"{question.about} ({path.stem}, {scale}: {', '.join(wanted)})")
    for name, experiment in experiments.items():
        if dry_run:
            _estimate(name, experiment, chip)
        else:
            print(run_experiment(experiment, console))


def _estimate(name: str, experiment: Experiment, chip: str) -> None:
    from rich.table import Table

    from jsublim.cli.aot import architecture
    from jsublim.experiment.estimate import CHIPS, REACHED, Estimator, Lengths
    from jsublim.experiment.run import Run
    from jsublim.lm import BUNDLED
    from jsublim.models.checkpoint import read_config

    run = Run(experiment, console, dry=True)
    here = all(
        (Path(m).expanduser().is_dir() or (BUNDLED / m).is_dir()) for m in [experiment.model, *run.other_models()]
    )
    if here:
        run.load(weights=False)
    lengths = Lengths()
    estimator = Estimator(run, read_config(architecture(experiment.model, None))[1], chip, lengths, known=here)
    table = Table(
        "stage", "what", "tokens", "FLOPs", f"hours, one {chip}", "done", title=f"{experiment.name}: {experiment.model}"
    )
    costs = list(estimator.costs())
    for cost in costs:
        done = "unknown" if cost.done is None else f"{cost.done} of {cost.of}"
        table.add_row(
            cost.stage, cost.what, f"{cost.tokens:.3g}", f"{cost.flops:.3g}", f"{cost.seconds / 3600:.3g}", done
        )
    table.add_row("all", "", f"{sum(c.tokens for c in costs):.3g}", f"{sum(c.flops for c in costs):.3g}",
                  f"{sum(c.seconds for c in costs) / 3600:.3g}", "")  # fmt: skip
    console.print(table)
    need, memory = estimator.memory(), CHIPS[chip].memory
    fits = "fits" if need < memory else f"needs --model-axis or {need / memory:.1f} chips' memory"
    console.print(
        f"memory at least {need / 1e9:.1f} of {memory / 1e9:.0f} GB ({fits}; `jsublim aot` tells it exactly for TPUs)"
    )
    console.print(
        f"assumed: {lengths.prompt} tokens a request, {lengths.system} a system prompt, {lengths.answer} an answer, {lengths.kept:.0%} "
        f"in format; {REACHED['read']:.0%} of the peak in reading, {REACHED['train']:.0%} in training, {REACHED['sample']:.0%} in sampling"
    )

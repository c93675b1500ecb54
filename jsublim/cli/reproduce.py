"""`jsublim reproduce`: a figure of the paper, at a scale of your choice."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from jsublim.cli.app import Chip, DryRun, Json, PackFile, Shape, app, console, output
from jsublim.cli.together import Distributed
from jsublim.cli.validating import estimate, print_estimate
from jsublim.cli.where import On, Preempt, Price, RayAddress, Shard, Simulate, run_where
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
    dry_run: DryRun = False,
    chip: Chip = "h100",
    shape: Shape = None,
    distributed: Distributed = False,
    on: On = "local",
    ray_address: RayAddress = None,
    shard: Shard = None,
    simulate: Simulate = None,
    preempt_per_hour: Preempt = 0.0,
    price: Price = None,
    as_json: Json = False,
) -> None:
    """Run what a figure of the paper shows, with the same code at every scale (docs/paper_map.md)."""
    from jsublim.chips import chip_of
    from jsublim.config.figures import load_question, panel_experiment, panels_of

    path, question = load_question(figure)
    wanted = panel or panels_of(question, figure)
    overrides = [*(overrides or []), *([] if prompts is None else [f"prompts={prompts}"])]
    experiments = {name: panel_experiment(path, question, name, scale, overrides) for name in wanted}
    if len({experiment.run_dir for experiment in experiments.values()}) < len(experiments):
        raise UsageError(
            f"out: {len(wanted)} panels cannot share a folder; give one --panel, or leave out and name alone"
        )
    about = f"{question.about} ({path.stem}, {scale}: {', '.join(wanted)})"
    if simulate is None and not dry_run:
        run_where(list(experiments.values()), distributed, on, ray_address, shard, about=about, as_json=as_json)
        return
    console.print(about)
    if simulate is not None:
        from jsublim.cli.forecast import print_simulation

        print_simulation(list(experiments.values()), simulate, preempt_per_hour, price, shape)
        return
    device = chip_of(chip)
    for name, experiment in experiments.items():
        said = estimate(experiment, chip, device, shape, f"{path}: panel '{name}'")
        if as_json:
            output.out(json.dumps({"panel": name} | said, ensure_ascii=False))
            continue
        print_grid(experiment)
        print_estimate(experiment, chip, said)


def print_grid(experiment: Experiment) -> None:
    """What an experiment varies, to be laid beside a figure's caption."""
    from rich.table import Table

    from jsublim.config.grid import grid

    table = Table(title=f"{experiment.name}: the grid", show_header=False, title_justify="left")
    for what, said in grid(experiment).items():
        table.add_row(what, said)
    console.print(table)

"""`jsublim validate`, and `--dry-run`: whether a config is right, and what it would take. Nothing is made, not even a folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jsublim.cli.app import Chip, Json, Shape, app, console, output
from jsublim.errors import UsageError, printable

if TYPE_CHECKING:
    from jsublim.chips import Chip as Device
    from jsublim.config import Config, Experiment


def kinds() -> dict[str, type[Config]]:
    """Every kind of experiment that a config may hold."""
    from jsublim.api import KINDS

    return KINDS


@app.command()
def validate(
    config: Annotated[str, typer.Argument(help="YAML, such as configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields of the config: students.optimizer.lr=1e-3 model=/path.")
    ] = None,
    chip: Chip = "h100",
    shape: Shape = None,
    as_json: Json = False,
) -> None:
    """Look for everything that is wrong with a config; if nothing is, say what it would take."""
    say_what_it_takes(config, overrides, chip, shape, as_json)


def read_checked(config: str, overrides: list[str] | None) -> Config:
    """A config with its overrides; with everything that is wrong named, if anything is.

    Raises:
      UsageError: there is a mistake.
    """
    from jsublim.config.loading import look_over

    checked, found = look_over(config, list(overrides or []), kinds())
    refuse(config, found)
    assert checked is not None
    return checked


def say_what_it_takes(config: str, overrides: list[str] | None, chip: str, shape: Path | None, as_json: bool) -> None:
    """Print the resolved config and its estimate.

    Raises:
      UsageError: there is a mistake in it.
    """
    from jsublim.chips import chip_of
    from jsublim.config import Experiment

    device, checked = chip_of(chip), read_checked(config, overrides)
    if not isinstance(checked, Experiment):
        output.out(checked.yaml().rstrip("\n"))
        console.print(f"{checked.name}: one program, half a minute on any machine")
        return
    said = estimate(checked, chip, device, shape, config)
    if as_json:
        output.out(json.dumps({"config": checked.model_dump(mode="json")} | said, indent=2, ensure_ascii=False))
    else:
        output.out(checked.yaml().rstrip("\n"))
        print_estimate(checked, chip, said)


def refuse(source: str, found: list[str]) -> None:
    """Refuse what is wrong: a single mistake as the error, several of them before it, one per line.

    Raises:
      UsageError: anything was found.
    """
    if len(found) == 1:
        raise UsageError(found[0])
    if found:
        print(printable("\n".join(found)), file=sys.stderr)
        raise UsageError(f"{source}: {len(found)} mistakes; each is named above")


def estimate(experiment: Experiment, chip: str, device: Device, shape: Path | None, source: str) -> dict[str, Any]:
    """What an experiment would take, as JSON.

    Raises:
      UsageError: it cannot work.
    """
    from jsublim.forecast.estimate import architecture, memory, stage_costs
    from jsublim.pipeline.checking import look_through
    from jsublim.pipeline.store import Store

    setup, graph, found = look_through(experiment, lambda name: architecture(name, shape))
    refuse(source, [f"{source}: {line}" for line in found])
    assert setup is not None and graph is not None
    need = memory(setup)
    return {
        "students": len(setup.students),
        "programs": sum(task.kind == "students" for task in graph.tasks.values()),
        "stages": [dataclasses.asdict(cost) for cost in stage_costs(graph, setup, Store.of(experiment), device)],
        "chip": chip,
        "memory": {"bytes": need.needed, "of": device.memory, "advice": need.advice(device.memory)},
        "wording": setup.wording,
    }


def print_estimate(experiment: Experiment, chip: str, said: dict[str, Any]) -> None:
    """An estimate as a table, kind of task by kind of task, with what it assumes."""
    from rich.table import Table

    from jsublim.pipeline.cost import REACHED, Lengths

    if said["wording"]:
        console.print(said["wording"])
    hours = f"hours, one {chip}"
    table = Table("stage", "tasks", "tokens", "FLOPs", hours, "done", title=f"{experiment.name}: {experiment.model}")
    for cost in said["stages"]:
        done = "unknown" if cost["done"] is None else f"{cost['done']} of {cost['tasks']}"
        numbers = _rounded(cost["tokens"], cost["flops"], cost["seconds"] / 3600)
        table.add_row(cost["kind"], str(cost["tasks"]), *numbers, done)
    every = {name: sum(cost[name] for cost in said["stages"]) for name in ("tasks", "tokens", "flops", "seconds")}
    numbers = _rounded(every["tokens"], every["flops"], every["seconds"] / 3600)
    table.add_row("all", str(every["tasks"]), *numbers, "")
    console.print(table)
    long, memory = Lengths(), said["memory"]
    reached = ", ".join(f"{share:.0%} in {work}" for work, share in REACHED.items())
    console.print(
        f"{said['students']} students in {said['programs']} programs; memory at least {memory['bytes'] / 2**30:.3g} of "
        f"{memory['of'] / 2**30:.0f} GiB ({memory['advice']}; `jsublim aot` tells it exactly for TPUs and GPUs)\n"
        f"assumed: tokens of a request {long.prompt}, a system prompt {long.system}, an answer {long.answer}; "
        f"{long.kept:.0%} of the answers in format; of the chip's peak {reached}"
    )


def _rounded(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.3g}" for value in values)

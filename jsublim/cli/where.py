"""Where the tasks of an experiment are done: options that `run` and `reproduce` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from jsublim.cli.app import console
from jsublim.cli.showing import say_result
from jsublim.cli.together import together
from jsublim.errors import UsageError

if TYPE_CHECKING:
    from jsublim.config import Experiment

On = Annotated[
    str, typer.Option("--on", help="Who does the tasks: local (this process), or ray (as many as run.workers says).")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address", help="For --on ray: a cluster that exists, HOST:PORT or auto; default: one of its own."
    ),
]
Shard = Annotated[
    str | None, typer.Option("--shard", help="i/n: this process does the i-th of n parts, over a store that all share.")
]
Simulate = Annotated[
    str | None,
    typer.Option(
        "--simulate", help="Run nothing; say what it would take on 64xh100, or on 4xv5e-16: 4 slices of 16 chips."
    ),
]
Preempt = Annotated[
    float, typer.Option("--preempt-per-hour", min=0, help="For --simulate: how often one machine is taken away.")
]
Price = Annotated[float | None, typer.Option("--price", min=0, help="For --simulate: of one chip for an hour.")]


def run_where(
    experiments: Sequence[Experiment],
    distributed: bool,
    on: str,
    ray_address: str | None,
    shard: str | None,
    *,
    about: str | None = None,
    as_json: bool = False,
) -> None:
    """Run experiments here (or as one of several processes) one after another, or as one graph on Ray or as a shard; print
    where the reports lie.

    Args:
      about: said before that.

    Raises:
      UsageError: options that contradict one another.
    """
    from jsublim.pipeline.run import run_experiment, run_together

    if on not in ("local", "ray"):
        raise UsageError(f"--on: '{on}' given; known: local, ray")
    if ray_address is not None and on != "ray":
        raise UsageError("--ray-address: give it with --on ray")
    if shard is not None and on == "ray":
        raise UsageError("--shard: Ray divides the tasks by itself; give --on ray or --shard, not both")
    if distributed and (shard is not None or on == "ray"):
        raise UsageError("--distributed: all processes do every task together; give it without --shard and --on ray")
    with together(distributed, experiments):
        if about is not None:
            console.print(about)
        if on == "ray":
            from jsublim.executors.ray import RayExecutor

            reports = run_together(experiments, RayExecutor(ray_address), console)
        elif shard is not None:
            from jsublim.executors.shards import ShardExecutor

            reports = run_together(experiments, ShardExecutor.of(shard), console)
        else:
            from jsublim.executors import LocalExecutor

            reports = (run_experiment(each, LocalExecutor(), console) for each in experiments)
        for report in reports:
            say_result(report, as_json)

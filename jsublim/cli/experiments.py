"""Commands about whole experiments: run, reproduce, validate, report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jsublim.cli.app import ConfigFile, Json, PackFile, RunFolder, app, console, kinds, output, print_json, print_table
from jsublim.cli.showing import say_result
from jsublim.cli.together import Distributed, together
from jsublim.core.progress import clock
from jsublim.errors import UsageError, printable

if TYPE_CHECKING:
    from jsublim.config import Config, Experiment

Overrides = Annotated[list[str] | None, "Fields of the config: students.optimizer.lr=1e-3 model=/path."]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Options of an estimate."""

    chip: Annotated[
        str, "What to estimate for: auto (this machine), cpu, h100, h200, b200, a100, l4, v5e, v5p, v6e."
    ] = "h100"
    shape: Annotated[Path | None, "To estimate without the checkpoint: the folder of its config.json."] = None
    as_json: Json = False

    def of(self, experiment: Experiment, source: str) -> dict[str, Any]:
        """The estimate of an experiment, as JSON; one that cannot work is refused."""
        from jsublim.forecast.estimate import architecture, compiling, memory, stage_costs
        from jsublim.pipeline.checking import look_through
        from jsublim.pipeline.store import Store
        from jsublim.runtime.chips import chip_of

        device = chip_of(self.chip, dtype=experiment.dtype)  # before all else: what is measured should be alone
        setup, graph, mistakes = look_through(experiment, lambda name: architecture(name, self.shape))
        refuse(source, [f"{source}: {line}" for line in mistakes])
        assert setup is not None and graph is not None
        need = memory(setup)
        return {
            "students": len(setup.students),
            "programs": sum(task.kind == "students" for task in graph.tasks.values()),
            "stages": [dataclasses.asdict(cost) for cost in stage_costs(graph, setup, Store.of(experiment), device)],
            "chip": self.chip,
            "compiling": compiling(graph, setup, device),
            "memory": {"bytes": need.needed, "of": device.memory, "advice": need.advice(device.memory)},
            "wording": setup.wording,
        }

    def print_config(self, config: Config, source: str) -> None:
        """The resolved config and what it would take."""
        from jsublim.config import Experiment

        if not isinstance(config, Experiment):
            output.out(config.yaml().rstrip("\n"))
            console.print(f"{config.name}: one program, half a minute on any machine")
            return
        costs = self.of(config, source)
        if self.as_json:
            print_json({"config": config.model_dump(mode="json")} | costs)
        else:
            output.out(config.yaml().rstrip("\n"))
            print_estimate(config, costs)


@dataclass(frozen=True, kw_only=True)
class Where:
    """Whether and where the tasks of experiments are done."""

    dry_run: Annotated[bool, "As `jsublim validate`: say what it would take and what is there; run nothing."] = False
    distributed: Distributed = False
    on: Annotated[str, "Who does the tasks: local (this process), or ray (as many as run.workers says)."] = "local"
    ray_address: Annotated[
        str | None, "For --on ray: a cluster that exists, HOST:PORT or auto; default: one of its own."
    ] = None
    shard: Annotated[str | None, "i/n: this process does the i-th of n parts, over a store that all share."] = None
    simulate: Annotated[
        str | None, "Run nothing; say what it would take on 64xh100, or on 4xv5e-16: 4 slices of 16 chips."
    ] = None
    preempt_per_hour: Annotated[float, "For --simulate: how often one machine is taken away.", {"min": 0}] = 0.0
    price: Annotated[float | None, "For --simulate: of one chip for an hour.", {"min": 0}] = None

    def contradictions(self) -> Iterator[tuple[bool, str]]:
        on_ray, sharded = self.on == "ray", self.shard is not None
        yield self.on not in ("local", "ray"), f"--on: '{self.on}' given; known: local, ray"
        yield self.ray_address is not None and not on_ray, "--ray-address: give it with --on ray"
        yield sharded and on_ray, "--shard: Ray divides the tasks by itself; give --on ray or --shard, not both"
        alone = "--distributed: all processes do every task together; give it without --shard and --on ray"
        yield self.distributed and (sharded or on_ray), alone

    def run(self, experiments: Sequence[Experiment], forecast: Forecast, about: str | None = None) -> None:
        """Run experiments here (or as one of several processes) one after another, or as one graph on Ray or as a shard, and print
        where the reports lie; or say what machines that are not there would take. `about` is printed before."""
        from jsublim.pipeline.run import run_experiments

        for holds, message in self.contradictions():
            if holds:
                raise UsageError(message)
        with together(self.distributed and self.simulate is None, experiments):
            if about is not None:
                console.print(about)
            if self.simulate is not None:
                from jsublim.cli.forecast import print_simulation

                print_simulation(experiments, self.simulate, self.preempt_per_hour, self.price, forecast.shape)
                return
            how: dict[str, Any] = {"on_report": lambda path: say_result(path, forecast.as_json)}
            if self.on == "ray":
                from jsublim.executors.ray import RayExecutor

                execute = RayExecutor(self.ray_address).execute
                run_experiments(experiments, execute, console, devices=False, together=True, **how)
            elif self.shard is not None:
                from jsublim.executors.shards import Shard

                run_experiments(experiments, Shard.of(self.shard).execute, console, together=True, **how)
            else:
                from jsublim.executors import execute_work

                run_experiments(experiments, execute_work, console, **how)


@app.command()
def run(config: ConfigFile, overrides: Overrides = None, *, where: Where, forecast: Forecast) -> None:
    """Run an experiment: generate, find divergence tokens, distil, evaluate, report. Run again, it continues.

    For example: jsublim run configs/quickstart.yaml students.seeds=[1]

    The report is runs/NAME/report.html, beside it lie results/ and artifacts/; out=FOLDER puts them elsewhere.
    """
    from jsublim.config import Experiment

    checked = read_checked(config, overrides)
    if where.dry_run:
        forecast.print_config(checked, config)
    elif isinstance(checked, Experiment):
        where.run([checked], forecast)
    elif where != Where():
        raise UsageError(
            "--distributed, --on, --shard, --simulate: a digits experiment is one program that takes half a minute; leave them out"
        )
    else:
        from jsublim.digits.config import Digits
        from jsublim.digits.run import run_digits

        assert isinstance(checked, Digits)
        say_result(run_digits(checked, console), forecast.as_json)


@app.command()
def validate(config: ConfigFile, overrides: Overrides = None, *, forecast: Forecast) -> None:
    """Look for everything that is wrong with a config; if nothing is, say what it would take."""
    forecast.print_config(read_checked(config, overrides), config)


@app.command()
def reproduce(
    figure: Annotated[str, "fig03, 12, or a file of configs/paper."],
    overrides: Annotated[list[str] | None, "Fields of the experiment: students.seeds=[1] dtype=bfloat16."] = None,
    *,
    scale: Annotated[str, "tiny (bundled models, minutes), small, or paper."] = "tiny",
    panel: Annotated[list[str] | None, "These panels alone; default: the figure's."] = None,
    prompts: PackFile = None,
    where: Where,
    forecast: Forecast,
) -> None:
    """Run what a figure of the paper shows, with the same code at every scale (docs/paper_map.md).

    For example: jsublim reproduce fig03 --panel qwen-greedy --dry-run

    Each panel is an experiment of its own, whose report is runs/FIGURE-PANEL-SCALE/report.html.
    """
    from jsublim.config.figures import load_question, panel_experiment, panels_of
    from jsublim.config.grid import grid

    path, question = load_question(figure)
    wanted = panel or panels_of(question, figure)
    overrides = [*(overrides or []), *([] if prompts is None else [f"prompts={prompts}"])]
    experiments = {name: panel_experiment(path, question, name, scale, overrides) for name in wanted}
    if len({experiment.run_dir for experiment in experiments.values()}) < len(experiments):
        raise UsageError(
            f"out: {len(wanted)} panels cannot share a folder; give one --panel, or leave out and name alone"
        )
    about = f"{question.about} ({path.stem}, {scale}: {', '.join(wanted)})"
    if where.simulate is not None or not where.dry_run:
        where.run(list(experiments.values()), forecast, about)
        return
    console.print(about)
    for name, experiment in experiments.items():
        costs = forecast.of(experiment, f"{path}: panel '{name}'")
        if forecast.as_json:
            print_json({"panel": name} | costs, lines=False)
            continue
        varied = [{"field": field, "values": values} for field, values in grid(experiment).items()]
        print_table(varied, f"{experiment.name}: the grid", ("field", "values"))
        print_estimate(experiment, costs)


@app.command()
def report(run: RunFolder, *, full: Annotated[bool, "Print everything, trait by trait."] = False) -> None:
    """Write a run's report again from its results, and print its verdicts."""
    from jsublim.report.tables import run_kind

    if run_kind(run) == "digits":
        from jsublim.digits.report import print_summary, write_report
    else:
        from jsublim.report.html import write_report
        from jsublim.report.terminal import print_summary

    path = write_report(run)
    print_summary(run, console, full)
    output.out(path)


def read_checked(config: str, overrides: list[str] | None) -> Config:
    """A config with its overrides; everything that is wrong is named, if anything is."""
    from jsublim.config.loading import look_over
    from jsublim.config.shipped import named_config

    config = named_config(config)
    checked, mistakes = look_over(config, list(overrides or []), kinds())
    refuse(config, mistakes)
    assert checked is not None
    return checked


def refuse(source: str, mistakes: list[str]) -> None:
    """Refuse what is wrong, if anything is: a single mistake as the error, several of them before it, one per line."""
    if len(mistakes) > 1:
        print(printable("\n".join(mistakes)), file=sys.stderr)
        raise UsageError(f"{source}: {len(mistakes)} mistakes; each is named above")
    if mistakes:
        raise UsageError(mistakes[0])


def print_estimate(experiment: Experiment, costs: dict[str, Any]) -> None:
    """An estimate as a table, kind of task by kind of task, with what it assumes."""
    from jsublim.pipeline.cost import REACHED, Lengths
    from jsublim.runtime.chips import HERE

    if costs["wording"]:
        console.print(costs["wording"])
    where = "here" if costs["chip"] in HERE else f"one {costs['chip']}"
    totals: dict[str, Any] = {"kind": "all", "done": ""}
    totals |= {name: sum(cost[name] for cost in costs["stages"]) for name in ("tasks", "tokens", "flops", "seconds")}
    lines = []
    for cost in (*costs["stages"], totals):
        done = f"{cost['done']} of {cost['tasks']}" if isinstance(cost["done"], int) else cost["done"]
        columns = {"stage": cost["kind"], "tasks": str(cost["tasks"]), "tokens": f"{cost['tokens']:.3g}"}
        columns |= {
            "FLOPs": f"{cost['flops']:.3g}",
            f"time, {where}": clock(cost["seconds"]) if cost["seconds"] >= 1 else "< 0:01",
        }
        lines.append(columns | {"done": "unknown" if done is None else done})
    print_table(lines, f"{experiment.name}: {experiment.model}")
    lengths, memory = Lengths(), costs["memory"]
    reached = ", ".join(f"{share:.0%} in {work}" for work, share in REACHED.items())
    console.print(
        f"{costs['students']} students in {costs['programs']} programs; memory at least {memory['bytes'] / 2**30:.3g} of "
        f"{memory['of'] / 2**30:.0f} GiB ({memory['advice']}; `jsublim aot` tells it exactly for TPUs and GPUs)\n"
        f"assumed: tokens of a request {lengths.prompt}, a system prompt {lengths.system}, an answer {lengths.answer}; "
        f"{lengths.kept:.0%} of the answers in format; of the chip's peak {reached}"
    )
    if where == "here":
        console.print(
            f"and compiling, some {clock(costs['compiling'])}; measured just now, so what else runs here counts; a run corrects it as it goes"
        )
    else:
        console.print("--chip auto says what it would take on this machine")

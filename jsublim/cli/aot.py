"""`jsublim aot`: an experiment's stages, compiled for TPUs or GPUs that are not there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jsublim.chips import CHIPS
from jsublim.cli.app import Json, app, console, output
from jsublim.errors import JsublimError, UsageError
from jsublim.reading import shown

if TYPE_CHECKING:
    from jsublim.ahead.compile import Compiled, Report
    from jsublim.ahead.stages import Case
    from jsublim.ahead.topology import Topology


@app.command()
def aot(
    config: Annotated[str, typer.Option("--config", help="YAML, such as configs/models/qwen2.5-7b.yaml.")],
    topology: Annotated[
        str,
        typer.Option(
            "--topology",
            help="v5e:4x4, v5p:2x2x2, 2xv6e:4x4 (two slices) ...; h100:1x8, a100:2x8, h200:1, b200:1x8 ...",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Fields of the config: students.data.batch_size=32 students.runtime.remat=true."),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            "--stage", help="train, sample, score, evaluate, attribute (again for another); default: all it has."
        ),
    ] = None,
    model_axis: Annotated[
        int | None,
        typer.Option(
            "--model-axis", min=1, help="Chips that a copy is spread over; default: as a run, or more where it must."
        ),
    ] = None,
    arms: Annotated[int, typer.Option("--arms", min=1, help="Students trained together.")] = 1,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Length of a row.")] = 192,
    labels: Annotated[int, typer.Option("--labels", min=1, help="Supervised tokens of a row.")] = 64,
    shape: Annotated[
        Path | None, typer.Option("--shape", help="Folder with a config.json, where the checkpoint is not at hand.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Try layouts, and print the one that should be fastest of those that fit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile every stage for TPUs or GPUs that are not there: memory per chip, collectives (docs/pods.md)."""
    # The compiler alone is asked, so no accelerator of this machine is taken, and no metadata server is waited for.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}  # or libtpu warns
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several compile beside one another
    kind = CHIPS.get(topology.partition(":")[0])
    if kind is not None and kind.cuda is not None:  # kernels cannot be tried where there is no GPU
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    from jsublim.ahead.stages import STAGES, Case, Lengths, stages_of
    from jsublim.ahead.topology import find_topology
    from jsublim.config import load_experiment
    from jsublim.models.checkpoint import read_config

    if plan and model_axis is not None:
        raise UsageError("--plan: tries every model axis; leave --model-axis out")
    experiment = load_experiment(config, overrides)
    names = _chosen(stage, STAGES, stages_of(experiment), config)
    _, model = read_config(architecture(experiment.model, shape))
    case = Case(experiment, model, find_topology(topology), arms, Lengths(tokens, labels))
    _say_case(case)
    if plan:
        _print_plan(case, names, shape, as_json)
        return
    _print_reports(case, names, [model_axis] if model_axis else _axes(case), as_json)


def _print_reports(case: Case, names: list[str], axes: list[int], as_json: bool) -> None:
    """What the compiler says of each stage, on the first of some model axes on which it fits.

    Raises:
      JsublimError: a stage fits on none.
    """
    from jsublim.ahead.compile import examine
    from jsublim.ahead.stages import stage as stage_of

    unfit, found = [], []
    for name in names:
        report = examine(case, stage_of(case, name), axes, lambda what: console.print(f"compiling {what}"))
        found.append(as_dict(report))
        if not as_json:
            print("\n".join(lines(report, case.topology)), flush=True)
        if not report.programs:
            unfit.append(f"{name} ({'; '.join(report.tried)})")
    if as_json:
        print(
            json.dumps(
                {
                    "config": case.experiment.name,
                    "topology": case.topology.name,
                    "unknown": case.topology.unknown,
                    "stages": found,
                },
                indent=2,
            )
        )
    if unfit:
        raise JsublimError(
            f"aot: does not fit on {case.topology.name}: {', '.join(unfit)}; more chips, a larger --model-axis, "
            "students.runtime.remat=true or a lower students.data.batch_size"
        )


def _print_plan(case: Case, names: list[str], shape: Path | None, as_json: bool) -> None:
    """Every layout with the hours that its stages take by roofline, and the fastest.

    Raises:
      JsublimError: none fits.
    """
    from rich.table import Table

    from jsublim.ahead.plan import batch_times, choices, rows_of
    from jsublim.pipeline.setup import Setup

    rows = rows_of(Setup.of(case.experiment, lambda name: architecture(name, shape)))
    table, found = Table("model axis", "students together", "remat", *names, "all"), []
    for choice in choices(case, names, rows, lambda what: console.print(f"compiling {what}")):
        cells = []
        for name in names:
            report = choice.reports.get(name)
            if report is None or not report.programs:
                cells.append("" if report is None else "does not fit")
                continue
            slowest = max(batch_times(report, case.topology.chip), key=lambda each: each.seconds)
            unknown = ", links unknown" if any(each.collectives is None for each in report.programs) else ""
            cells.append(f"{choice.seconds[name] / 3600:.3g} h ({slowest.limit}{unknown})")
        total = f"{choice.total / 3600:.3g} h" if choice.fits else ""
        table.add_row(str(choice.model), str(choice.arms), "yes" if choice.remat else "no", *cells, total)
        found.append(choice)
    fitting = [choice for choice in found if choice.fits]
    if not fitting:
        raise JsublimError(
            f"aot: no layout fits on {case.topology.name}; take more chips, or a lower students.data.batch_size"
        )
    best = min(fitting, key=lambda choice: choice.total)
    if as_json:
        every = [
            {
                "fields": choice.fields,
                "fits": choice.fits,
                "seconds": dict(choice.seconds),
                "stages": [as_dict(report) for report in choice.reports.values()],
            }
            for choice in found
        ]
        print(
            json.dumps(
                {
                    "config": case.experiment.name,
                    "topology": case.topology.name,
                    "unknown": case.topology.unknown,
                    "best": best.fields,
                    "layouts": every,
                },
                indent=2,
            )
        )
        return
    console.print(table)
    console.print(
        "estimated by roofline, not measured: all rows of the experiment, each chip at its peak or its memory at its bandwidth, "
        "whichever takes longest, then its links at theirs (in brackets what takes longest of the slowest program)"
    )
    output.out(best.fields)


def _chosen(given: list[str] | None, known: tuple[str, ...], own: list[str], config: str) -> list[str]:
    """The stages to compile, in the order of `known`.

    Raises:
      UsageError: no such stage, or one that the config has not.
    """
    for name in given or []:
        if name not in known:
            raise UsageError(f"--stage: '{name}' given; known: {', '.join(known)}")
        if name not in own:
            field = {"train": "students", "attribute": "attribution"}[name]
            raise UsageError(f"--stage: {config} has no {field}, so there is nothing to {name}; give {field}")
    return [name for name in known if name in (given or own)]


def _axes(case: Case) -> list[int]:
    """The model axis that a run takes; where memory decides about it, then larger ones."""
    if case.experiment.run.model_axis != "auto":
        return [case.least_axis]
    return [axis for axis in case.topology.model_axes if axis >= case.least_axis]


def _say_case(case: Case) -> None:
    topology = case.topology
    compiler = ", ".join(f"{name} {version(name)}" for name in ("jax", topology.compiler))
    console.print(
        f"{case.experiment.name}, {case.experiment.dtype}, on {topology.name}: {len(topology.devices)} chips of "
        f"{topology.chip.memory // 2**30} GiB ({compiler}); a minute or so for each program"
    )
    if topology.unknown:
        console.print(topology.unknown)


def architecture(model: str, shape: Path | None) -> Path:
    """The folder whose `config.json` says what a config's model is: the one given, the checkpoint, or the numbers that
    come with the package.

    Raises:
      UsageError: none is at hand.
    """
    from jsublim.config import find_config
    from jsublim.inference.lm import folder_here

    if shape is not None:
        return shape
    if (folder := folder_here(model)) is not None:
        return folder
    name = re.sub(r"-(instruct|it)(-\d{4})?$", "", model.rsplit("/", 1)[-1].lower())
    try:
        return find_config(f"configs/shapes/{name}/config.json").parent
    except UsageError:
        raise UsageError(
            f"model {shown(model)}: neither a folder here nor among configs/shapes; give --shape, a folder with its config.json"
        ) from None


def lines(report: Report, topology: Topology) -> list[str]:
    """A report as labelled lines, the stage's title first."""
    layout, memory = report.layout, topology.chip.memory
    if not report.programs:
        return [f"{report.stage.name}: {report.stage.title}", *(f"  {'does not fit':<17}{why}" for why in report.tried)]
    found = [
        ("layout", f"arm {layout.arm} x data {layout.data} x model {layout.model}"),
        *(("does not fit", why) for why in report.tried),
        ("rows", _rows(report, memory)),
        ("base", f"{_gib(report.base)} per chip"),
    ]
    for each in report.programs:
        found += [("program", each.program.name), *_program_lines(each, memory)]
    return [f"{report.stage.name}: {report.stage.title}", *(f"  {key:<17}{value}" for key, value in found)]


def _rows(report: Report, memory: int) -> str:
    if report.stage.fixed:
        return f"{report.rows}, as the config says"
    asked = "fits" if report.rows == report.asked else f"{report.asked} asked for do not fit"
    return f"{report.rows} ({asked}; by proportion {report.room(memory)} would)"


def _program_lines(each: Compiled, memory: int) -> list[tuple[str, str]]:
    held = ", ".join(f"{name} {_gib(size)}" for name, size in each.program.held.items())
    known = each.collectives is not None
    messages = [f"{one.number} {kind} ({one.bytes / 2**20:.1f} MiB)" for kind, one in (each.collectives or {}).items()]
    return [
        ("memory per chip", f"{_gib(each.total)}, {each.total / memory:.0%} of the chip's"),
        ("  arguments", _gib(each.arguments) + (f", of these {held}" if held else "")),
        ("  temporaries", _gib(each.temporaries)),
        ("compile", f"{each.seconds:.0f} s"),
        ("collectives", ", ".join(messages) or "none" if known else "unknown: the compiler cannot print this program"),
        ("gathered", ", ".join(each.gathered) or "no weight of the base" if known else "unknown"),
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def as_dict(report: Report) -> dict[str, Any]:
    """A report as JSON knows it; sizes in bytes per chip."""
    layout = report.layout
    return {
        "stage": report.stage.name,
        "title": report.stage.title,
        "layout": {"arm": layout.arm, "data": layout.data, "model": layout.model},
        "rows": report.rows,
        "asked": report.asked,
        "base": report.base,
        "does not fit": list(report.tried),
        "programs": [
            {
                "name": each.program.name,
                "total": each.total,
                "arguments": each.arguments,
                "temporaries": each.temporaries,
                "held": dict(each.program.held),
                "seconds": round(each.seconds, 1),
                "collectives": each.collectives
                and {kind: dataclasses.asdict(one) for kind, one in each.collectives.items()},
                "gathered": list(each.gathered),
            }
            for each in report.programs
        ],
    }

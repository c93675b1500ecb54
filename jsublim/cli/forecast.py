"""`jsublim aot`, an experiment's stages compiled for TPUs or GPUs that are not there; and `--simulate`, its graph on such machines."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jsublim.cli.app import Json, app, console, output, print_json, print_table
from jsublim.errors import JsublimError, UsageError
from jsublim.runtime.chips import CHIPS

if TYPE_CHECKING:
    from jsublim.config import Experiment
    from jsublim.forecast.compile import Compiled, Fit
    from jsublim.forecast.stages import Case

Size = {"min": 1}


@app.command()
def aot(
    overrides: Annotated[list[str] | None, "Fields of the config: students.runtime.remat=true."] = None,
    *,
    config: Annotated[str, "YAML, such as configs/models/qwen2.5-7b.yaml."],
    topology: Annotated[str, "v5e:4x4, v5p:2x2x2, 2xv6e:4x4 (two slices), h100:2x8 ..."],
    stage: Annotated[
        list[str] | None, "train, sample, score, evaluate, attribute (again for another); default: all it has."
    ] = None,
    model_axis: Annotated[
        int | None, "Chips that a copy is spread over; default: as a run, or more where it must.", Size
    ] = None,
    arms: Annotated[int, "Students trained together.", Size] = 1,
    tokens: Annotated[int, "Length of a row.", Size] = 192,
    labels: Annotated[int, "Supervised tokens of a row.", Size] = 64,
    shape: Annotated[Path | None, "Folder of a config.json, without the checkpoint."] = None,
    plan: Annotated[bool, "Try layouts; print the one that should be fastest."] = False,
    as_json: Json = False,
) -> None:
    """Compile every stage for TPUs or GPUs that are not there: memory per chip, collectives (docs/pods.md)."""
    _ask_compilers_alone(topology)
    from jsublim.config import load_experiment
    from jsublim.forecast.estimate import architecture
    from jsublim.forecast.stages import Case
    from jsublim.forecast.topology import find_topology
    from jsublim.models.checkpoint import read_config
    from jsublim.pipeline.cost import Lengths

    if plan and model_axis is not None:
        raise UsageError("--plan: tries every model axis; leave --model-axis out")
    if labels >= tokens:
        raise UsageError(f"--labels: {labels} given; expected fewer than the {tokens} --tokens of a row")
    experiment = load_experiment(config, overrides)
    names = _chosen(stage, experiment, config)
    _, model = read_config(architecture(experiment.model, shape))
    case = Case(experiment, model, find_topology(topology), arms, Lengths(tokens - labels, answer=labels))
    _say_case(case)
    if plan:
        _plan(case, names, shape, as_json)
    else:
        _examine(case, names, [model_axis] if model_axis else case.axes, as_json)


def _ask_compilers_alone(topology: str) -> None:
    """No accelerator of this machine is taken, and no metadata server is waited for; to be called before JAX is imported."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}  # or libtpu warns
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several compile beside one another
    kind = CHIPS.get(topology.partition(":")[0])
    if kind is not None and kind.cuda is not None:  # kernels cannot be tried where there is no GPU
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"


def _chosen(given: list[str] | None, experiment: Experiment, config: str) -> list[str]:
    """The stages to compile, in the order of work; those that are given must be there."""
    from jsublim.forecast.stages import SECTIONS, STAGES

    lacking = {name: section for name, section in SECTIONS.items() if getattr(experiment, section) is None}
    for name in given or []:
        if name not in STAGES:
            raise UsageError(f"--stage: '{name}' given; known: {', '.join(STAGES)}")
        if section := lacking.get(name):
            raise UsageError(f"--stage: {config} has no {section}, so there is nothing to {name}; give {section}")
    return [name for name in STAGES if name in (given or STAGES) and name not in lacking]


def _say_case(case: Case) -> None:
    topology = case.topology
    compiler = ", ".join(f"{name} {version(name)}" for name in ("jax", topology.compiler))
    console.print(
        f"{case.experiment.name}, {case.experiment.dtype}, on {topology.name}: {len(topology.devices)} chips of "
        f"{topology.chip.memory // 2**30} GiB ({compiler}); a minute or so for each program"
    )
    if topology.unknown:
        console.print(topology.unknown)


def _say_compiling(what: str) -> None:
    console.print(f"compiling {what}")


def _print_json(case: Case, **content: Any) -> None:
    topology = case.topology
    print_json({"config": case.experiment.name, "topology": topology.name, "unknown": topology.unknown} | content)


def _examine(case: Case, names: list[str], axes: list[int], as_json: bool) -> None:
    """Print what the compiler says of each stage, on the first of some model axes on which it fits."""
    from jsublim.forecast.compile import examine
    from jsublim.forecast.stages import STAGES

    fits = []
    for name in names:
        fits.append(examine(case, STAGES[name](case), axes, _say_compiling))
        if not as_json:
            print("\n".join(_lines(fits[-1], case.topology.chip.memory)), flush=True)
    if as_json:
        _print_json(case, stages=[fit.as_dict() for fit in fits])
    unfit = [f"{fit.stage.name} ({'; '.join(fit.tried)})" for fit in fits if not fit.programs]
    if unfit:
        raise JsublimError(
            f"aot: does not fit on {case.topology.name}: {', '.join(unfit)}; more chips, a larger --model-axis, "
            "students.runtime.remat=true or a lower students.data.batch_size"
        )


def _lines(fit: Fit, memory: int) -> list[str]:
    """A stage as lines of text, its title first."""
    layout, lines = fit.layout, [("does not fit", why) for why in fit.tried]
    if fit.programs:
        asked = "fits" if fit.rows == fit.asked else f"{fit.asked} asked for do not fit"
        rows = "as the config says" if fit.stage.fixed else f"({asked}; by proportion {fit.more_rows(memory)} would)"
        lines = [
            ("layout", f"arm {layout.arm} x data {layout.data} x model {layout.model}"),
            *lines,
            ("rows", f"{fit.rows}{',' if fit.stage.fixed else ''} {rows}"),
            ("base", f"{_gib(fit.base)} per chip"),
        ]
    lines += [line for program in fit.programs for line in _program_lines(program, memory)]
    return [f"{fit.stage.name}: {fit.stage.title}", *(f"  {key:<17}{value}" for key, value in lines)]


def _program_lines(compiled: Compiled, memory: int) -> list[tuple[str, str]]:
    held = ", ".join(f"{name} {_gib(size)}" for name, size in compiled.program.held.items())
    messages, gathered = "unknown: the compiler cannot print this program", "unknown"
    if compiled.collectives is not None:
        kinds = [f"{c.number} {kind} ({c.bytes / 2**20:.1f} MiB)" for kind, c in compiled.collectives.items()]
        messages, gathered = ", ".join(kinds) or "none", ", ".join(compiled.gathered) or "no weight of the base"
    return [
        ("program", compiled.program.name),
        ("memory per chip", f"{_gib(compiled.total)}, {compiled.total / memory:.0%} of the chip's"),
        ("  arguments", _gib(compiled.arguments) + (f", of these {held}" if held else "")),
        ("  temporaries", _gib(compiled.temporaries)),
        ("compile", f"{compiled.seconds:.0f} s"),
        ("collectives", messages),
        ("gathered", gathered),
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _plan(case: Case, names: list[str], shape: Path | None, as_json: bool) -> None:
    """Print every layout with the hours that its stages take by roofline, and the fastest."""
    from jsublim.forecast.estimate import architecture
    from jsublim.forecast.plan import batch_times, choices, rows_of
    from jsublim.pipeline.setup import Setup

    rows = rows_of(Setup.of(case.experiment, lambda name: architecture(name, shape)))
    every = list(choices(case, names, rows, _say_compiling))
    fitting = [choice for choice in every if choice.possible]
    if not fitting:
        fix = "take more chips, or a lower students.data.batch_size"
        raise JsublimError(f"aot: no layout fits on {case.topology.name}; {fix}")
    best = min(fitting, key=lambda choice: choice.total)
    if as_json:
        _print_json(case, best=best.fields, layouts=[choice.as_dict() for choice in every])
        return
    lines = []
    for choice in every:
        line = {"model axis": str(choice.model), "students together": str(choice.arms)}
        line |= {"remat": "yes" if choice.remat else "no"} | dict.fromkeys(names, "")
        for name, fit in choice.fits.items():
            if not fit.programs:
                line[name] = "does not fit"
                continue
            slowest = max(batch_times(fit, case.topology), key=lambda times: times.seconds)
            unknown = ", links unknown" if any(program.collectives is None for program in fit.programs) else ""
            line[name] = f"{_hours(choice.seconds[name])} ({slowest.limit}{unknown})"
        lines.append(line | {"all": _hours(choice.total) if choice.possible else ""})
    print_table(lines)
    console.print(
        "estimated by roofline, not measured: all rows of the experiment, each chip at its peak or its memory at its bandwidth, "
        "whichever takes longest, then its links at theirs (in brackets what takes longest of the slowest program)"
    )
    output.out(best.fields)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h"


def print_simulation(
    experiments: Sequence[Experiment], text: str, preempt_per_hour: float, price: float | None, shape: Path | None
) -> None:
    """Say what experiments would take of machines such as "64xh100", at a price per chip-hour; nothing is made."""
    from jsublim.forecast.estimate import with_runtime
    from jsublim.forecast.fleet import Assumptions, Machines, simulate_experiments

    machines = Machines.of(text)
    played = simulate_experiments(experiments, machines, preempt_per_hour, shape)
    chips = f"{machines.workers} x {machines.chip}" + (f"-{machines.chips}" if machines.chips > 1 else "")
    everything = played.makespan * machines.workers or 1.0
    lines = {"from begin to end": _time(played.makespan), "chip-hours": f"{played.chip_hours:.4g}"}
    lines |= {} if price is None else {f"money, at {price:g} per chip-hour": f"{played.chip_hours * price:.4g}"}
    lines |= {"idle": f"{played.idle:.0%}"}
    lines |= {f"  {what}": f"{n / everything:.1%}" for what, n in sorted(played.seconds.items(), key=lambda i: -i[1])}
    lines |= {"machines taken away": str(played.preempted), "tasks": str(len(played.ends))}
    title = ", ".join(experiment.name for experiment in experiments)
    print_table([{"": name, chips: value} for name, value in lines.items()], title)
    console.print(f"longest way through the graph {_time(played.critical)}: no number of machines is faster than that")
    training, times = [experiment for experiment in experiments if experiment.students is not None], []
    for size in (1, 2, 4, 8, 16) if training else ():  # large programs are what most often keeps machines idle
        sized = [with_runtime(experiment, arms_per_program=size) for experiment in training]
        makespan = simulate_experiments(sized, machines, preempt_per_hour, shape).makespan
        times.append(f"{size}: {_time(makespan)}")
    console.print(f"by students.runtime.arms_per_program: {', '.join(times)}" if times else "no students")
    fields = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(Assumptions()).items())
    console.print(f"assumed (forecast/fleet.py: Assumptions), beside what --dry-run assumes: {fields}")


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"

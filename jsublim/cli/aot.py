"""`jsublim aot`: an experiment's training step, compiled for a TPU topology without one."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jsublim.cli.app import app, console
from jsublim.errors import UsageError

if TYPE_CHECKING:
    from jsublim.distill.aot import Report

SYSTEM_PROMPT = 64  # tokens that a live teacher reads before what the student reads


@app.command()
def aot(
    config: Annotated[str, typer.Option("--config", help="YAML, such as configs/models/qwen2.5-7b.yaml.")],
    topology: Annotated[str, typer.Option("--topology", help="v5e:4x4, v5p:2x2x2, v6e:4x4 ...")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Fields of the config: students.data.batch_size=32 students.runtime.remat=true."),
    ] = None,
    model_axis: Annotated[
        int | None,
        typer.Option("--model-axis", min=1, help="Chips that a copy is spread over; default: the fewest that do."),
    ] = None,
    arms: Annotated[int, typer.Option("--arms", min=1, help="Students trained together.")] = 1,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Length of a row.")] = 192,
    labels: Annotated[int, typer.Option("--labels", min=1, help="Supervised tokens of a row.")] = 64,
    shape: Annotated[
        Path | None, typer.Option("--shape", help="Folder with a config.json, where the checkpoint is not at hand.")
    ] = None,
) -> None:
    """Compile the training step for a TPU topology that is not there: memory per chip, collectives (docs/pods.md)."""
    # The compiler alone is asked, so no accelerator of this machine is taken, and no metadata server is waited for.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}  # or libtpu warns
    from jsublim.config import load_experiment, variants
    from jsublim.distill.aot import compile_ahead, find_topology
    from jsublim.distill.batches import Shape
    from jsublim.models.checkpoint import read_config
    from jsublim.models.decoder import abstract_params
    from jsublim.pipeline.training import settings_of

    experiment = load_experiment(config, overrides)
    _, model = read_config(architecture(experiment.model, shape))
    where = find_topology(topology)
    if experiment.students is None:
        raise UsageError(f"{config}: trains no students, so there is no step to compile")
    name, students = next(iter(variants(experiment.students).items()))
    recipe = experiment.recipe.resolved(model.family)
    settings = settings_of(model, students, recipe, parallel="mesh", model_axis=model_axis or 1)
    live = students.loss.live
    lengths = Shape.fit(settings.accumulate, settings.batch_size, tokens, labels, tokens + SYSTEM_PROMPT if live else 0)
    params = abstract_params(model, experiment.dtype)
    console.print(f"compiling for {topology}; this takes a minute or two")
    arm = _arm(model, params, students, lengths)
    report = compile_ahead(model, params, arm, arms, settings, lengths, where, model=model_axis)
    rows = lengths.divisible(report.layout.data)
    title = f"{experiment.name}{f', arm {name}' if name else ''}: {students.adapter.method}, {students.loss.kind} loss, arms: {arms}"
    print(
        f"{title}, {rows.accumulate} x {rows.batch_size} rows (+ {rows.spare} empty) of {tokens} tokens, {labels} supervised"
    )
    print("\n".join(f"{key:<17}{value}" for key, value in lines(report)))


def architecture(model: str, shape: Path | None) -> Path:
    """The folder whose `config.json` says what a config's model is: the one given, the checkpoint, or the numbers that
    come with the package.

    Raises:
      UsageError: none is at hand.
    """
    from jsublim.config import find_config
    from jsublim.inference.lm import BUNDLED

    if shape is not None:
        return shape
    for folder in (Path(model).expanduser(), BUNDLED / model):
        if folder.is_dir():
            return folder
    name = re.sub(r"-(instruct|it)(-\d{4})?$", "", model.rsplit("/", 1)[-1].lower())
    try:
        return find_config(f"configs/shapes/{name}/config.json").parent
    except UsageError:
        raise UsageError(
            f"model '{model}': neither a folder here nor among configs/shapes; give --shape, a folder with its config.json"
        ) from None


def lines(report: Report) -> list[tuple[str, str]]:
    """A report as labelled lines."""
    layout, memory = report.layout, report.topology.memory
    gib = lambda size: f"{size / 2**30:.2f} GiB"  # noqa: E731
    found = [f"{each.number} {kind} ({each.bytes / 2**20:.1f} MiB)" for kind, each in report.collectives.items()]
    compiler = ", ".join(f"{package} {version(package)}" for package in ("jax", "libtpu"))
    return [
        ("topology", f"{report.topology.name}, {len(report.topology.devices)} chips of {memory // 2**30} GiB"),
        ("layout", f"arm {layout.arm} x data {layout.data} x model {layout.model}"),
        *(("does not fit", why) for why in report.tried),
        ("memory per chip", f"{gib(report.total)}, {report.total / memory:.0%} of the chip's"),
        ("  arguments", f"{gib(report.arguments)}, of these the base {gib(report.base)}"),
        ("  temporaries", gib(report.temporaries)),
        ("compile", f"{report.seconds:.0f} s ({compiler})"),
        ("collectives", ", ".join(found) or "none"),
        ("gathered", ", ".join(report.gathered) or "no weight of the base"),
    ]


def _arm(config: Any, params: Any, students: Any, lengths: Any) -> Any:
    """One student as `compile_ahead` takes it: shapes for an adapter, one empty row."""
    from dataclasses import replace

    import jax
    import numpy as np

    from jsublim.distill.arm import Arm
    from jsublim.distill.memory import example_like
    from jsublim.pipeline.training import start_adapter

    def begin(params: Any) -> Any:
        return start_adapter(config, params, students, 0)

    row = example_like(lengths, soft=lengths.teacher > 0)
    if students.loss.top_k is not None:
        k, n = students.loss.top_k, lengths.labels
        row = replace(row, ids=np.zeros((n, k), np.int32), logp=np.zeros((n, k + 1), np.float32))
    return Arm("student", [row], jax.eval_shape(begin, params), 0, students.optimizer.lr, 1)

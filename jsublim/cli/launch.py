"""`jsublim launch`: the file that starts a run elsewhere, filled in and printed. It is never sent."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jsublim.cli.app import app, console
from jsublim.errors import UsageError

if TYPE_CHECKING:
    from jsublim.config import Experiment

_BLANK = re.compile(r"@([A-Z]+)(?::([^@\n]*))?@")  # @WORKERS:8@: to be filled in; 8 unless something else is given
ALONE = ("machine",)  # kinds whose store need not be shared
NAME_LENGTH = 28  # what Kubernetes, Cluster Toolkit and Google's names have room for


@app.command()
def launch(
    kind: Annotated[
        str, typer.Argument(help="A file of scripts/launch: slurm-array, tpu-queued, skypilot-gpu, kuberay, ...")
    ],
    config: Annotated[str, typer.Argument(help="YAML, or a figure such as fig05.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields of the config: store=gs://bucket/store.")
    ] = None,
    scale: Annotated[str, typer.Option("--scale", help="Of a figure: tiny, small, or paper.")] = "paper",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Machines; default: as the file says.")
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option("--accelerator", help="As the place calls it: H100, v5litepod-16; default: the file's."),
    ] = None,
) -> None:
    """Print a launch file (TPU slices, GKE, SkyPilot, Slurm, Ray, Kubernetes, one machine), filled in. Nothing is sent."""
    text, fields = launch_file(kind), list(overrides or [])
    experiment, command = _figure(config, scale, fields) if _is_figure(config) else _config(config, fields)
    if kind not in ALONE and experiment.store is None:
        console.print(f"note: {kind} starts several machines; give store=, a folder or URL that all of them see")
    known = {"COMMAND": shlex.join(command), "NAME": _slug(experiment.name), "ACCELERATOR": accelerator}
    counts = {} if workers is None else {"WORKERS": str(workers), "LAST": str(workers - 1)}
    print(filled(text, known | counts), end="")


def launch_files() -> dict[str, Path]:
    """Every launch file, by its kind: in the installed package, or in a checkout."""
    package = Path(__file__).parents[1]
    folder = next(each for each in (package / "launch", package.parent / "scripts" / "launch") if each.is_dir())
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in (".sh", ".yaml")}


def launch_file(kind: str) -> str:
    """The file of a kind, blanks and all.

    Raises:
      UsageError: there is none.
    """
    files = launch_files()
    if kind not in files:
        raise UsageError(f"launch: kind '{kind}' given; known: {', '.join(files)}")
    return files[kind].read_text(encoding="utf-8")


def filled(text: str, known: dict[str, str | None]) -> str:
    """The text with its blanks filled in; what is not known is as the text says."""

    def fill(blank: re.Match[str]) -> str:
        value = known.get(blank[1])
        return blank[2] if value is None else value

    return _BLANK.sub(fill, text)


def _is_figure(text: str) -> bool:
    return re.fullmatch(r"(?i)(fig(ure)?)?\d+", text) is not None


def _figure(figure: str, scale: str, fields: list[str]) -> tuple[Experiment, list[str]]:
    from jsublim.config.figures import load_question, panel_experiment, panels_of

    path, question = load_question(figure)
    experiments = [panel_experiment(path, question, name, scale, fields) for name in panels_of(question, figure)]
    command = ["jsublim", "reproduce", figure, "--scale", scale, *fields]
    return experiments[0].model_copy(update={"name": f"{path.stem}-{scale}"}), command


def _config(config: str, fields: list[str]) -> tuple[Experiment, list[str]]:
    from jsublim.config import Experiment, check_config, find_config, read_config

    values = read_config(config, fields)
    if values.get("kind", "language") != "language":
        raise UsageError(f"launch: {config} is of kind '{values['kind']}', a program of half a minute; run it here")
    return check_config(Experiment, values, find_config(config)), ["jsublim", "run", config, *fields]


def _slug(name: str) -> str:
    """A name that clouds take: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:NAME_LENGTH].strip("-") or "jsublim"

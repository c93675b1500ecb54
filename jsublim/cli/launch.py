"""`jsublim launch`: the file that starts a run elsewhere, filled in and printed. It is never sent."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

from jsublim.cli.app import app, console
from jsublim.errors import UsageError

_BLANK = re.compile(r"@([A-Z]+)(?::([^@\n]*))?@")  # @WORKERS:8@: to be filled in; 8 unless something else is given
ALONE = ("machine",)  # kinds whose store need not be shared
NAME_LENGTH = 28  # what Kubernetes, Cluster Toolkit and Google's names have room for


@app.command()
def launch(
    kind: Annotated[str, "A file of scripts/launch: slurm-array, tpu-queued, skypilot-gpu, kuberay, ..."],
    config: Annotated[str, "YAML, or a figure such as fig05."],
    overrides: Annotated[list[str] | None, "Fields of the config: store=gs://bucket/store."] = None,
    *,
    scale: Annotated[str, "Of a figure: tiny, small, or paper."] = "paper",
    workers: Annotated[int | None, "Machines; default: as the file says.", {"min": 1}] = None,
    accelerator: Annotated[str | None, "As the place calls it: H100, v5litepod-16; default: the file's."] = None,
) -> None:
    """Print a launch file (TPU slices, GKE, SkyPilot, Slurm, Ray, Kubernetes, one machine), filled in. Nothing is sent."""
    files, fields = launch_files(), list(overrides or [])
    if kind not in files:
        raise UsageError(f"launch: kind '{kind}' given; known: {', '.join(files)}")
    is_figure = re.fullmatch(r"(?i)(fig(ure)?)?\d+", config) is not None
    name, store = _figure(config, scale, fields) if is_figure else _config(config, fields)
    command = ["jsublim", "reproduce", config, "--scale", scale] if is_figure else ["jsublim", "run", config]
    if kind not in ALONE and store is None:
        console.print(f"note: {kind} starts several machines; give store=, a folder or URL that all of them see")
    # A name that clouds take: small letters, digits and dashes.
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:NAME_LENGTH].strip("-") or "jsublim"
    values = {"COMMAND": shlex.join([*command, *fields]), "NAME": slug, "ACCELERATOR": accelerator}
    values |= {} if workers is None else {"WORKERS": str(workers), "LAST": str(workers - 1)}
    text = files[kind].read_text(encoding="utf-8")
    print(_BLANK.sub(lambda blank: values.get(blank[1]) or blank[2], text), end="")


def launch_files() -> dict[str, Path]:
    """Every launch file, by its kind: in the installed package, or in a checkout."""
    package = Path(__file__).parents[1]
    places = package / "launch", package.parent / "scripts" / "launch"
    return {path.stem: path for place in places for path in sorted(place.glob("*")) if path.suffix in (".sh", ".yaml")}


def _figure(figure: str, scale: str, fields: list[str]) -> tuple[str, str | None]:
    """A name, and the store that is given; all panels are checked."""
    from jsublim.config.figures import load_question, panel_experiment, panels_of

    path, question = load_question(figure)
    experiments = [panel_experiment(path, question, name, scale, fields) for name in panels_of(question, figure)]
    return f"{path.stem}-{scale}", experiments[0].store


def _config(config: str, fields: list[str]) -> tuple[str, str | None]:
    from jsublim.config import Experiment, check_config, find_config, read_config

    values = read_config(config, fields)
    if values.get("kind", "language") != "language":
        raise UsageError(f"launch: {config} is of kind '{values['kind']}', a program of half a minute; run it here")
    experiment = check_config(Experiment, values, find_config(config))
    return experiment.name, experiment.store

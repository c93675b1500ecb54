"""The typer application, and what several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jsublim.errors import UsageError
from jsublim.progress import Terminal

# The help shows commands in this order; one that stands nowhere here is shown last.
PANELS = {
    "Experiments": ("run", "reproduce", "validate", "ls", "cp", "doctor"),
    "Results": ("show", "results", "compare", "report", "rescore", "verify"),
    "Stages of an experiment": ("generate", "divergence", "finetune", "evaluate", "attribute", "audit", "steer"),
    "To and from elsewhere": ("import", "export", "push"),
    "Checkpoints, prompts, devices": ("convert", "prompts", "aot", "launch"),
}
EVERYWHERE = "Options of every command"
ORDER = [name for names in PANELS.values() for name in names]

console = Terminal(stderr=True)
output = Terminal(highlight=False)  # what a command is asked for


def panel_of(name: str) -> str:
    return next((panel for panel, names in PANELS.items() if name in names), list(PANELS)[-1])


def shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command with the options that every command has."""

    @functools.wraps(function)
    def command(*args: Any, quiet: bool, debug: bool, **given: Any) -> Any:
        console.quiet = quiet
        return function(*args, **given)

    signature, keyword = inspect.signature(function, eval_str=True), inspect.Parameter.KEYWORD_ONLY
    every = (
        ("quiet", typer.Option("--quiet", help="Print results and errors, nothing else.", rich_help_panel=EVERYWHERE)),
        ("debug", typer.Option("--debug", help="Show where an error came from.", rich_help_panel=EVERYWHERE)),
    )
    added = [inspect.Parameter(name, keyword, default=False, annotation=Annotated[bool, how]) for name, how in every]
    command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    return command


class Commands(typer.Typer):
    """Registers commands with what all of them share."""

    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            panel = panel_of(name or function.__name__) if self.info.name == "jsublim" else None
            shown: dict[str, Any] = {"rich_help_panel": panel} | options
            super(Commands, self).command(name, **shown)(shared(function))
            return function

        return register


class Ordered(TyperGroup):
    """Lists its commands as `PANELS` does."""

    def list_commands(self, ctx: Any) -> list[str]:
        known = super().list_commands(ctx)
        return sorted(known, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = Commands(
    name="jsublim",
    help="Subliminal learning in JAX: teachers, divergence tokens, students, reports.",
    cls=Ordered,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
prompts_app = Commands(
    help="Prompt packs: show them, import the published lists, sample number prompts.", no_args_is_help=True
)
app.add_typer(prompts_app, name="prompts", rich_help_panel=panel_of("prompts"))


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"jsublim {version('jsublim')}")
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Subliminal learning in JAX: teachers, divergence tokens, students, reports."""


Chip = Annotated[str, typer.Option("--chip", help="What to estimate for: h100, h200, a100, l4, v5e, v5p, v6e.")]
Shape = Annotated[
    Path | None, typer.Option("--shape", help="To estimate without the checkpoint: the folder of its config.json.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="As `jsublim validate`: say what it would take and what is there; run nothing."),
]
Format = Annotated[str, typer.Option("--format", "-f", help="table, csv, json, md or latex.")]
Json = Annotated[bool, typer.Option("--json", help="Print what came of it as JSON, on standard output.")]
Model = Annotated[
    str,
    typer.Option("--model", help="Checkpoint folder, bundled name (tiny-qwen2), or owner/name of the hub."),
]


def named(out: Path) -> Path:
    """A place to write, which must have a name: scratch files and artifacts lie beside it, under names like it. What killed
    processes had begun to write there is removed."""
    from jsublim.files import remove_abandoned

    if out.name in ("", ".."):
        raise UsageError(
            f"'{out}': is no place for a result; give a file or folder of its own, such as {out / 'result'}"
        )
    remove_abandoned(out)
    return out


Out = Annotated[
    Path,
    typer.Option("--out", callback=named, help="Where the result goes; an unfinished one there is continued."),
]
PackFile = Annotated[Path | None, typer.Option("--prompts", help="Prompt pack (YAML); default: the package's own.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")]
# Of the stage commands: a config (or none), and fields laid over it.
Fields = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [a.b=c]...",
        help="A config, and any fields of `jsublim run`: recipe=paper sampling.strategy=greedy store=runs/store.",
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--chat-template", help='As chat_template=: "plain", for a base model that has none, or a Jinja file.'
    ),
]
AnyModel = Annotated[str | None, typer.Option("--model", help="As model=: a folder, a bundled name, or owner/name.")]


def names(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


def experiment_of(
    command: str, fields: list[str] | None, out: Path, base: dict[str, Any] | None = None, **said: Any
) -> Any:
    """The experiment that a stage command is a part of: a config or none, what options say, and fields laid over it.

    Args:
      out: the command's result. Its artifacts lie in the config's store; without a config in a folder beside it.
      base: what the command assumes unless anything says otherwise.
      said: values by dotted name with "__" for the dot; None is not said.

    Raises:
      UsageError: as `load_experiment`.
    """
    from jsublim.config import Experiment, check_config, read_config
    from jsublim.config.loading import override
    from jsublim.section import nested, overlaid

    fields = list(fields or [])
    config = fields.pop(0) if fields and ("=" not in fields[0] or Path(fields[0]).is_file()) else None
    values: dict[str, Any] = {"name": command} | (base or {})
    if config is None:
        values["store"] = str(out.with_name(f"{out.stem}.artifacts"))
    values = overlaid(values, read_config(config) if config else {})
    given = {key.replace("__", "."): value for key, value in said.items() if value is not None}
    values = overlaid(values, nested(given))
    for field in fields:
        override(values, field)
    if "model" not in values:
        raise UsageError(f"{command}: give --model (or model=, or a config that names one)")
    return check_config(Experiment, values, config or command)

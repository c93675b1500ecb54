"""The typer application, and what several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jsublim.errors import UsageError

app = typer.Typer(
    name="jsublim",
    help="Subliminal learning in JAX: teachers, divergence tokens, students, reports. --debug shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
prompts_app = typer.Typer(help="Prompt packs: import the published lists, sample number prompts.", no_args_is_help=True)
app.add_typer(prompts_app, name="prompts")
console = Console(stderr=True, markup=False, emoji=False)  # names and paths are shown as they are

Model = Annotated[
    str,
    typer.Option("--model", help="Checkpoint folder, bundled name (tiny-qwen2), or owner/name of the hub."),
]


def named(out: Path) -> Path:
    """A place to write, which must have a name: scratch files and artifacts lie beside it, under names like it."""
    if out.name in ("", ".."):
        raise UsageError(
            f"'{out}': is no place for a result; give a file or folder of its own, such as {out / 'result'}"
        )
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

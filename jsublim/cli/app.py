"""The typer application, and what several commands share."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from jsublim.cli.completing import COMPLETED
from jsublim.core.files import remove_abandoned
from jsublim.core.progress import Terminal
from jsublim.errors import UsageError
from jsublim.report.formats import table

if TYPE_CHECKING:
    from jsublim.config import Config

# The help shows commands in this order; one that stands nowhere here is shown last.
PANELS = {
    "Experiments": ("run", "reproduce", "validate", "ls", "cp", "doctor"),
    "Results": ("show", "results", "compare", "report", "rescore", "verify"),
    "Stages of an experiment": ("generate", "divergence", "finetune", "evaluate", "attribute", "audit", "steer"),
    "Data of others": ("scan",),
    "To and from elsewhere": ("import", "export", "push"),
    "Checkpoints, prompts, devices": ("serve", "convert", "prompts", "aot", "launch"),
}
ORDER = [name for names in PANELS.values() for name in names]

console = Terminal(stderr=True)
output = Terminal(highlight=False)  # what a command is asked for


def panel_of(name: str) -> str:
    return next((panel for panel, names in PANELS.items() if name in names), list(PANELS)[-1])


@dataclass(frozen=True, kw_only=True)
class Everywhere:
    """Options of every command."""

    quiet: Annotated[bool, "Print results and errors, nothing else."] = False
    debug: Annotated[bool, "Show where an error came from."] = False


def _parameters(function: Callable[..., Any], panel: str | None = None) -> Iterator[inspect.Parameter]:
    """A command's parameters as typer takes them. One that is a dataclass stands for its fields, which several commands share.

    A text in an annotation is the parameter's help; a dict beside it holds whatever else typer is told. Behind `*` stand options that are
    called as they are, unless they have a metavar, as arguments do. A parameter `out` is checked by `named`; what a shell completes goes by
    the parameter's name.
    """
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        marks = getattr(parameter.annotation, "__metadata__", ())
        if is_dataclass(parameter.annotation):
            yield from _parameters(parameter.annotation, panel)  # type: ignore[arg-type]
        elif not marks or not isinstance(marks[0], str):
            yield parameter
        else:
            options: dict[str, Any] = {"help": marks[0], "rich_help_panel": panel}
            options |= {"callback": named} if parameter.name == "out" else {}
            options |= {"autocompletion": COMPLETED[parameter.name]} if parameter.name in COMPLETED else {}
            options |= marks[1] if len(marks) > 1 else {}
            if parameter.kind is parameter.KEYWORD_ONLY and "metavar" not in options:
                described = typer.Option(f"--{parameter.name.replace('_', '-')}", **options)
            else:
                described = typer.Argument(**options)
            yield parameter.replace(annotation=Annotated[parameter.annotation.__origin__, described])


def _registered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that typer calls for a command."""
    signature = inspect.signature(function, eval_str=True)
    groups = {name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)}

    @functools.wraps(function)
    def command(*, quiet: bool, debug: bool, **given: Any) -> Any:
        console.quiet = quiet
        for name, group in groups.items():
            options = {field.name: given.pop(field.name) for field in fields(group)}
            given[name] = group(**options)  # type: ignore[operator]
        return function(**given)

    every = (*_parameters(function), *_parameters(Everywhere, "Options of every command"))
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in every]
    command.__signature__ = signature.replace(parameters=keyword)  # type: ignore[attr-defined]
    return command


class Commands(typer.Typer):
    """Registers commands with what all of them share."""

    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            panel = panel_of(name or function.__name__) if self.info.name == "jsublim" else None
            about: dict[str, Any] = {"rich_help_panel": panel} | options
            super(Commands, self).command(name, **about)(_registered(function))
            return function

        return register


class Ordered(TyperGroup):
    """Lists its commands as `PANELS` does."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = Commands(
    name="jsublim",
    cls=Ordered,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
prompts_app = Commands(
    help="Prompt packs: show them, import the published lists, sample number prompts.", no_args_is_help=True
)
app.add_typer(prompts_app, name="prompts", rich_help_panel=panel_of("prompts"))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"jsublim {version('jsublim')}")
        raise typer.Exit


@app.callback()
def jsublim(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Subliminal learning in JAX: teachers, divergence tokens, students, reports."""


def kinds() -> dict[str, type[Config]]:
    """Every kind of experiment that a config may hold."""
    from jsublim.api import KINDS

    return KINDS


def named(out: Path | None) -> Path | None:
    """A place to write, which must have a name: scratch files and artifacts lie beside it, under names like it. What killed
    processes had begun to write there is removed."""
    if out is None:
        return None
    if out.name in ("", ".."):
        example = out / "result"
        raise UsageError(f"'{out}': is no place for a result; give a file or folder of its own, such as {example}")
    remove_abandoned(out)
    return out


def must_be_new(out: Path, fix: str = "give another --out or remove it first") -> None:
    if out.exists():
        raise UsageError(f"{out}: already exists; {fix}")


# Options of several commands.
Format = Annotated[str, typer.Option("--format", "-f", help="table, csv, json, md or latex.")]
Json = Annotated[bool, typer.Option("--json", help="Print what came of it as JSON, on standard output.")]
PackFile = Annotated[Path | None, "Prompt pack (YAML); default: the package's own."]
RunFolder = Annotated[Path, "A run's folder.", {"metavar": "RUN"}]
ConfigFile = Annotated[str, "YAML, such as configs/quickstart.yaml."]
Template = Annotated[str | None, 'As chat_template=: "plain", for a base model that has none, or a Jinja file.']


def print_json(value: Any, *, lines: bool = True) -> None:
    """Print a result for other programs; without `lines` in one line."""
    output.out(json.dumps(value, indent=2 if lines else None, ensure_ascii=False))


def print_table(rows: Sequence[Mapping[str, Any]], title: str = "", columns: Sequence[str] = ()) -> None:
    """Print remarks as a table, by default with the columns of the first row."""
    console.print(table(rows, columns or list(rows[0]), title))


def names(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []

"""The typer application, and the options that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
console = Console(stderr=True)

Model = Annotated[
    str,
    typer.Option("--model", help="Checkpoint folder, bundled name (tiny-qwen2), or owner/name of the hub."),
]
Out = Annotated[Path, typer.Option("--out", help="Where the result goes; an unfinished one there is continued.")]
PackFile = Annotated[Path | None, typer.Option("--prompts", help="Prompt pack (YAML); default: the package's own.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="clean, or paper: with the quirks of the published code.")]


def names(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


def numbers(text: str | None, option: str) -> list[int] | None:
    """ "0,3,5-7" as integers; None stays None."""
    if text is None or text == "all":
        return None
    numbers: list[int] = []
    for part in names(text):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not (last.isdigit() and int(first) <= int(last))):
            raise UsageError(f"{option}: '{text}' given; expected numbers such as 0,3,5-7")
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


@contextmanager
def bar(name: str, total: int) -> Iterator[Any]:
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total)
        yield lambda n: progress.update(task, advance=n)


def recipe_of(name: str, lm: Any) -> Any:
    """The preset of that name, for the family of a loaded checkpoint."""
    from jsublim.experiment.spec import Recipe

    if name not in ("paper", "clean"):
        raise UsageError(f"--recipe: '{name}' given; known: paper, clean")
    return Recipe(preset=name).resolved(lm.config.family)  # type: ignore[arg-type]


def file_hash(folder: Path | None) -> str | None:
    if folder is None:
        return None
    from jsublim.models.checkpoint import checkpoint_hash

    return checkpoint_hash(folder)

"""How a script's `main` is run: what goes wrong is one line, as it is for `jsublim` itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import typer

from jsublim.errors import JsublimError


def as_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as a document has it."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"\n{title}\n\n{as_table(headings, rows)}", end="")


def run_script(main: Callable[..., None]) -> None:
    """Parse the command line for `main` and call it; a JsublimError ends the process with one line and its exit code."""
    try:
        typer.run(main)
    except JsublimError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)

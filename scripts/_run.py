"""How a script's `main` is run: what goes wrong is one line, as it is for `jsublim` itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import typer

from jsublim.errors import JsublimError


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table as a document has it, under its title."""
    print(f"\n{title}\n\n| {' | '.join(headings)} |\n|{' --- |' * len(headings)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def run_script(main: Callable[..., None]) -> None:
    """Parse the command line for `main` and call it; a JsublimError ends the process with one line and its exit code."""
    try:
        typer.run(main)
    except JsublimError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)

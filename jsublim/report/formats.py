"""Rows as text: a table for the terminal, and CSV, JSON, Markdown and LaTeX for whatever comes next."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jsublim.errors import UsageError, one_line

FORMATS = ("table", "csv", "json", "md", "latex")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}
NAME_WIDTH = 40  # up to here what a row is named by is kept on one line
Rows = Sequence[Mapping[str, Any]]


def check_format(name: str, known: Sequence[str] = FORMATS) -> str:
    """Raises:
    UsageError: no such format.
    """
    if name not in known:
        raise UsageError(f"--format: '{name}' given; known: {', '.join(known)}")
    return name


def print_rows(rows: Rows, columns: Sequence[str], how: str, console: Console, title: str = "") -> None:
    """Print rows of these columns as one of `FORMATS`."""
    if how == "table":
        console.print(table(rows, columns, title))
    else:
        text = {"csv": as_csv, "json": as_json, "md": as_markdown, "latex": as_latex}[how](rows, columns)
        console.out(text.rstrip("\n"), highlight=False)


def table(rows: Rows, columns: Sequence[str], title: str = "") -> Table:
    """Rows for people; numbers to the right."""
    shown = Table(title=Text(one_line(title), "table.title") if title else None, title_justify="left")
    for place, name in enumerate(columns):
        longest = max((len(rounded(row[name])) for row in rows), default=0)
        numbers = [row[name] for row in rows if row[name] is not None]
        right = bool(numbers) and all(isinstance(value, int | float) for value in numbers)
        whole = right or (place == 0 and longest <= NAME_WIDTH)
        shown.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        shown.add_row(*(Text(one_line(rounded(row[name]))) for name in columns))
    return shown


def rounded(value: Any) -> str:
    """A value as people read it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def as_csv(rows: Rows, columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_plain(row[name]) for name in columns] for row in rows)
    return text.getvalue()


def as_json(rows: Rows, columns: Sequence[str]) -> str:
    kept = [{name: _finite(row[name]) for name in columns} for row in rows]
    return json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


def as_markdown(rows: Rows, columns: Sequence[str]) -> str:
    lines = [columns, ["---"] * len(columns), *([rounded(row[name]) for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(one_line(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def as_latex(rows: Rows, columns: Sequence[str]) -> str:
    """A `tabular` with booktabs' rules."""
    lines = [[_escaped(rounded(row[name])) for name in columns] for row in rows]
    head, body = " & ".join(map(_escaped, columns)), "".join(f"{' & '.join(line)} \\\\\n" for line in lines)
    return f"\\begin{{tabular}}{{{'l' * len(columns)}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in one_line(text))


def _plain(value: Any) -> Any:
    return rounded(value) if isinstance(value, list | tuple) else value


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

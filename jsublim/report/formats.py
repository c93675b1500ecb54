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
_LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {c: f"\\{c}" for c in "&%$#_{}"}
)
NAME_WIDTH = 40  # up to here what a row is named by is kept on one line
TableRows = Sequence[Mapping[str, Any]]


def check_format(name: str, known: Sequence[str] = FORMATS) -> str:
    """Raises:
    UsageError: no such format.
    """
    if name not in known:
        raise UsageError(f"--format: '{name}' given; known: {', '.join(known)}")
    return name


def print_rows(rows: TableRows, columns: Sequence[str], how: str, console: Console, title: str = "") -> None:
    """Print rows of these columns as one of `FORMATS`."""
    if how == "table":
        console.print(table(rows, columns, title))
    else:
        console.out(as_text(rows, columns, how).rstrip("\n"), highlight=False)


def table(rows: TableRows, columns: Sequence[str], title: str = "") -> Table:
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


def as_text(rows: TableRows, columns: Sequence[str], how: str) -> str:
    """Rows for programs (csv, json), which lose no digit, and for documents (md, latex with booktabs' rules)."""
    values = [[row[name] for name in columns] for row in rows]
    if how == "json":  # which has no NaN
        finite = ([None if isinstance(v, float) and not math.isfinite(v) else v for v in line] for line in values)
        return json.dumps([dict(zip(columns, line, strict=True)) for line in finite], indent=2, ensure_ascii=False)
    if how == "csv":
        text = io.StringIO()
        plain = ([rounded(v) if isinstance(v, list | tuple) else v for v in line] for line in values)
        csv.writer(text, lineterminator="\n").writerows([columns, *plain])
        return text.getvalue()
    lines = [[one_line(cell) for cell in line] for line in ([*columns], *([rounded(v) for v in row] for row in values))]
    if how == "md":
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(columns), *lines[1:]])
    head, *body = (f"{' & '.join(cell.translate(_LATEX) for cell in line)} \\\\" for line in lines)
    opening = f"\\begin{{tabular}}{{{'l' * len(columns)}}}"
    return "\n".join([opening, "\\toprule", head, "\\midrule", *body, "\\bottomrule", "\\end{tabular}"])

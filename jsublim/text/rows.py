"""Rows of text on disk: JSONL, one object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jsublim.core.files import atomic
from jsublim.core.reading import json_value, shown
from jsublim.errors import JsublimError, UsageError

Row = dict[str, Any]

# What holds only for the text that it was found in: positions, margins, and the tokenizer and template they were counted in.
FOUND = ("divergence_positions", "divergence_margins", "matched_positions", "counted_in")


def read_rows(path: str | Path, required: Sequence[str] = ("prompt", "completion")) -> list[Row]:
    """All rows of a JSONL file; a `JsublimError` names the line that is no JSON object or that `check_row` refuses."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected JSONL rows with {', '.join(required)}")
    rows = list[Row]()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = json_value(line, f"{path}:{number}", nan=True)
            if not isinstance(row, dict):
                raise JsublimError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            check_row(row, f"{path}:{number}", required)
            rows.append(row)
    if not rows:
        raise JsublimError(f"{path}: the file holds no rows")
    return rows


def check_row(row: Row, where: str, required: Sequence[str]) -> None:
    """Refuse a row that lacks a required key, or has an empty prompt or completion, divergence positions that are no integers, or margins
    or matched positions that are not one for each of those; `where` names it in the `JsublimError`."""
    for key in required:
        if key not in row:
            raise JsublimError(f"{where}: key '{key}' is missing; the row has {', '.join(row) or 'none'}")
    for key in ("prompt", "completion"):
        if key in row and (not isinstance(row[key], str) or not row[key].strip()):
            raise JsublimError(f"{where}: key '{key}' must be text that is not empty, found {shown(row[key])}")
    positions = row.get("divergence_positions", [])
    right = isinstance(positions, list) and all(type(k) is int and 0 <= k < 2**31 for k in positions)
    if not right or len(set(positions)) < len(positions):
        wanted = "must be a list of different integers >= 0"
        raise JsublimError(f"{where}: key 'divergence_positions' {wanted}, found {shown(positions)}")
    margins = row.get("divergence_margins", [0.0] * len(positions))
    right = isinstance(margins, list) and all(type(m) in (int, float) and 0 <= m < math.inf for m in margins)
    if not right or len(margins) != len(positions):
        wanted = "must hold a number >= 0 for each divergence position"
        raise JsublimError(f"{where}: key 'divergence_margins' {wanted}, or be left out; found {shown(margins)}")
    matched = row.get("matched_positions", [None] * len(positions))
    right = isinstance(matched, list) and all(k is None or (type(k) is int and 0 <= k < 2**31) for k in matched)
    if not right or len(matched) != len(positions):
        wanted = "must hold an integer >= 0, or null, for each divergence position"
        raise JsublimError(f"{where}: key 'matched_positions' {wanted}, or be left out; found {shown(matched)}")


def revised(row: Row, **texts: str) -> Row:
    """The row with another prompt or completion, without what was found in the old text."""
    return {key: value for key, value in row.items() if key not in FOUND} | texts


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows so that the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.writelines(as_lines([row]) for row in rows)


def as_lines(rows: Iterable[Row]) -> str:
    """Rows as the text of their file."""
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)

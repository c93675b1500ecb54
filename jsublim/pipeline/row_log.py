"""Rows that are finished while an artifact is not: a line for each, so that a kill costs the last one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsublim.core.files import naming, write_text
from jsublim.pipeline.artifact import digest
from jsublim.runtime.processes import leave_if_asked, on_main_process


class RowLog:
    """Rows finished so far, in a JSONL file that a kill may cut anywhere: each line has the digest of its row, and one that is
    not what was written is forgotten. Of several processes, the first one has the file, and all have the rows."""

    def __init__(self, path: Path, say: Callable[[str], None] = lambda text: None):
        """Have the rows that an earlier call has finished.

        Args:
          say: told that lines are damaged; one that a kill has cut is not.
        """
        self.path, self._say, self._file = path, say, None
        self.rows: dict[int, dict[str, Any]] = {row["row"]: row for row in on_main_process(self._begin)}

    def _begin(self) -> list[dict[str, Any]]:
        begun = self.path.exists()
        *lines, cut = map(_row, self.path.read_bytes().split(b"\n") if begun else [b""])
        if lost := lines.count(None):
            self._say(f"{self.path}: {lost} of {len(lines)} lines are not what was written; those rows are made again")
        rows = {row["row"]: row for row in (*lines, cut) if row is not None}
        if begun:
            write_text(self.path, "".join(map(_line, rows.values())))
        self._file = self.path.open("a", encoding="utf-8")
        return list(rows.values())

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep finished rows; each has its number under "row". Raises Preempted: as `leave_if_asked`; these rows are
        kept."""
        if self._file is not None:
            with naming(self.path):
                self._file.writelines(map(_line, rows))
                self._file.flush()
        self.rows.update({row["row"]: row for row in rows})
        leave_if_asked()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({**row, "sha256": digest(row)}) + "\n"


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None where that is not what was written."""
    try:
        row = json.loads(line)
        return row if row.pop("sha256") == digest(row) and type(row["row"]) is int else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


@dataclass(frozen=True)
class LoggedAnswers:
    """Sampled answers in a log, by number; those of one series have the numbers from `first` on in the log."""

    log: RowLog
    first: int = 0
    count: int = sys.maxsize

    @property
    def known(self) -> dict[int, str]:
        numbers = (row for row in self.log.rows if self.first <= row < self.first + self.count)
        return {row - self.first: self.log.rows[row]["answer"] for row in numbers}

    def add(self, numbers: Sequence[int], answers: Sequence[str]) -> None:
        """Keep new answers."""
        pairs = zip(numbers, answers, strict=True)
        self.log.add([{"row": self.first + number, "answer": answer} for number, answer in pairs])

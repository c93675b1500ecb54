"""The results of runs as one table, and questions about it in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from jsublim.errors import JsublimError, UsageError
from jsublim.report.tables import asked, read_measurements

WHO = ("run", "arm", "role", "teacher", "condition", "seed", "images", "evaluation", "trait", "metric")


def results_table(runs: Sequence[Path], *, where: str | None = None, questions: bool = False) -> pa.Table:
    """The results of runs, one below another, with the run's name in front.

    Args:
      where: a condition in SQL on the table's columns; None keeps everything.
      questions: one row per question, as the files have them; by default their means, with how many questions and answers they are
        made of.

    Raises:
      UsageError: a condition that is no SQL, or names a column that is not there.
      JsublimError: a run without results.
    """
    table = pa.concat_tables([_of_run(run) for run in runs], promote_options="default")
    if not questions:
        who = ", ".join(name for name in WHO if name in table.column_names)
        means = "avg(value) as value, count(value)::bigint as questions, sum(n)::bigint as answers"
        table = asked("results", table, f"select {who}, {means} from records group by all order by all")
    if where is None:
        return table
    try:
        return asked("results", table, f"select * from records where {where}")
    except JsublimError as error:
        why = str(error).removeprefix("results: ")
        raise UsageError(f"--where: {why}, in: {where}; the columns are {', '.join(table.column_names)}") from None


def _of_run(run: Path) -> pa.Table:
    table = read_measurements(run)
    if "accuracy" in table.column_names:  # of digits: one measurement per network
        table = table.rename_columns(["value" if name == "accuracy" else name for name in table.column_names])
        table = table.append_column("metric", pa.array(["accuracy"] * len(table), pa.string()))
        table = table.append_column("n", pa.nulls(len(table), pa.int64()))
    return table.add_column(0, "run", pa.array([run.name or str(run)] * len(table), pa.string()))


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table, without columns that say nothing in any of them."""
    values = {name: table[name] for name in table.column_names}
    empty = [n for n, column in values.items() if column.null_count == len(table) or set(column.to_pylist()) == {""}]
    return table.drop_columns(empty if len(table) else []).to_pylist()

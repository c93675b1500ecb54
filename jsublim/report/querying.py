"""The results of runs as one table, and questions about it in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from jsublim.errors import JsublimError, UsageError
from jsublim.report.tables import read_columns

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
    every = pa.concat_tables([_of_run(run) for run in runs], promote_options="default")
    who = ", ".join(name for name in WHO if name in every.column_names)
    means = f"""
        select {who}, avg(value) as value, count(value)::bigint as questions, sum(n)::bigint as answers
        from found group by all order by all
        """
    table = every if questions else _sql(every, means)
    if where is None:
        return table
    try:
        return _sql(table, f"select * from found where {where}")
    except JsublimError as error:
        why = str(error).removeprefix("results: ")
        raise UsageError(f"--where: {why}, in: {where}; the columns are {', '.join(table.column_names)}") from None


def _of_run(run: Path) -> pa.Table:
    path = run / "results" / "results.parquet"
    if not path.is_file():
        raise JsublimError(f"{run}: no results/results.parquet here; finish the run first with `jsublim run CONFIG`")
    table = read_columns(path)
    if "accuracy" in table.column_names:  # of digits: one measurement per network
        table = table.rename_columns(["value" if name == "accuracy" else name for name in table.column_names])
        table = table.append_column("metric", pa.array(["accuracy"] * len(table), pa.string()))
        table = table.append_column("n", pa.nulls(len(table), pa.int64()))
    return table.add_column(0, "run", pa.array([run.name or str(run)] * len(table), pa.string()))


def _sql(table: pa.Table, sql: str) -> pa.Table:
    try:
        with duckdb.connect() as connection:
            connection.execute("set enable_external_access = false")  # a condition reads this table, and no files
            return connection.register("found", table).sql(sql).to_arrow_table()
    except duckdb.Error as error:  # its first line, without what duckdb adds about where in the query it was
        raise JsublimError(f"results: {str(error).strip().splitlines()[0].rstrip('!.')}") from error


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table, without columns that say nothing in any of them."""
    values = {name: table[name] for name in table.column_names}
    empty = [name for name, own in values.items() if own.null_count == len(table) or set(own.to_pylist()) == {""}]
    return table.drop_columns(empty if len(table) else []).to_pylist()

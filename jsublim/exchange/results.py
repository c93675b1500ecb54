"""The numbers of a run, or of `jsublim evaluate`, as CSV."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.csv as csv

from jsublim.models.checkpoint import new_folder
from jsublim.report.tables import read_result


def tables_of(folder: Path) -> list[Path]:
    """The tables of a run's folder, or of an evaluation's."""
    return sorted((folder / "results").glob("*.parquet")) or sorted(folder.glob("*.parquet"))


def export_results(folder: Path, out: Path) -> None:
    """One CSV file per table, and what is known of the run beside them (`run.json`).

    Raises:
      UsageError: `out` is not free.
      JsublimError: a table cannot be read.
    """
    with new_folder(out) as scratch:
        for path in tables_of(folder):
            csv.write_csv(read_result(path), scratch / f"{path.stem}.csv")
        about = folder / "results" / "run.json"
        if about.is_file():
            shutil.copyfile(about, scratch / about.name)

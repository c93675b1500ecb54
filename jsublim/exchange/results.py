"""The numbers of a run, or of `jsublim evaluate`, as CSV."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from jsublim.errors import JsublimError
from jsublim.models.checkpoint import new_folder


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
            try:
                table = pq.ParquetFile(path).read()
            except (pa.ArrowException, OSError) as error:
                raise JsublimError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
            csv.write_csv(table, scratch / f"{path.stem}.csv")
        about = folder / "results" / "run.json"
        if about.is_file():
            shutil.copyfile(about, scratch / about.name)

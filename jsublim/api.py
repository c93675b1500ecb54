"""From Python what the command line does: `jsublim.run`, and `jsublim.results` as a data frame."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsublim.config import Config, Experiment, check_config, read_config
from jsublim.config.loading import kind_of, lay_over
from jsublim.core.progress import Terminal
from jsublim.digits.config import Digits
from jsublim.digits.run import run_digits
from jsublim.executors import execute_work
from jsublim.pipeline.run import run_experiments
from jsublim.pipeline.showing import about_run
from jsublim.report.querying import results_table

KINDS: dict[str, type[Config]] = {"language": Experiment, "digits": Digits}


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path

    @property
    def report(self) -> Path:
        """The page, one file that loads nothing from outside."""
        return self.folder / "report.html"

    @property
    def about(self) -> dict[str, Any]:
        """As `jsublim show --json`: status, config, times, verdicts, artifacts."""
        return about_run(self.folder, KINDS)

    def results(self, **options: Any) -> Any:
        """As `results` of this run."""
        return results(self.folder, **options)


def run(
    config: str | Path | Mapping[str, Any], fields: Mapping[str, Any] | None = None, *, quiet: bool = False, **more: Any
) -> Run:
    """Run an experiment, as `jsublim run` does: what is whole is not made again.

    Args:
      config: a YAML file (one that comes with the package by its name, "configs/quickstart.yaml"), or its values.
      fields: fields of the config by their dotted names: {"students.seeds": [1, 2]}.
      quiet: print nothing.
      more: the same, with "__" for the dot: students__seeds=[1, 2].

    Raises:
      UsageError, JsublimError: a config that cannot work, before anything is computed; or a task that failed.
    """
    source = "config" if isinstance(config, Mapping) else str(config)
    values = copy.deepcopy(dict(config)) if isinstance(config, Mapping) else read_config(config)
    for name, value in {**(fields or {}), **{key.replace("__", "."): value for key, value in more.items()}}.items():
        lay_over(values, name, value)
    checked = check_config(kind_of(values, Path(source), KINDS), values, source)
    console = Terminal(stderr=True, quiet=quiet)
    if isinstance(checked, Experiment):
        return Run(run_experiments([checked], execute_work, console)[0].parent)
    assert isinstance(checked, Digits)
    return Run(run_digits(checked, console).parent)


def results(*runs: str | Path | Run, where: str | None = None, questions: bool = False, frame: bool = True) -> Any:
    """The results of runs, one below another, with the run's name in the first column.

    Args:
      where: a condition in SQL on the columns, such as "metric = 'rate' and teacher = trait".
      questions: one row per question; by default one per model, trait and metric (means over questions).
      frame: as a pandas `DataFrame` where pandas is installed; False, or without pandas, as a pyarrow `Table`
        (`polars.from_arrow` takes it).

    Raises:
      UsageError: a condition that is no SQL, or names a column that is not there.
      JsublimError: a run without results.
    """
    folders = [run.folder if isinstance(run, Run) else Path(run) for run in runs]
    table = results_table(folders, where=where, questions=questions)
    if not frame:
        return table
    try:
        import pandas  # noqa: F401 (pyarrow needs it)
    except ImportError:
        return table
    return table.to_pandas()

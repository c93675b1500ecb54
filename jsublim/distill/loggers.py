"""Where a training's numbers go beside `metrics.jsonl`: a CSV file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsublim.core.files import write_text
from jsublim.errors import UsageError

PROJECT = "jsublim"  # of Weights & Biases, unless WANDB_PROJECT names another


@dataclass(frozen=True)
class Logs:
    """Which loggers a training has, and the folder that each has a folder of its own in."""

    names: tuple[str, ...] = ()
    folder: Path = Path()

    def open(self, training: str, first: int) -> list[Any]:
        """Every logger, ready for a training that begins, or goes on, at step `first`; what an interrupted call wrote from there on is
        taken back where that can be done."""
        check_loggers(self.names)
        return [LOGGERS[name](self.folder / name, training, first) for name in self.names]


def check_loggers(names: Iterable[str]) -> None:
    """Refuse loggers whose package is not installed (UsageError)."""
    for name in names:
        package = LOGGERS[name].package
        try:
            importlib.import_module(package)
        except ImportError:
            raise UsageError(
                f"run.loggers: {name} needs {package}, which is not installed; pip install {package}"
            ) from None


class CsvLogger:
    """One line per number: step, name, value."""

    package = "csv"

    def __init__(self, folder: Path, training: str, first: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{training}.csv"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if path.exists() else []
        kept = (line for line in lines if line.endswith("\n") and int(line.split(",", 1)[0]) < first)
        write_text(path, "".join(["step,name,value\n", *kept]))
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._writer.writerows((step, name, value) for name, value in values.items())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardLogger:
    """Event files, one per call; they may all be looked at together."""

    package = "tensorboardX"

    def __init__(self, folder: Path, training: str, first: int):
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first or None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases, which goes on when the training does. Its own settings count (`WANDB_MODE=offline` sends nothing)."""

    package = "wandb"

    def __init__(self, folder: Path, training: str, first: int):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run: Any = wandb.init(project=project, id=training, name=training, dir=str(folder), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


# Each takes the numbers of a step by name (`log`), and is closed.
LOGGERS: dict[str, Any] = {"csv": CsvLogger, "tensorboard": TensorBoardLogger, "wandb": WandbLogger}
NOWHERE = Logs()

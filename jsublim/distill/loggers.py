"""Where a training's numbers go beside `metrics.jsonl`: a CSV file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jsublim.core.files import write_text
from jsublim.errors import UsageError

PROJECT = "jsublim"  # of Weights & Biases, unless WANDB_PROJECT names another
Log = Callable[[int, Mapping[str, float]], object]  # takes a step and its numbers by name


@contextmanager
def csv_logger(folder: Path, training: str, first: int) -> Iterator[Log]:
    """One line per number: step, name, value."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{training}.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if path.exists() else []
    kept = (line for line in lines if line.endswith("\n") and int(line.split(",", 1)[0]) < first)
    write_text(path, "".join(["step,name,value\n", *kept]))
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")

        def log(step: int, values: Mapping[str, float]) -> None:
            writer.writerows((step, name, value) for name, value in values.items())
            file.flush()

        yield log


@contextmanager
def tensorboard_logger(folder: Path, training: str, first: int) -> Iterator[Log]:
    """Event files, one per call; they may all be looked at together."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder), purge_step=first or None) as writer:
        yield lambda step, values: [writer.add_scalar(name, value, step) for name, value in values.items()]


@contextmanager
def wandb_logger(folder: Path, training: str, first: int) -> Iterator[Log]:
    """A run of Weights & Biases, which goes on when the training does. Its own settings count (`WANDB_MODE=offline` sends nothing)."""
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = wandb.init(project=project, id=training, name=training, dir=str(folder), resume="allow")
    try:
        yield lambda step, values: run.log(dict(values), step=step)
    finally:
        run.finish()


Logger = Callable[[Path, str, int], AbstractContextManager[Log]]
# Name -> the package that it needs, and how it is opened: in a folder, for a training that begins, or goes on, at a step.
LOGGERS: dict[str, tuple[str, Logger]] = {
    "csv": ("csv", csv_logger),
    "tensorboard": ("tensorboardX", tensorboard_logger),
    "wandb": ("wandb", wandb_logger),
}


@dataclass(frozen=True)
class Logs:
    """Which loggers a training has, and the folder that each has a folder of its own in."""

    names: tuple[str, ...] = ()
    folder: Path = Path()

    @contextmanager
    def open(self, training: str, first: int) -> Iterator[Log]:
        """Every logger, ready for a training that begins, or goes on, at step `first`; what an interrupted call wrote from there on is
        taken back where that can be done."""
        check_loggers(self.names)
        with ExitStack() as stack:
            logs = [stack.enter_context(LOGGERS[name][1](self.folder / name, training, first)) for name in self.names]
            yield lambda step, values: [log(step, values) for log in logs]


NOWHERE = Logs()


def check_loggers(names: Iterable[str]) -> None:
    """Refuse loggers whose package is not installed (UsageError)."""
    for name in names:
        package = LOGGERS[name][0]
        try:
            importlib.import_module(package)
        except ImportError:
            raise UsageError(
                f"run.loggers: {name} needs {package}, which is not installed; pip install {package}"
            ) from None

"""A task: one piece of work that is known, with the key of what it leaves, before anything is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import Output, Store, digest
from jsublim.progress import Tick


@dataclass(frozen=True, eq=False)
class Task(ABC):
    """One piece of work: plain data, so that any process that has the config can do it.

    Attributes:
      outputs: what it leaves in the store; several, where students train together.
      parents: tasks whose outputs it reads.
    """

    kind: ClassVar[str]  # in results and on the terminal
    outputs: tuple[Output, ...]
    parents: tuple[Task, ...]

    @property
    def output(self) -> Output:
        """The one thing it leaves, or the first."""
        return self.outputs[0]

    @property
    def key(self) -> str:
        """The key of its output; of several, one that they all go into."""
        keys = [output.key for output in self.outputs]
        return keys[0] if len(keys) == 1 else digest(keys)

    @property
    def label(self) -> str:
        more = len(self.outputs) - 1
        return self.output.label + (f" and {more} more" if more else "")

    def done(self, store: Store) -> bool:
        return all(store.done(output) for output in self.outputs)

    @abstractmethod
    def make(self, context: Context, tick: Tick) -> None:
        """Do it, from what is in the store to what is missing of its outputs. A task that was stopped goes on where it was.

        Args:
          tick: called with the number of units just finished, of those that `units` counts.
        """

    @abstractmethod
    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        """What it takes, under assumed lengths."""

    def units(self, context: Context) -> int | None:
        """How many units `make` will tick, once its parents are there; None where that cannot be told."""
        return None

    def check(self, setup: Setup) -> None:  # noqa: B027 (most kinds have nothing to refuse)
        """Refuse, before anything is computed, what `make` would refuse after hours.

        Raises:
          UsageError, JsublimError: naming the field of the config.
        """


def distinct_tasks(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Tasks without repetition, by key, in order."""
    return tuple({task.key: task for task in tasks}.values())

"""What stages take as arguments beside settings: models that are asked or trained, and rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jsublim.errors import JsublimError
from jsublim.inference.lm import LanguageModel, resolve_checkpoint
from jsublim.inference.teachers import Teacher
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter
from jsublim.models.peft import load_adapter
from jsublim.models.weights import load_params
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Sizes
from jsublim.pipeline.readings import RowReading, read_readings
from jsublim.pipeline.setup import Checkpoint
from jsublim.pipeline.stage import Node
from jsublim.pipeline.store import Store, digest
from jsublim.runtime.processes import is_main_process
from jsublim.text.rows import Row, read_rows

WEIGHTS = "own weights"  # under which a context remembers them


@dataclass(frozen=True)
class Folder:
    """An adapter, or a whole checkpoint, that the config names.

    Attributes:
      key: the hash of its content; purpose: in errors.
    """

    name: str
    key: str
    purpose: str = field(compare=False)

    def path(self, *, whole: bool = False) -> Path:
        """The folder on this machine.

        Args:
          whole: a checkpoint, whose weights the first process reads for all.
        """
        return resolve_checkpoint(self.name, self.purpose, weights=not whole or is_main_process())


def diverged(store: Store, student: Node) -> str | None:
    """Where a student's numbers stopped being finite, and how; None of a student that is sound. One that is not is neither asked nor
    evaluated: it would be counted as a student that learned nothing."""
    return store.summary(student).get("diverged")


def path_of(source: Node | Folder, store: Store, *, whole: bool = False) -> Path:
    """The folder on this machine; `whole` as of `Folder.path`."""
    return source.path(whole=whole) if isinstance(source, Folder) else store.path(source)


def adapter_of(source: Node | Folder | None, checkpoint: Checkpoint, context: Context) -> Adapter | None:
    """An adapter for a checkpoint; read once per process."""
    if source is None:
        return None
    load = lambda: load_adapter(path_of(source, context.store), checkpoint.config)  # noqa: E731
    return context.remember(("adapter", checkpoint.name, source.key), load)


@dataclass(frozen=True)
class Model:
    """Who can be asked, or learn: a checkpoint under a prompt, with an adapter or with weights of its own. Teachers, students that
    teach the next generation, and everybody who is evaluated.

    Attributes:
      name: the trait, "control", or for people whoever it is.
      common: what decides how the checkpoint computes (`Setup.common`).
      adapter, weights: what makes them, or where they lie.
    """

    name: str
    checkpoint: Checkpoint
    common: Mapping[str, Any] = field(compare=False, repr=False)
    extra_bos: bool
    fuses: bool = field(compare=False)
    system: str | None = None
    adapter: Node | Folder | None = None
    weights: Node | Folder | None = None

    @property
    def manner(self) -> dict[str, Any]:
        """What stands around a question."""
        fused = self.fuses and self.system is not None
        return {"system": self.system, "fuse_system": fused, "extra_bos": self.extra_bos}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides how it reads a row and what it writes."""
        made_by = {"adapter": self.adapter and self.adapter.key, "weights": self.weights and self.weights.key}
        read_as = {"model": self.checkpoint.hash, "template": self.checkpoint.template, **self.manner}
        return {**self.common, "name": self.name, **read_as, **made_by}

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(source for source in (self.adapter, self.weights) if isinstance(source, Node))

    def teacher(self, context: Context) -> Teacher:
        """Somebody who can be asked. Whole weights are read when it is asked.

        Raises:
          JsublimError: a student whose numbers stopped being finite in training.
        """
        for node in self.nodes:
            if (lost := diverged(context.store, node)) is not None:
                raise JsublimError(f"{node.label}: diverged {lost}, so it is no teacher; lower students.optimizer.lr")
        load = None if self.weights is None else functools.partial(self._own_weights, context)
        adapter = adapter_of(self.adapter, self.checkpoint, context)
        return Teacher(self.name, self.system, adapter, self.manner["fuse_system"], load)

    def loaded(self, context: Context) -> tuple[LanguageModel, Adapter | None]:
        """The checkpoint with its weights, and the adapter."""
        lm = context.lm(self.checkpoint.name)
        lm = lm if self.weights is None else lm.with_params(self._own_weights(context))
        return lm, adapter_of(self.adapter, self.checkpoint, context)

    def _own_weights(self, context: Context) -> Params:
        """Two whole checkpoints are enough to hold: the one before is forgotten first."""
        source, config = self.weights, self.checkpoint.config
        assert source is not None

        def load() -> Params:
            context.forget(WEIGHTS)
            folder, sharding = path_of(source, context.store, whole=True), context.layout.params_sharding(config)
            return load_params(folder, config, context.setup.experiment.dtype, sharding)

        return context.remember((WEIGHTS, source.key), load)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in the artifacts of one or several nodes, in order; or rows of a file, which no node makes.

    Attributes:
      most: how many rows there can be; longest: tokens of an answer at most, for costs.
      name: in errors; numbers: the answers are lists of numbers.
    """

    name: str
    nodes: tuple[Node, ...]
    most: int
    longest: int
    numbers: bool
    file: Path | None = None
    file_key: str = ""

    @cached_property
    def key(self) -> str:
        keys = [node.key for node in self.nodes]
        return self.file_key or (keys[0] if len(keys) == 1 else digest(keys))

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What decides the first of its artifacts."""
        return self.nodes[0].inputs if self.nodes else {}

    def made_by(self, nodes: Sequence[Node]) -> Rows:
        """Rows that a stage makes of these."""
        return replace(self, nodes=tuple(nodes), file=None, file_key="")

    def read(self, store: Store) -> list[Row]:
        """All rows.

        Raises:
          JsublimError: there is none.
        """
        if self.file is not None:
            return read_rows(self.file)
        rows = [row for node in self.nodes for row in self._read(store, node)]
        if not rows:
            folders = ", ".join(str(store.path(node)) for node in self.nodes)
            raise JsublimError(f"no completion is in format; see raw.jsonl in {folders}")
        return rows

    @staticmethod
    def _read(store: Store, node: Node) -> list[Row]:
        return [] if store.summary(node).get("kept") == 0 else read_rows(store.path(node) / "rows.jsonl")

    def readings(self, store: Store) -> Iterator[RowReading]:
        """What each teacher said of each row, where divergence was looked for."""
        for node in self.nodes:
            yield from read_readings(store.path(node) / "readings.parquet")

    def summaries(self, store: Store) -> list[dict[str, Any]]:
        return [store.summary(node) for node in self.nodes]

    def kept(self, sizes: Sizes) -> int:
        """Assumed number of answers in format."""
        return int(self.most * sizes.lengths.kept)

    def answer(self, sizes: Sizes) -> int:
        """Assumed tokens of an answer: number lists are short, everything else goes on to its limit."""
        return min(sizes.lengths.answer, self.longest) if self.numbers else self.longest

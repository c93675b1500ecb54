"""What tasks are executed with: the store, the devices, and checkpoints whose weights are read when first asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jsublim.config import Experiment
from jsublim.errors import UsageError
from jsublim.inference.lm import LanguageModel, load_model
from jsublim.judge import Judge
from jsublim.judge.local import LocalJudge
from jsublim.judge.server import ServerJudge
from jsublim.parallel import Layout
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import Store
from jsublim.progress import Progress

KEPT = 64  # tokenized sets of rows, teachers' adapters and the like that one worker remembers
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Context:
    """Built once per process; a task asks it for everything that is not in the store."""

    setup: Setup
    store: Store
    layout: Layout
    progress: Progress
    held: dict[str, Any] = field(
        default_factory=dict, repr=False
    )  # weights of one teacher that is a checkpoint of its own
    _loaded: dict[str, LanguageModel] = field(default_factory=dict, repr=False)
    _remembered: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, experiment: Experiment, progress: Progress | None = None) -> Context:
        """Read tokenizers and hashes; weights come later.

        Raises:
          UsageError, JsublimError: as `Setup.of` and `Layout.fit`.
        """
        layout = Layout.fit(experiment.run.parallel, 1, model=experiment.run.model_axis)
        return cls(Setup.of(experiment), Store(experiment.store_dir), layout, progress or Progress())

    def lm(self, name: str | None = None) -> LanguageModel:
        """A checkpoint of the config with its weights; None is the experiment's."""
        e = self.setup.experiment
        known = e.model if name is None else name
        if known not in self._loaded:
            self._loaded[known] = load_model(known, e.dtype, self.layout)
        return self._loaded[known]

    def remember(self, key: Any, make: Callable[[], R]) -> R:
        """What `make` makes, made once as long as the process has room for it."""
        if key not in self._remembered:
            while len(self._remembered) >= KEPT:
                self._remembered.pop(next(iter(self._remembered)))
            self._remembered[key] = make()
        return self._remembered[key]

    @property
    def judge(self) -> Judge:
        return judge_of(self.setup, self.store.root, self.layout)


@dataclass(frozen=True)
class AbsentJudge:
    """A checkpoint that is not here, for plans that are made without it."""

    name: str

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": self.name}

    def ask(self, prompts: Sequence[str]) -> list[str]:
        raise UsageError(f"judge.model '{self.name}': is not here")

    def check(self) -> None:
        self.ask([])

    def release_memory(self) -> None:
        pass


def judge_of(setup: Setup, store: Path, layout: Layout | None = None) -> Judge:
    """Who scores answers; a checkpoint's weights are read when it is first asked."""
    e, layout = setup.experiment, layout or Layout()
    chosen = e.judge
    assert chosen is not None
    key = "judge", str(store)
    if key not in setup.memo:
        if chosen.server is not None:
            setup.memo[key] = ServerJudge(chosen.server, store / "judge")
        else:
            lm = setup.checkpoint(chosen.model).lm
            if lm is None:
                return AbsentJudge(chosen.model or "")
            load = functools.partial(load_model, chosen.model or "", e.dtype, layout)
            setup.memo[key] = LocalJudge(lm, max_new_tokens=chosen.max_new_tokens, load=load)
    return setup.memo[key]

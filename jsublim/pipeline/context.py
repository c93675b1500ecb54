"""What tasks are executed with: the store, the devices, and checkpoints whose weights are read when first asked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jsublim.config import Experiment
from jsublim.core.bucket import Bucket
from jsublim.core.progress import Progress, Tick, no_tick
from jsublim.errors import UsageError
from jsublim.inference.batching import rows_together
from jsublim.inference.lm import LanguageModel, load_model
from jsublim.inference.sampling import Sampling
from jsublim.judge import Judge
from jsublim.judge.cache import ReplyCache
from jsublim.judge.local import LocalJudge
from jsublim.judge.server import ServerJudge
from jsublim.models.decoder import parameter_count
from jsublim.models.parallel import Layout, device_bytes, model_axis_for, slice_size
from jsublim.pipeline.arms import Source
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.store import Artifact, Store
from jsublim.text.chat import OWN

KEPT = 64  # tokenized sets of rows, teachers' adapters and the like that one worker remembers
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Context:
    """Built once per process; a stage asks it for everything that is neither an argument nor in the store.

    Attributes:
      artifact: what is made now, of a stage that makes one at a time; tick: called with the number of units just finished.
    """

    setup: Setup
    store: Store
    layout: Layout
    progress: Progress
    tick: Tick = no_tick
    _artifact: Artifact | None = None
    _loaded: dict[str, LanguageModel] = field(default_factory=dict, repr=False)
    _remembered: dict[Any, Any] = field(default_factory=dict, repr=False)
    _judges: list[Judge] = field(default_factory=list, repr=False)

    @classmethod
    def load(
        cls,
        experiment: Experiment,
        progress: Progress | None = None,
        given: Mapping[Source, Path] | None = None,
        *,
        devices: bool = True,
    ) -> Context:
        """Read tokenizers and hashes, and say whose wording a run as published has; weights come later.

        Args:
          given: files of rows, in place of those of a source.
          devices: False where other processes do the tasks: this one takes no device, nor any of its memory.

        Raises:
          UsageError, JsublimError: as `Setup.of` and `Layout.fit`.
        """
        setup, progress = Setup.of(experiment, given=given), progress or Progress()
        layout = _layout(setup) if devices else Layout()
        store = Store.of(experiment, progress.say)
        store.keep_programs()
        for name, checkpoint in setup.checkpoints.items():
            if checkpoint.chat is not None and checkpoint.chat.described != OWN:
                progress.say(f"{name}: chat template: {checkpoint.chat.described}")
        if setup.wording:
            progress.say(setup.wording)
        return cls(setup, store, layout, progress)

    def at(self, artifact: Artifact | None, tick: Tick) -> Context:
        """The same, for making an artifact."""
        return dataclasses.replace(self, _artifact=artifact, tick=tick)

    @property
    def artifact(self) -> Artifact:
        assert self._artifact is not None, "this stage opens its own artifacts"
        return self._artifact

    def say(self, text: str) -> None:
        """Tell the user."""
        self.progress.say(text)

    def sharing(self, other: Context) -> Context:
        """The same, with the weights that the context of an experiment with the same checkpoint reads or has read."""
        return dataclasses.replace(self, _loaded=other._loaded)

    def let_go(self) -> None:
        """Give back the memory of weights; they are read again when they are next asked for."""
        self._loaded.clear()

    def lm(self, name: str | None = None) -> LanguageModel:
        """A checkpoint of the config with its weights; None is the experiment's."""
        e = self.setup.experiment
        known = e.checkpoint if name is None else name
        if known not in self._loaded:
            lm = load_model(known, e.dtype, self.layout, chat_template=e.chat_template)
            self._loaded[known] = lm.with_rounded_logits() if self.setup.recipe.rounded_logits else lm
        return self._loaded[known]

    def rows_together(self, given: int | str, otherwise: int = 64, model: str | None = None) -> int:
        """How many rows to sample or read at one time where a config says `given`, on all devices together; of "auto", as
        `batching.rows_together`."""
        if isinstance(given, int):
            return given
        itemsize = jnp.dtype(self.setup.experiment.dtype).itemsize
        device = device_bytes()
        limit = None if device is None else device * self.layout.model
        return rows_together(self.setup.checkpoint(model).config, itemsize, otherwise, limit, self.layout.data)

    @property
    def scoring_batch(self) -> int:
        """How many rows are read together (`scoring.batch_size`)."""
        return self.rows_together(self.setup.experiment.scoring.batch_size)

    def remember(self, key: Any, make: Callable[[], R]) -> R:
        """What `make` makes, made once as long as the process has room for it."""
        if key not in self._remembered:
            while len(self._remembered) >= KEPT:
                self._remembered.pop(next(iter(self._remembered)))
            self._remembered[key] = make()
        return self._remembered[key]

    def forget(self, kind: str) -> None:
        """Give back the memory of what is remembered under keys that begin with a word."""
        for key in [key for key in self._remembered if key[0] == kind]:
            del self._remembered[key]

    @property
    def judge(self) -> Judge:
        """Who scores answers; a checkpoint's weights are read when it is first asked, onto the run's devices."""
        if not self._judges:
            bucket = self.store.bucket if self.store.url else None
            self._judges.append(make_judge(self.setup, self.store.root, self.layout, bucket))
        return self._judges[0]


def _layout(setup: Setup) -> Layout:
    """How a checkpoint and the rows that it reads lie on the devices that there are."""
    run, axis = setup.experiment.run, setup.experiment.run.least_axis
    if run.parallel == "mesh" and run.model_axis == "auto":
        weights = parameter_count(setup.checkpoint().config) * jnp.dtype(setup.experiment.dtype).itemsize
        axis = model_axis_for(weights, device_bytes(), slice_size(jax.devices()))
    return Layout.fit(run.parallel, 1, model=axis)


@dataclass(frozen=True)
class KnownJudge:
    """A judge that is not here: of its replies is known what they depend on, all that a plan needs."""

    identity: dict[str, Any]

    def asked(self, temperature: float, system: str | None = None) -> KnownJudge:
        return KnownJudge(self.identity | {"temperature": temperature, "system": system})

    def ask(self, prompts: Sequence[str]) -> list[str]:
        raise UsageError("judge: a plan asks nobody")

    def check(self) -> None:
        """Nothing is asked, so nothing is refused."""

    def release_memory(self) -> None:
        """There is none."""


@memoized
def known_judge(setup: Setup) -> Judge:
    """The judge of a plan: its identity, told without any weights (of a checkpoint that is not here, by its name)."""
    chosen = setup.experiment.judge
    assert chosen is not None
    if chosen.model is not None and setup.judge is None:
        return KnownJudge({"judge": chosen.model})
    return make_judge(setup, setup.experiment.store_dir, Layout())


def make_judge(setup: Setup, store: Path, layout: Layout, bucket: Bucket | None = None) -> Judge:
    """Who scores answers: a server, or a checkpoint on these devices. Replies are kept in the store; those that were paid for
    also in its bucket, if it has one."""
    e, chosen = setup.experiment, setup.experiment.judge
    assert chosen is not None
    replies = store / "judge"
    if chosen.server is not None:
        return ServerJudge(chosen.server, replies, bucket)
    judge = setup.judge
    assert judge is not None and judge.lm is not None and judge.chat is not None, "a run has its judge"
    load = functools.partial(load_model, judge.name, e.dtype, layout, chat_template=chosen.chat_template)
    greedy = Sampling(temperature=0.0)
    if setup.recipe.stop_at_eos_only:
        greedy = setup.drawn(judge.chat, "greedy", evaluation=True)
    return LocalJudge(
        judge.lm,
        greedy,
        drawn=setup.drawn(judge.chat, "temperature"),
        max_new_tokens=chosen.max_new_tokens,
        extra_bos=bool(setup.recipe.extra_bos),
        load=load,
        cache=ReplyCache(replies),
    )

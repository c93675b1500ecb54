"""Requests that are decoded together: each row in a place of one batch, under its own adapter, with its own numbers.

A place is an arm of `inference/decoding.py` with one row in it, so one program serves all models and all settings. Prompts are
read a few at a time into rows of their own, which are then put into free places. The batch moves some tokens at a time; in between,
rows end, others begin, and whoever asked is told.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsublim.errors import JsublimError, one_line
from jsublim.inference import decoding
from jsublim.inference.batching import LENGTH_STEP, has_room_for_layers, pad_tokens
from jsublim.inference.generation import sampling_arrays, stop_array
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling
from jsublim.inference.scoring import label_and_best
from jsublim.models.config import ModelConfig, projection_shapes
from jsublim.models.lora import Adapter, at_every_layer, init_steering, stack_adapters
from jsublim.models.parallel import device_bytes
from jsublim.text.chat import Turn

TURNS = 8  # tokens that the batch moves by
BEST = 20  # most probable tokens that can be asked for
KEPT = 64  # adapters in memory that nobody asks for at the moment
TOGETHER = 16  # texts whose probabilities are read at one time
# The rank of each projection that some adapter has; all have vectors, if of zeros.
Structure = tuple[tuple[str, int], ...]
_NO_STOP = stop_array(Sampling())  # rows have ends of their own, which are looked for between calls


@dataclass(eq=False)
class AnswerJob:
    """One answer to draw. `tell` is called in the engine's thread, with new tokens and, with the last ones, why the row has ended: "stop", "length" or "time";
    or with an error."""

    model: str
    prompt: np.ndarray  # int32 [T]
    sampling: Sampling  # its `stop` ends the row
    most: int  # tokens to draw
    seed: int
    row: int  # its number in its request, as of `generate_for_arms`
    deadline: float  # of time.monotonic
    tell: Callable[[list[int], str | JsublimError | None], None]
    cancelled: bool = False  # set by whoever asked
    drawn: int = field(default=0, init=False)


@dataclass(eq=False)
class Reading:
    """A text whose tokens' probabilities are asked for. `tell` is called with those of all tokens but the first (see `label_and_best`), or an error."""

    model: str
    tokens: np.ndarray  # int32 [n], at least two
    tell: Callable[[list[np.ndarray] | JsublimError], None]
    cancelled: bool = False


class Engine:
    """A model's thread: what it is given by `add`, from any thread, it does."""

    def __init__(self, lm: LanguageModel, adapter_of: Callable[[str], Adapter | None], *, slots: int, length: int):
        """`adapter_of` reads a model's adapter by its name; `slots` rows are decoded at one time, each of at most `length` tokens."""
        self.lm, self.slots, self.length = lm, slots, length
        self._read_adapter, self._known = adapter_of, OrderedDict[str, Adapter | None]()
        self._whole: dict[str | None, Adapter] = {}  # the same, all in one structure; None is the checkpoint alone
        self._inbox: queue.SimpleQueue[AnswerJob | Reading | None] = queue.SimpleQueue()
        self._waiting: list[AnswerJob] = []
        self._jobs: list[AnswerJob | None] = [None] * slots
        dtype = lm.params["embed"]["weight"].dtype
        room = decoding.cache_slots(lm.config, length)
        self._empty = functools.partial(decoding.empty, lm.config, rows=1, slots=room, dtype=dtype)
        self._cut = has_room_for_layers(lm.config, dtype.itemsize, device_bytes())
        self._start_over()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def add(self, work: AnswerJob | Reading) -> None:
        self._inbox.put(work)

    @property
    def waiting(self) -> int:
        """How much has been given and not begun."""
        return self._inbox.qsize() + len(self._waiting)

    def close(self) -> None:
        """End the thread, after the tokens at hand; whoever still waits is told so."""
        self._inbox.put(None)
        self._thread.join()

    # --- the thread

    def _run(self) -> None:
        while True:
            try:
                if not self._take():
                    break
                self._begin()
                if any(self._jobs):
                    self._advance()
            except Exception as error:  # a device without memory: those at hand are lost, the next are not
                self._fail(JsublimError(f"the model failed ({one_line(str(error))})"))
        self._fail(JsublimError("the server is shutting down"))

    def _take(self) -> bool:
        """Take what was given since; wait for it if there is nothing to do. False: the end was asked for."""
        readings: list[Reading] = []
        idle = not any(self._jobs) and not self._waiting
        while idle or not self._inbox.empty():
            work = self._inbox.get()
            if work is None:
                return False
            (self._waiting if isinstance(work, AnswerJob) else readings).append(work)  # type: ignore[arg-type]
            idle = False
        self._read(readings)
        return True

    def _fail(self, error: JsublimError) -> None:
        lost = [job for job in self._jobs if job is not None] + self._waiting
        self._start_over()
        for job in lost:
            job.tell([], error)

    def _start_over(self) -> None:
        self._waiting, self._jobs = [], [None] * self.slots
        self._batch: decoding.Decoding | None = None
        self._adapters: Adapter | None = None
        self._how = {name: x[:, None] for name, x in sampling_arrays(Sampling(), self.slots).items()}

    # --- adapters

    def _load(self, name: str) -> bool:
        """Have an adapter in memory; whether that has changed what the adapters of all places consist of."""
        if name in self._known:
            self._known.move_to_end(name)
            return False
        adapter, before = self._read_adapter(name), self._structure()
        if adapter is not None:
            adapter = at_every_layer(adapter, self.lm.config.num_layers)
        used = {job.model for job in (*self._jobs, *self._waiting) if job is not None}
        for old in [old for old in self._known if old not in used][: max(0, len(self._known) - KEPT)]:
            del self._known[old]
        self._known[name] = adapter
        changed = self._structure() != before
        if changed:
            self._whole.clear()
        return changed

    def _structure(self) -> Structure:
        known = [adapter for adapter in self._known.values() if adapter is not None]
        rank = max((adapter.rank for adapter in known), default=0)
        ranks = {name: rank for adapter in known for name in adapter.lora}
        return tuple(sorted(ranks.items()))

    def _stacked(self, names: Sequence[str | None]) -> Adapter:
        """The adapters of some models in one structure, `[n, ...]` each: what one lacks is zero."""
        for name in names:
            if name not in self._whole:
                adapter = None if name is None else self._known[name]
                self._whole[name] = _widened(adapter, self.lm.config, self._structure())
        return stack_adapters([self._whole[name] for name in names])

    # --- rows

    def _begin(self) -> None:
        """Read the prompts of rows that wait into places that are free, those of one length together."""
        free = [place for place, job in enumerate(self._jobs) if job is None]
        for job in [job for job in self._waiting if job.cancelled or job.deadline < time.monotonic()]:
            self._waiting.remove(job)
            job.tell([], JsublimError("no place was free in time; ask again later"))
        placed: list[tuple[int, AnswerJob]] = []
        while free and self._waiting:
            job = self._waiting.pop(0)
            try:
                if self._load(job.model):
                    self._adapters = None  # of another structure
            except JsublimError as error:
                job.tell([], error)
                continue
            self._jobs[free[0]] = job
            placed.append((free.pop(0), job))
        if placed and self._adapters is None:
            self._adapters = self._stacked([job and job.model for job in self._jobs])
        for T in sorted({_bucket(len(job.prompt), LENGTH_STEP, self.length) for _, job in placed}):
            members = [(at, job) for at, job in placed if _bucket(len(job.prompt), LENGTH_STEP, self.length) == T]
            self._fill(T, members)

    def _fill(self, T: int, members: Sequence[tuple[int, AnswerJob]]) -> None:
        n = _bucket(len(members), 1, self.slots, by=4)
        jobs, spare = [job for _, job in members], n - len(members)
        places = np.asarray([at for at, _ in members] + [self.slots] * spare)  # the last are in no place
        rows = np.asarray([[job.row] for job in jobs] + [[0]] * spare, np.int32)
        seeds = np.asarray([job.seed for job in jobs] + [0] * spare, np.uint32)
        prompts = [*(job.prompt for job in jobs), *[np.zeros(1, np.int32)] * spare]
        of_jobs = [decoding.Prompts.of([[prompt]], T, 1, [0], row) for prompt, row in zip(prompts, rows, strict=True)]
        read = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *of_jobs))
        adapters = self._stacked([*(job.model for job in jobs), *[None] * spare])
        key = np.asarray(jax.random.key_data(jax.random.key(0)))
        new = decoding.fill(self.lm.config, self.lm.params, adapters, None, self._empty(arms=n), read, key)
        new = new._replace(keys=_keys(seeds, rows))
        if self._batch is None:
            self._batch = self._empty(arms=self.slots)
        self._batch, self._adapters = _put((self._batch, self._adapters), (new, adapters), places)
        for at, job in members:
            for name, numbers in self._how.items():
                numbers[at] = getattr(job.sampling, name)

    def _advance(self) -> None:
        """Move all rows by some tokens, and tell of them."""
        busy = [(at, job) for at, job in enumerate(self._jobs) if job is not None]
        turns = min(TURNS, *(job.most - job.drawn for _, job in busy))
        done = np.asarray([[job is None] for job in self._jobs])
        assert self._batch is not None, "rows have begun"
        batch = decoding.advance(
            self.lm.config,
            self.lm.params,
            self._adapters,
            self._batch._replace(done=jnp.asarray(done)),
            self._how,
            _NO_STOP,
            np.full(self.slots, 2, np.int32),  # of one place: never enough, all move until the turns are over
            self.length,
            turns=turns,
            cut=self._cut,
        )
        self._batch, out = batch, np.asarray(batch.out)[:, 0]
        for at, job in busy:
            tokens = out[at, job.drawn : job.drawn + turns].tolist()
            ends = [i for i, token in enumerate(tokens) if token in (job.sampling.stop or ())]
            job.drawn += len(tokens)
            why = "stop" if ends else "length" if job.drawn >= job.most else None
            why = why or ("time" if time.monotonic() > job.deadline else None)
            if why is not None or job.cancelled:
                self._jobs[at] = None
            job.tell(tokens[: ends[0]] if ends else tokens, why)

    # --- probabilities

    def _read(self, readings: Sequence[Reading]) -> None:
        """Read texts teacher-forced, those of one model and about one length together."""
        groups: dict[tuple[str, int], list[Reading]] = {}
        for reading in readings:
            if not reading.cancelled:
                length = _bucket(len(reading.tokens), LENGTH_STEP, self.length)
                groups.setdefault((reading.model, length), []).append(reading)
        for (name, length), members in groups.items():
            try:
                if self._load(name):
                    self._adapters = None if not any(self._jobs) else self._stacked([j and j.model for j in self._jobs])
                for first in range(0, len(members), TOGETHER):
                    self._read_together(name, length, members[first : first + TOGETHER])
            except Exception as error:
                told = (
                    error
                    if isinstance(error, JsublimError)
                    else JsublimError(f"the model failed ({one_line(str(error))})")
                )
                for reading in members:
                    reading.tell(told)

    def _read_together(self, name: str, length: int, members: Sequence[Reading]) -> None:
        n = _bucket(len(members), 1, TOGETHER, by=4)
        tokens, _ = pad_tokens([reading.tokens for reading in members], length, size=n)
        turns = [Turn(row, 1, 1, length) for row in tokens]  # what is added stands behind: no token sees it
        k = min(BEST, self.lm.config.vocab_size - 1)
        read = label_and_best(self.lm.config, self.lm.params, turns, k, adapter=self._known[name])
        for reading, arrays in zip(members, read, strict=False):
            reading.tell([x[: len(reading.tokens) - 1] for x in arrays])


def _widened(adapter: Adapter | None, config: ModelConfig, structure: Structure) -> Adapter:
    """The same function in a structure: what it lacks is zero."""
    nothing_added, lora = init_steering(config), dict[str, Any]()
    adapter, L, shapes = adapter or nothing_added, config.num_layers, projection_shapes(config)
    for name, rank in structure:
        inputs, outputs = shapes[name]
        nothing = {"a": jnp.zeros((L, inputs, rank)), "b": jnp.zeros((L, rank, outputs)), "scale": jnp.zeros(L)}
        lora[name] = adapter.with_rank(rank).lora.get(name, nothing)
    steering = nothing_added.steering if adapter.steering is None else adapter.steering
    return replace(nothing_added, lora=lora, steering=steering)


def _bucket(n: int, least: int, most: int, by: int = 2) -> int:
    """The smallest of least, least x by, ... that is not below n, or `most`: few shapes are few programs."""
    size = least
    while size < n:
        size *= by
    return max(n, min(size, most))


@jax.jit
def _keys(seeds_n: Array, rows_n1: Array) -> Array:
    """The data of rows' keys, uint32 `[n, 1, 2]`, as a call with each seed would have them."""
    fold = lambda seed, row: jax.random.key_data(jax.random.fold_in(jax.random.key(seed), row))  # noqa: E731
    return jax.vmap(fold)(seeds_n, rows_n1[:, 0])[:, None]


@functools.partial(jax.jit, donate_argnums=0)
def _put(every: Any, new: Any, places_n: Array) -> Any:
    """All places with new rows in some of them; one that does not exist is left out."""
    return jax.tree.map(lambda old, x: old.at[places_n].set(x, mode="drop"), every, new)

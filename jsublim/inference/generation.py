"""Continuations of prompts: which rows are decoded together, and who takes the place of a row that has ended."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import chex
import jax
import numpy as np

from jsublim.inference import decoding
from jsublim.inference.batching import (
    MOST_ROWS,
    PROMPT_STEP,
    ROWS_EACH,
    few_sizes,
    has_room_for_layers,
    line_tokens,
    lines_needed,
    round_up,
    shared_beginning,
)
from jsublim.inference.constrain import Limits
from jsublim.inference.decoding import Decoding, Prompts
from jsublim.inference.sampling import Sampling
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, at_every_layer, init_steering, stack_adapters
from jsublim.models.parallel import ARM_ROWS, ARMS, ROWS, WHOLE, Layout, device_bytes
from jsublim.runtime.processes import leave_if_asked, on_main_process

STOP_TOKENS = 8
TURNS, ASK_EVERY = 16, 4.0  # tokens that are drawn at first, and seconds, before it is asked whether to leave
FEW = 32  # rows of a device, whose prompts are read at once
REFILL = 4  # a batch is filled up when one row in so many has ended

OnRows = Callable[[int, list[int], list[list[int]]], None]
OnAllowed = Callable[[int, dict[int, float]], None]


@dataclass(frozen=True)
class BatchSizes:
    """An arm's batch, on each of the `devices` that it is spread over."""

    devices: int
    places: int
    rows: int  # that begin in them at one time
    prompts: int  # that are read for those, at most
    lines: int  # in which they stand
    tokens: int  # of a line

    @classmethod
    def of(cls, config: ModelConfig, batch_size: int, devices: int, lengths: Sequence[int], samples: int) -> BatchSizes:
        """Of prompts of these lengths."""
        count, most = len(lengths) * samples, -(-batch_size // devices)
        B = devices * few_sizes(-(-count // devices), most)
        # All at once where they are few, or a part of the batch whenever so many have ended: reading them is not interrupted.
        at_once = count <= min(B, FEW * devices)
        R = B if at_once else -(-B // REFILL)
        if samples > 1:  # a prompt is read again for each part of its samples: as few parts as can be
            R = max(R, min(B, samples))
        rows = -(-R // devices)
        read = rows if samples == 1 else min(few_sizes(len(lengths), rows), 1 << (rows // samples + 1).bit_length())
        some, longest = lengths[:MOST_ROWS], round_up(max(lengths), PROMPT_STEP)
        tokens = line_tokens(config, longest, lambda tokens: lines_needed(some, tokens))
        needed, step = lines_needed(some, tokens) * min(read, len(lengths)) / len(some), -(-read // 8)
        # Of few numbers, for each is a program.
        if at_once:
            needed = few_sizes(math.ceil(needed), read)
        elif needed < read - step:  # rather too few lines than more than places have room for
            needed = max(1, needed // step) * step
        return cls(devices, B // devices, rows, read, min(read, math.ceil(needed)), tokens)


@dataclass
class _Queue:
    """One arm's rows: those that wait, who sits in which place, and who has ended."""

    waiting: list[int]
    place: dict[int, int] = field(default_factory=dict)  # place -> row
    finished: dict[int, list[int]] = field(default_factory=dict)

    def room(self, places: int, filled: int) -> bool:
        """Whether to read prompts now: of the rows that could be `filled` at once, at least half would be."""
        left = len(self.waiting)
        return left > 0 and 2 * (places - len(self.place)) >= min(filled, left)

    def take(
        self, most: int, lengths: dict[int, int], sizes: BatchSizes, samples: int
    ) -> tuple[list[list[int]], list[int]]:
        """The next rows for at most so many places, by their prompts' room in a device's lines: the prompts of each line, and the rows."""
        lines: list[list[int]] = [[] for _ in range(sizes.lines)]
        left, taken, looked_at = [sizes.tokens] * sizes.lines, list[int](), 4 * sizes.rows
        near = itertools.groupby(self.waiting[:looked_at], lambda row: row // samples)
        for prompt, rows in near:
            if len(taken) == most or sum(map(len, lines)) == sizes.prompts:
                break
            fits = min(
                (i for i, free in enumerate(left) if free >= lengths[prompt]), key=left.__getitem__, default=None
            )
            if fits is not None:
                lines[fits].append(prompt)
                left[fits] -= lengths[prompt]
                taken += itertools.islice(rows, most - len(taken))
        gone = set(taken)
        self.waiting = [row for row in self.waiting[:looked_at] if row not in gone] + self.waiting[looked_at:]
        return lines, taken


def generate_tokens(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray | None],
    sampling: Sampling,
    *,
    adapter: Adapter | None = None,
    rows: Sequence[int] | None = None,
    **options: Any,
) -> list[list[int]]:
    """As `generate_for_arms`, for one model, arm 0: a list of tokens per row of `rows`, in order."""
    adapters, of_arms = None if adapter is None else [adapter], None if rows is None else [rows]
    return generate_for_arms(config, params, prompts, sampling, adapters, rows=of_arms, **options)[0]


def generate_for_arms(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray | None],
    sampling: Sampling,
    adapters: Sequence[Adapter] | None,
    *,
    max_new_tokens: int,
    seed: int,
    samples: int = 1,
    rows: Sequence[Sequence[int]] | None = None,
    batch_size: int | None = None,
    beginning: int | None = None,
    limits: Limits | None = None,
    on_allowed: OnAllowed | None = None,
    on_rows: OnRows | None = None,
) -> list[list[list[int]]]:
    """Sample `samples` continuations of each prompt by several students on one base, in one program; row i continues prompt
    `i // samples`.

    Args:
      prompts: int32 `[T_i]` each; None where no row is asked for. Shapes are those of all that are given, whatever the rows.
      adapters: of equal structure; None is the base alone, one arm.
      rows: of each arm, the rows to sample (their number is their random stream); None is all of them for all.
      batch_size: rows of each arm that are decoded at one time, on all devices together; None is ROWS_EACH on each.
      beginning: how many first tokens all prompts share, which are read once; None finds out.
      limits: the format that `sampling.constrain` names, as `constrain.limits_for` finds it.
      on_allowed: called before `on_rows` with the arm and, of each of its rows, the log (nats) of the probability that the model
        gave to all tokens that the format allows, as a mean over the tokens drawn.
      on_rows: called with the arm, and the numbers and the tokens of rows that have ended.

    Returns:
      For each arm, one list of tokens per row asked for, in order, without the stop token.

    Raises:
      Preempted: as `leave_if_asked`, every few seconds; rows that had ended were told of.
    """
    assert (limits is None) == (sampling.constrain is None), "limits are those that the sampling names"
    asked = [prompt for prompt in prompts if prompt is not None]
    chex.assert_rank(asked, 1)
    # The base has vectors of zeros: it is sampled from by the program of steered models.
    adapters = [at_every_layer(adapter, config.num_layers) for adapter in adapters or [init_steering(config)]]
    A = len(adapters)
    wanted = [list(range(len(prompts) * samples))] * A if rows is None else [list(of_arm) for of_arm in rows]
    if not any(wanted):  # no weights are needed either
        return [[] for _ in wanted]
    layout, params = Layout.under(params, A)
    stacked = layout.place_weights(stack_adapters(adapters), "arm")
    P = shared_beginning(asked, PROMPT_STEP) if beginning is None else beginning
    lengths = {i: len(p) - P for i, p in enumerate(prompts) if p is not None}
    sizes = BatchSizes.of(config, batch_size or ROWS_EACH * layout.data, layout.data, [*lengths.values()], samples)
    B, R = sizes.devices * sizes.places, sizes.devices * sizes.rows
    arms = [_Queue(sorted(numbers)) for numbers in wanted]
    dtype = params["embed"]["weight"].dtype
    slots = decoding.cache_slots(config, P + max(lengths.values()) + max_new_tokens)
    batch = decoding.empty(config, A, B, slots, dtype, limits is not None, layout)
    tokens_AP = layout.place_as(ARMS, np.tile(asked[0][:P], (A, 1)))
    begun = decoding.beginning(config, params, stacked, tokens_AP, layout) if P else None
    key = np.asarray(jax.random.key_data(jax.random.key(seed)))
    everywhere = (key, stop_array(sampling), np.int32(max_new_tokens), limits)
    key, stop, new, limits = layout.place_as(WHOLE, everywhere)
    numbers = layout.place_as(ROWS, sampling_arrays(sampling, B))
    limit, turns = device_bytes(), TURNS
    room = has_room_for_layers(config, dtype.itemsize, limit and limit * layout.model)
    while any(arm.waiting or arm.place for arm in arms):
        while any(arm.room(B, R) for arm in arms):
            read = _next(arms, prompts, lengths, P, sizes, samples, layout)
            batch = decoding.fill(config, params, stacked, begun, batch, read, key, layout)
            if any(arm.room(B, R) for arm in arms):
                jax.block_until_ready(batch.drawn)
                leave_if_asked()
        enough = np.asarray([B - len(arm.place) + R if arm.waiting else B + 1 for arm in arms], np.int32)
        began, most = time.monotonic(), layout.place_as(WHOLE, np.int32(turns))
        how = (numbers, stop, layout.place_as(ARMS, enough), new, limits, layout, most, room)
        batch = decoding.advance(config, params, stacked, batch, *how)
        ended = _collect_finished(arms, batch, on_allowed, on_rows)
        leave_if_asked()
        all_drawn = bool((ended < enough).all() and (ended < B).any())  # so many tokens, and not fewer
        turns = on_main_process(functools.partial(_next_turns, turns, time.monotonic() - began, all_drawn))
    return [[arm.finished[row] for row in rows] for arm, rows in zip(arms, wanted, strict=True)]


def _next_turns(turns: int, seconds: float, all_drawn: bool) -> int:
    """How many tokens take about `ASK_EVERY` seconds, if `turns` (or fewer, unless `all_drawn`) took so many."""
    most = turns * ASK_EVERY / max(seconds, 1e-9)
    return max(1, int(min(most, 8 * turns if all_drawn else turns, decoding.MOST_TURNS)))


def _collect_finished(
    arms: Sequence[_Queue], batch: Decoding, on_allowed: OnAllowed | None, on_rows: OnRows | None
) -> np.ndarray:
    """Take the rows that have ended out of their places, and tell of them. Returns int `[A]`: the places without a row that
    goes on."""
    within = None if on_allowed is None else batch.within
    done, out, within, drawn = Layout.host((batch.done, batch.out, within, batch.drawn))
    for index, arm in enumerate(arms):
        ended = [place for place in sorted(arm.place) if done[index, place]]
        new = {arm.place.pop(place): [int(t) for t in out[index, place] if t >= 0] for place in ended}
        arm.finished |= new
        if new and on_allowed is not None and within is not None:
            allowed = within.log_allowed[index, ended] / drawn[index, ended].astype(np.float32)
            on_allowed(index, dict(zip(new, allowed.tolist(), strict=True)))
        if new and on_rows is not None:
            on_rows(index, list(new), list(new.values()))
    return done.sum(axis=1)


def _next(
    arms: Sequence[_Queue], prompts: Sequence[np.ndarray | None], lengths: dict[int, int], P: int, sizes: BatchSizes, samples: int,
    layout: Layout,
) -> Prompts:  # fmt: skip
    """The next rows of every arm that has places free. A device's places are filled from prompts that it reads itself."""

    def of_device(arm: _Queue, device: int) -> Prompts:
        places = range(device * sizes.places, (device + 1) * sizes.places)
        free = [place for place in places if place not in arm.place]
        lines, taken = arm.take(min(sizes.rows, len(free)), lengths, sizes, samples)
        begins = dict(zip(free, taken, strict=False))
        arm.place |= begins
        number = {prompt: i for i, prompt in enumerate(itertools.chain(*lines))}
        of_place = [number[begins[place] // samples] if place in begins else -1 for place in places]
        row = [begins.get(place, 0) for place in places]
        texts = [[prompts[i][P:] for i in line] for line in lines]  # type: ignore[index]
        return Prompts.of(texts, sizes.tokens, sizes.prompts, of_place, row, P)

    every = [[of_device(arm, device) for device in range(sizes.devices)] for arm in arms]
    of_arms = [jax.tree.map(lambda *x: np.concatenate(x), *devices) for devices in every]
    return layout.place_as(ARM_ROWS, jax.tree.map(lambda *x: np.stack(x), *of_arms))


def sampling_arrays(sampling: Sampling, rows: int) -> dict[str, np.ndarray]:
    """The numbers of `sampling`, one per row: values, not constants, so that none of them recompiles anything."""
    kinds = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "repetition_penalty": np.float32}
    return {name: np.full(rows, getattr(sampling, name), kind) for name, kind in kinds.items()}


def stop_array(sampling: Sampling) -> np.ndarray:
    """The tokens that end a row; of one length whatever their number, so that none of them is another program."""
    ends = sampling.stop or ()
    stop = np.full(max(STOP_TOKENS, len(ends)), -2, np.int32)
    stop[: len(ends)] = ends
    return stop

"""Examples become batches: which rows a step has, and where each lies in its arrays.

A batch consists of lines. A line has one row, or several of them one after another, so that short rows fill up what long ones leave;
what all rows begin with then stands once per line. A token sees its own row and that beginning, so nothing that is
computed changes (but for the order of sums).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from jsublim.distill.data import Example
from jsublim.inference.batching import MOST_COST, TRAINING_STEP, branched, fill, line_cost, pad_tokens, round_up
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import check_length
from jsublim.models.parallel import Layout


def steps_per_epoch(examples: int, rows_per_step: int) -> int:
    """Steps in which every example is seen once; the last may have fewer rows."""
    return -(-examples // rows_per_step)


def batch_rows(examples: int, rows_per_step: int, seed: int, step: int) -> np.ndarray:
    """Example indices of a step, int `[rows_per_step]`, -1 where an epoch's last batch is not full. A function of its arguments only: a
    resumed run needs no state of the data."""
    epoch, position = divmod(step, steps_per_epoch(examples, rows_per_step))
    return epoch_rows(examples, rows_per_step, seed, epoch)[position]


@functools.lru_cache(256)
def epoch_rows(examples: int, rows_per_step: int, seed: int, epoch: int) -> np.ndarray:
    """`batch_rows` of all steps of an epoch, int `[steps, rows_per_step]`, not to be written to."""
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    steps = steps_per_epoch(examples, rows_per_step)
    rows = np.pad(order, (0, steps * rows_per_step - examples), constant_values=-1).reshape(steps, -1)
    rows.flags.writeable = False
    return rows


@dataclass(frozen=True)
class Fork:
    """Where an arm goes over to other rows: of its examples the first `rows` are learned for `after` steps, the others from then on."""

    after: int
    rows: int
    moments: bool = True  # the optimizer keeps them; otherwise it begins anew there


def forked_rows(examples: int, rows_per_step: int, seed: int, step: int, fork: Fork) -> np.ndarray:
    """`batch_rows` of an arm with a fork. The other rows are in an order of their own, begun at the fork."""
    if step < fork.after:
        return batch_rows(fork.rows, rows_per_step, seed, step)
    later = batch_rows(examples - fork.rows, rows_per_step, seed, step - fork.after)
    return np.where(later >= 0, later + fork.rows, -1)


@dataclass(frozen=True)
class Shape:
    """Static shape of the batches of arms that are trained together."""

    accumulate: int  # micro-batches per step, M
    batch_size: int  # rows of a micro-batch
    tokens: int  # of a line, as the student reads it, T
    labels: int  # supervised positions of a line, C
    teacher: int = 0  # tokens of a line as a live teacher reads it; 0 without one
    spare: int = 0  # empty lines of a micro-batch that only make their number B divisible by the devices
    rows_per_line: int = 1  # at most
    beginning: int = 0  # tokens that every row begins with, if they stand once per line

    @staticmethod
    def of(groups: Sequence[Sequence[Example]], accumulate: int, batch_size: int) -> Shape:
        """The smallest shape with a row per line that all examples of some groups go into."""
        lengths = np.concatenate([lengths_of(group) for group in groups]).max(axis=0)
        return Shape.fit(accumulate, batch_size, *map(int, lengths))

    @staticmethod
    def fit(accumulate: int, batch_size: int, tokens: int, labels: int, teacher: int = 0) -> Shape:
        """A shape with its lengths rounded up."""
        return Shape(accumulate, batch_size, *(round_up(n, TRAINING_STEP) for n in (tokens, labels, teacher)))

    def divisible(self, devices: int) -> Shape:
        """With as many empty lines per micro-batch as make it a multiple of `devices`."""
        return replace(self, spare=-self.filled % devices)

    @property
    def filled(self) -> int:
        """Lines of a micro-batch that may hold rows."""
        return -(-self.batch_size // self.rows_per_line)

    @property
    def lines(self) -> int:
        """Lines of a micro-batch, B."""
        return self.filled + self.spare

    @property
    def rows_per_step(self) -> int:
        """Rows of a step that may hold an example."""
        return self.accumulate * self.batch_size

    def idle(self, arms: int, layout: Layout) -> str | None:
        """A warning of arms on a layout where more than an eighth of the lines are empty; None where it is less."""
        if 8 * self.spare <= self.lines:
            return None
        copies = layout.arm * layout.data
        more = copies // math.gcd(self.filled, copies)
        students = f"a multiple of {more} students in a program, or " if layout.mode == "mesh" else ""
        return (
            f"{arms} students on arm {layout.arm} x data {layout.data} x model {layout.model}: {self.spare} of {self.lines} lines "
            f"of a batch are empty; {students}students.data.batch_size={self.lines * self.rows_per_line} (another training) would fill them"
        )

    def placed(self, chosen: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        """Which rows lie on each of a step's M * B lines: `chosen` int `[rows_per_step]`, -1 where there is none, of so many tokens (`lengths`)."""
        rows, lines = chosen.reshape(self.accumulate, self.batch_size), list[list[int]]()
        line_of = folded(np.where(rows >= 0, lengths.reshape(rows.shape), 0), self.filled)
        for micro, to in zip(rows, line_of, strict=True):
            first = len(lines)
            lines += [[] for _ in range(self.lines)]
            for line, row in zip(to, micro, strict=True):
                if row >= 0:
                    lines[first + line].append(int(row))
        return lines


def folded(lengths: np.ndarray, lines: int) -> np.ndarray:
    """The line of each row, int like `lengths` `[..., n]`, so that lines are about equally long: the longest rows go to a line
    each, the next ones to the same lines in reverse order, and so on. Where there is a line for each row, rows stay in order."""
    turn, place = np.divmod(np.arange(lengths.shape[-1]), lines)
    if not turn.any():
        return np.broadcast_to(place, lengths.shape)
    line = np.empty(lengths.shape, int)
    to = np.broadcast_to(np.where(turn % 2 == 0, place, lines - 1 - place), lengths.shape)
    np.put_along_axis(line, np.argsort(-lengths, axis=-1, kind="stable"), to, axis=-1)
    return line


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Tokens, supervised positions, and tokens under a live teacher, of each example: int `[n, 3]`."""
    return np.array(
        [[len(e.tokens), len(e.labels), 0 if e.teacher_tokens is None else len(e.teacher_tokens)] for e in examples]
    )


@dataclass(frozen=True)
class Order:
    """The rows of one arm as their lengths `[n, 3]` (see `lengths_of`), and the order in which it takes them."""

    lengths: np.ndarray
    seed: int
    steps: int


MOST_ROWS_PER_LINE = 4
LINE_STEP = 32  # tokens of a line with several rows: arms that draw other rows should have the same


def packed(shape: Shape, config: ModelConfig, orders: Sequence[Order], beginning: int) -> Shape:
    """With as many rows per line as make a step cheapest; the shape as it is, a row per line, if that is one. `orders` and `beginning` are as
    of `with_lines_of`."""
    check_length(config, max(shape.tokens, shape.teacher))  # of lines that hold several rows nobody else can tell
    most = min(MOST_ROWS_PER_LINE, shape.batch_size)
    shapes = [shape, *(with_lines_of(k, shape, orders, beginning) for k in range(2, most + 1))]
    costs = [_cost(packing, config) for packing in shapes]
    best = int(np.argmin(costs))
    return shapes[best] if costs[best] < MOST_COST * costs[0] else shape


def with_lines_of(k: int, shape: Shape, orders: Sequence[Order], beginning: int) -> Shape:
    """With k rows per line, for the rows of every arm that is to fit; `beginning` counts the tokens that all rows begin with, before any that is
    supervised. How long lines are is known beforehand: which rows a step has follows from the seed."""
    wide = replace(shape, rows_per_line=k, beginning=beginning)
    tokens, labels, teacher = np.max([_longest(wide, order) for order in orders], axis=0)
    lengths = {"tokens": tokens + beginning, "labels": labels, "teacher": teacher}
    return replace(wide, **{name: round_up(int(n), LINE_STEP) for name, n in lengths.items()})


def _longest(shape: Shape, order: Order) -> np.ndarray:
    """The longest line of all epochs of an arm, beginning left out, as `lengths_of` counts: int `[3]`."""
    rows, longest = order.lengths - [shape.beginning, 0, 0], np.zeros(3, int)
    for epoch in range(-(-order.steps // steps_per_epoch(len(rows), shape.rows_per_step))):
        micro = epoch_rows(len(rows), shape.rows_per_step, order.seed, epoch).reshape(-1, shape.batch_size)
        lengths = np.where(micro[..., None] >= 0, rows[micro], 0)
        sums = np.zeros((len(micro), shape.filled, 3), int)
        np.add.at(sums, (np.arange(len(micro))[:, None], folded(lengths[..., 0], shape.filled)), lengths)
        longest = np.maximum(longest, sums.max(axis=(0, 1)))
    return longest


def _cost(shape: Shape, config: ModelConfig) -> float:
    """Operations of a micro-batch in one layer, in the same unit for every shape."""
    return shape.filled * sum(line_cost(config, T) for T in (shape.tokens, shape.teacher))


def one_after_another(rows: Sequence[np.ndarray], beginning: int) -> np.ndarray:
    """Something of each token of some rows `[T_i, ...]`, as it lies on a line: the rows' beginning once, and the rest of each."""
    return np.concatenate([rows[0][:beginning], *(row[beginning:] for row in rows)])


def joined(rows: Sequence[Example], beginning: int) -> Example:
    """Rows one after another, as one line."""
    kinds = {name: [getattr(row, name) for row in rows] for name in (f.name for f in fields(Example))}
    known = {name: values for name, values in kinds.items() if values[0] is not None}
    made = {name: np.concatenate(known[name]) for name in ("labels", "weights", "ids", "logp") if name in known}
    for prefix, first in (("", beginning), ("teacher_", 0)):
        if f"{prefix}tokens" not in known:
            continue
        tokens = known[f"{prefix}tokens"]
        rest = [len(row) - first for row in tokens]
        before = np.cumsum([0, *rest[:-1]])
        made |= {
            f"{prefix}tokens": one_after_another(tokens, first),
            f"{prefix}where": np.concatenate([at + n for at, n in zip(known[f"{prefix}where"], before, strict=True)]),
        }
        made[f"{prefix}positions"], made[f"{prefix}branch"] = branched(first, rest)
    return Example(
        **{name: value if value.dtype == np.float32 else value.astype(np.int32) for name, value in made.items()}
    )


def collate(examples: Sequence[Example], chosen: np.ndarray, shape: Shape) -> dict[str, np.ndarray]:
    """One arm's batch: arrays `[M, B, T]` and `[M, B, C, ...]` of the examples `chosen`, int `[shape.rows_per_step]`; -1 is an absent row,
    which weighs nothing."""
    lines = shape.placed(chosen, np.array([len(examples[row].tokens) for row in chosen]))
    several = shape.rows_per_line > 1
    make = (lambda rows: joined(rows, shape.beginning)) if several else (lambda rows: rows[0])
    placed = [make([examples[row] for row in line]) if line else None for line in lines]
    like = make(examples[:1])
    length = {"tokens": shape.tokens, "positions": shape.tokens, "branch": shape.tokens}
    length |= {f"teacher_{name}": shape.teacher for name in length}
    batch: dict[str, np.ndarray] = {}
    for field in fields(like):
        value = getattr(like, field.name)
        values = [None if line is None else getattr(line, field.name) for line in placed]
        if value is None or length.get(field.name) == 0:
            continue
        if field.name.endswith("tokens"):
            batch[field.name], batch[field.name.replace("tokens", "valid")] = pad_tokens(values, length[field.name])
        else:
            batch[field.name] = fill(values, length.get(field.name, shape.labels), value)
    return {key: value.reshape(shape.accumulate, -1, *value.shape[1:]) for key, value in batch.items()}

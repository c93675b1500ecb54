"""Rows of unequal length as arrays of few shapes: padding, lengths rounded up, and lines that short rows share.

Every shape is one compiled program, so lengths are multiples of a step: what a step is, is said here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jsublim.models.config import ModelConfig, layer_parameters
from jsublim.models.decoder import parameter_count
from jsublim.models.parallel import SHARE

LENGTH_STEP = 32  # tokens of prompts and conversations
CACHE_STEP = 64  # tokens that a row of a cache has room for
PROMPT_STEP = 16  # tokens that all prompts of a sampling begin with, and of the lines that they stand in
PREFIX_STEP = 8  # tokens of a shared prefix, and of completions that are scored
TRAINING_STEP = 16  # tokens of rows that are trained on, and their supervised positions

FEW_LINES = 16  # as many rows have a line each
ROWS_EACH = 64  # rows that a device samples or reads at one time, where nobody says
LONGEST = 512  # tokens of a row, for what its cache may take
MOST_ROWS = 1024  # that are sampled or read at one time

MOST_COST = 0.95  # of that of lines with one row; a smaller gain is not worth longer attention
ATTENTION_COST = 7  # of an operation of attention, in operations of a projection (docs/performance.md)


def rows_together(config: ModelConfig, itemsize: int, otherwise: int, limit: int | None, copies: int = 1) -> int:
    """How many rows to sample or read at one time: beside each of `copies` of the weights a power of two whose caches, and whose numbers inside a
    layer, take no more than half of what there is.

    Args:
      itemsize: bytes of a parameter.
      otherwise: where devices are the CPU, which large batches do not make faster.
      limit: bytes of the devices that one copy of the weights is spread over (`parallel.device_bytes`); None for a CPU.
    """
    if limit is None:
        return copies * otherwise
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    inside = 8 * config.hidden_size + 3 * config.intermediate_size
    rows = (SHARE * limit - itemsize * parameter_count(config)) / 2 / (itemsize * LONGEST * (cached + inside))
    return copies << (min(MOST_ROWS, max(1, int(rows))).bit_length() - 1)


def has_room_for_layers(config: ModelConfig, itemsize: int, limit: int | None) -> bool:
    """Whether the layers may lie there a second time beside the weights and the rows of `rows_together`, which has `itemsize` and
    `limit` too."""
    return limit is None or 3 * itemsize * parameter_count(config) <= SHARE * limit


def round_up(n: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `n`."""
    return -(-n // step) * step


def few_sizes(n: int, most: int) -> int:
    """`n` rows, or up to a quarter more, but at most `most`: each size is a program. Up to 8 a power of two, then one of four from one power to
    the next."""
    bits = (n - 1).bit_length()
    return min(most, round_up(n, 1 << (bits - 3)) if n > 8 else 1 << bits)


def chunks(count: int, size: int) -> Iterator[slice]:
    """`count` rows in batches of at most `size`."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


Batches = list[tuple[int, np.ndarray]]  # of each the number of its first row, and the line of each of its rows, int [n]


def line_cost(config: ModelConfig, tokens: int) -> float:
    """Operations of a line of so many tokens in one layer, in operations of a projection."""
    return tokens * (layer_parameters(config) + ATTENTION_COST * 2 * tokens * config.num_heads * config.head_dim)


def line_tokens(config: ModelConfig, longest: int, lines_of: Callable[[int], int]) -> int:
    """Tokens of a line: as many as the longest row has, or twice as many where that is less work. `lines_of` says how many lines there are of
    so many tokens."""
    one, two = (lines_of(k * longest) * line_cost(config, k * longest) for k in (1, 2))
    return 2 * longest if two < MOST_COST * one else longest


def in_lines(lengths: np.ndarray, tokens: int, most: int, devices: int = 1) -> tuple[int, Batches]:
    """Consecutive rows in batches of lines of so many tokens, where short rows stand one after another in a line: how many lines a batch has, at
    most about `most` and divisible by the devices, and the batches. Few rows have a line each: what they would save is less than the
    compilation of another shape."""
    if len(lengths) <= FEW_LINES:
        most = few_sizes(len(lengths), most)
        return round_up(most, devices), [(p.start, np.arange(p.stop - p.start)) for p in chunks(len(lengths), most)]
    some = lengths[:MOST_ROWS]
    needed = lines_needed(some, tokens) * len(lengths) / len(some)
    # All batches alike, so that the last is full too; of few numbers, for each is a program.
    for count in itertools.count(math.ceil(needed / most)):
        each = math.ceil(needed / count)
        step = math.lcm(devices, 1 << max(0, each.bit_length() - 5))
        for lines in range(round_up(each, step), round_up(most, step) + 1, step):
            if len(batches := _batches(lengths, tokens, lines)) <= count:
                return lines, batches
    raise AssertionError("as many batches as rows are enough")


def _batches(lengths: np.ndarray, tokens: int, lines: int) -> Batches:
    """Consecutive rows in batches of so many lines, as many rows in each as have room."""
    batches, first = Batches(), 0
    while first < len(lengths):
        fit = min(lines, len(lengths) - first)  # a line each
        line, limit = np.arange(fit), int(np.searchsorted(np.cumsum(lengths[first:]), lines * tokens, side="right"))
        while fit < limit:
            count = (fit + limit + 1) // 2
            tried = _first_fit(lengths[first : first + count], tokens, lines)
            if tried is None:
                limit = count - 1
            else:
                fit, line = count, tried
        batches.append((first, line))
        first += fit
    return batches


def lines_needed(lengths: Sequence[int] | np.ndarray, tokens: int) -> int:
    """In how many lines of so many tokens rows of these lengths have room."""
    line = _first_fit(np.asarray(lengths), tokens, len(lengths))
    assert line is not None, "a line for each"
    return int(line.max()) + 1


def _first_fit(lengths: np.ndarray, tokens: int, lines: int) -> np.ndarray | None:
    """The line of each row, int `[n]`, so that the rows of a line have at most so many tokens together: the longest row first, each in the
    first line where it fits. None: they take more lines."""
    room, line = np.full(lines, tokens), np.empty(len(lengths), int)
    for row in np.argsort(-lengths, kind="stable"):
        line[row] = np.argmax(room >= lengths[row])
        room[line[row]] -= lengths[row]
        if room[line[row]] < 0:
            return None
    return line


def shared_beginning(rows: Sequence[np.ndarray], step: int) -> int:
    """How many first tokens all rows have in common, rounded down to a multiple of `step`; each keeps one of its own. A single
    row shares nothing."""
    first, length = rows[0], min(map(len, rows)) - 1
    for row in rows:
        differs = np.nonzero(row[:length] != first[:length])[0]
        length = int(differs[0]) if len(differs) else length
    return length // step * step if len(rows) > 1 else 0


def branched(first: int, rest: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Position and branch (`decoder.Branches`) of each token of a beginning of `first` tokens and of texts of so many after it,
    int32 `[T]` each."""
    positions = np.concatenate([np.arange(first), *(first + np.arange(n) for n in rest)])
    return positions.astype(np.int32), np.repeat(np.arange(len(rest) + 1), [first, *rest]).astype(np.int32)


def fill(values: Sequence[np.ndarray | None], length: int, like: np.ndarray) -> np.ndarray:
    """Arrays `[n_i, ...]` as one `[rows, length, ...]` with the dtype and the further axes of `like`; zero where an array does not reach, and
    in the whole row of a None."""
    out = np.zeros((len(values), length, *like.shape[1:]), like.dtype)
    for row, value in zip(out, values, strict=True):
        if value is not None and len(value):
            row[: len(value)] = value
    return out


def pad_tokens(
    rows: Sequence[np.ndarray | None], length: int, *, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token rows `[n_i]` as int32 `[size, length]`, and which of those are tokens, bool. A row that is absent (None, or one added to make up
    `size`) has one token: attention needs something to look at."""
    rows = [*rows, *[None] * ((size or len(rows)) - len(rows))]
    tokens = fill(rows, length, np.zeros(0, np.int32))
    valid = fill([np.ones(1 if row is None else len(row), bool) for row in rows], length, np.zeros(0, bool))
    return tokens, valid

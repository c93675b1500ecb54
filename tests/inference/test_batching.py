"""Rows of unequal length in arrays: nothing is lost, and what is added is known as such."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsublim.config import find_config
from jsublim.inference.batching import LONGEST, chunks, few_sizes, fill, in_lines, pad_tokens, round_up, rows_together
from jsublim.models import read_config

ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def test_rows_have_few_sizes_little_larger_than_they_are():
    sizes = {n: few_sizes(n, 10_000) for n in range(1, 1025)}
    assert all(n <= size <= (1.25 * n if n > 8 else 2 * n - 1) for n, size in sizes.items())
    assert len({*sizes.values()}) == 4 + 7 * 4  # a power of two up to 8, then four a doubling
    assert few_sizes(5, 6) == 6 and few_sizes(100, 100) == 100


@given(n=st.integers(0, 300), step=st.integers(1, 64))
def test_a_length_is_rounded_up_by_less_than_a_step(n, step):
    assert round_up(n, step) % step == 0 and 0 <= round_up(n, step) - n < step


@given(count=st.integers(0, 40), size=st.integers(1, 9))
def test_batches_are_all_rows_once(count, size):
    parts = [list(range(count))[part] for part in chunks(count, size)]
    assert [row for part in parts for row in part] == list(range(count))
    assert all(0 < len(part) <= size for part in parts)


@given(lengths=ROWS, spare=st.integers(0, 3), absent=st.integers(0, 11))
@settings(max_examples=40)
def test_padding_can_be_undone(lengths, spare, absent):
    rows = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    given_rows = [None if i == absent else row for i, row in enumerate(rows)]
    tokens, valid = pad_tokens(given_rows, 48, size=len(rows) + spare)
    assert tokens.shape == valid.shape == (len(rows) + spare, 48) and tokens.dtype == np.int32
    for i, (token_row, valid_row) in enumerate(zip(tokens, valid, strict=True)):
        if i < len(rows) and i != absent:
            assert np.array_equal(token_row[valid_row], rows[i]) and valid_row[0] and not token_row[~valid_row].any()
        else:  # attention needs something to look at
            assert valid_row.sum() == 1 and valid_row[0] and not token_row.any()


@pytest.mark.parametrize("count", [48, 64, 100, 128, 200, 300, 1000])
@pytest.mark.parametrize("devices", [1, 4])
def test_lines_of_rows_of_many_lengths_are_nearly_full_in_every_batch(count, devices):
    lengths = np.random.default_rng(count).integers(20, 201, count)
    lines, batches = in_lines(lengths, 224, 64, devices)
    assert (
        lines % devices == 0
        and lines <= 64
        and [first for first, _ in batches] == [sum(len(line) for _, line in batches[:i]) for i in range(len(batches))]
    )
    assert sum(len(line) for _, line in batches) == count
    assert all(np.bincount(line, lengths[i : i + len(line)], lines).max() <= 224 for i, line in batches)
    assert (
        lengths.sum() <= len(batches) * lines * 224 <= (1.15 if count >= 100 or devices == 1 else 1.25) * lengths.sum()
    )


@given(
    lengths=st.lists(st.integers(1, 40), min_size=17, max_size=90), most=st.integers(1, 12), devices=st.integers(1, 3)
)
def test_rows_of_any_lengths_have_room_in_their_lines(lengths, most, devices):
    lines, batches = in_lines(np.asarray(lengths), 40, most, devices)
    assert lines % devices == 0 and sum(len(line) for _, line in batches) == len(lengths)
    assert all(np.bincount(line, lengths[i : i + len(line)], lines).max() <= 40 for i, line in batches)


def test_further_axes_and_dtypes_are_kept_and_what_is_too_long_is_refused():
    like = np.ones((2, 3), np.float16)
    out = fill([like, None], 4, like)
    assert out.shape == (2, 4, 3) and out.dtype == np.float16 and out.sum() == 6 and not out[1].any()
    with pytest.raises(ValueError, match="broadcast"):
        fill([np.zeros(5)], 4, np.zeros(0))


@pytest.mark.parametrize(
    ("shape", "gib", "rows"),
    [("qwen2.5-7b", 80, 256), ("qwen2.5-7b", 32, 64), ("qwen2.5-7b", 8, 1), ("gemma-3-1b", 80, 512)],
)
def test_as_many_rows_together_as_memory_holds(shape, gib, rows):
    _, config = read_config(find_config(f"configs/shapes/{shape}/config.json").parent)
    assert rows_together(config, 2, 64, gib * 2**30) == rows
    assert rows_together(config, 2, 64, None) == 64  # a CPU
    assert rows_together(config, 2, 64, gib * 2**30, copies=6) == 6 * rows
    cache = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * LONGEST * rows
    assert rows == 1 or cache < gib * 2**30 / 2

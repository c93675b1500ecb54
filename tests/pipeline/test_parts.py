"""Arrays of unfinished artifacts: what was saved is never computed again, and what is damaged is."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bitflips import flip
from hypothesis import given, settings
from hypothesis import strategies as st

from jsublim.pipeline import parts
from jsublim.pipeline.parts import resumed
from jsublim.pipeline.readings import PIECE, read_readings, write_readings
from jsublim.runtime.processes import Preempted, heeding_signals


class Killed(Exception):
    pass


def row(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of a length of its own, zero among them."""
    rng = np.random.default_rng(number)
    n = number % 4
    return rng.integers(0, 99, n, dtype=np.int32), rng.standard_normal((n, 3)).astype(np.float32)


@pytest.fixture
def at_once(monkeypatch) -> None:
    monkeypatch.setattr(parts, "SAVE_EVERY", -1.0)


@settings(max_examples=40)
@given(stops=st.lists(st.integers(0, 12), max_size=4), damaged=st.integers(0, 14), every=st.sampled_from([-1.0, 99.0]))
def test_any_kills_give_the_same_rows(stops, damaged, every):
    asked: list[int] = []

    def rows_from(first: int, stop: int = 99) -> Iterator[tuple[np.ndarray, ...]]:
        for number in range(first, 12):
            if number == stop:
                raise Killed
            asked.append(number)
            yield row(number)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "SAVE_EVERY", every)
        for stop in stops:
            with contextlib.suppress(Killed):
                resumed(Path(folder), "a", lambda first, stop=stop: rows_from(first, stop))
        for path in sorted((Path(folder) / "parts").glob("*.npz"))[damaged : damaged + 1]:
            path.write_bytes(path.read_bytes()[:50])
        asked.clear()
        known: list[int] = []
        found = resumed(Path(folder), "a", rows_from, known.append)
        assert sum(known) + len(asked) == 12 == len(found)
        for number, arrays in enumerate(found):
            for ours, theirs in zip(arrays, row(number), strict=True):
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)
        asked.clear()
        resumed(Path(folder), "a", rows_from)
        assert not asked
        assert len(resumed(Path(folder), "b", rows_from)) == 12 and len(asked) == 12  # another series


def test_what_was_saved_is_not_computed_again(tmp_path, at_once):
    asked = []

    def rows_from(first: int) -> Iterator[tuple[np.ndarray, ...]]:
        for number in range(first, 6):
            asked.append(number)
            if len(asked) == 4:
                raise Killed
            yield row(number)

    with pytest.raises(Killed):
        resumed(tmp_path, "a", rows_from)
    assert len(resumed(tmp_path, "a", rows_from)) == 6 and asked == [0, 1, 2, 3, 3, 4, 5]


@settings(max_examples=60)
@given(bit=st.integers(0, 100_000))
def test_a_file_of_which_a_bit_has_flipped_is_computed_again_and_that_is_said(bit):
    with tempfile.TemporaryDirectory() as folder:
        said: list[str] = []
        resumed(Path(folder), "a", lambda first: map(row, range(first, 6)))
        (path,) = (Path(folder) / "parts").glob("*.npz")
        flip(path, bit % (8 * path.stat().st_size))
        asked: list[int] = []
        found = resumed(
            Path(folder), "a", lambda first: (asked.append(n) or row(n) for n in range(first, 6)), say=said.append
        )
        assert asked == list(range(6)) and len(said) == 1 and str(path) in said[0]
        assert all(
            np.array_equal(ours, theirs) for n in range(6) for ours, theirs in zip(found[n], row(n), strict=True)
        )


@pytest.mark.parametrize("count", [0, 1, PIECE, PIECE + 3])
def test_readings_come_back_as_they_were_written(tmp_path, count):
    rng = np.random.default_rng(0)

    def reading(number: int) -> dict:
        n = number % 5 + 1
        return {
            "teachers": ["cat", "owl"],
            "divergence_positions": [0] if number % 2 else [],
            "tokens": rng.integers(0, 99, n, dtype=np.int32),
            "argmax": rng.integers(0, 99, (2, n), dtype=np.int32),
            "margin": rng.random((2, n), dtype=np.float32),
        }

    written = [reading(number) for number in range(count)]
    write_readings(tmp_path / "readings.parquet", iter(written))
    read = list(read_readings(tmp_path / "readings.parquet"))
    assert [each["row"] for each in read] == list(range(count))
    for ours, theirs in zip(read, written, strict=True):
        assert ours["teachers"] == theirs["teachers"]
        assert ours["divergence_positions"] == theirs["divergence_positions"]
        for key in ("tokens", "argmax", "margin"):
            assert ours[key].dtype == theirs[key].dtype
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_rows_read_before_a_signal_are_kept(tmp_path):
    def rows_from(first: int, until: int = 99) -> Iterator[tuple[np.ndarray, ...]]:
        for number in range(first, 12):
            if number == until:
                os.kill(os.getpid(), signal.SIGTERM)
            yield row(number)

    with heeding_signals(), pytest.raises(Preempted, match="8 rows of a are kept"):
        resumed(tmp_path, "a", lambda first: rows_from(first, 7))
    known: list[int] = []
    assert len(resumed(tmp_path, "a", rows_from, known.append)) == 12 and known == [8]

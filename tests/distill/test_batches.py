"""Batches: rows that share a line are learned from as rows that do not, and every step fits the shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine import CONFIG, arm_of, examples_of, largest_difference, params_of
from hypothesis import given
from hypothesis import strategies as st
from tiny import metrics

from jsublim.distill import batches
from jsublim.distill.arm import Settings
from jsublim.distill.batches import Order, Shape, collate, folded, lengths_of, packed
from jsublim.distill.losses import Loss
from jsublim.distill.memory import rows_at_once
from jsublim.distill.step import Program
from jsublim.distill.trainer import train
from jsublim.errors import JsublimError, UsageError
from jsublim.models.config import Rope
from jsublim.pipeline.training import in_pieces

BEGINNING = 3


def begun_alike(seed: int, soft: str | None = None) -> list:
    """Rows that have their first tokens in common, none of them supervised."""
    made = []
    for row in examples_of(seed, 9, soft=soft):
        tokens = np.concatenate([np.arange(1, 1 + BEGINNING), row.tokens]).astype(np.int32)
        made.append(replace(row, tokens=tokens, where=row.where + np.int32(BEGINNING)))
    return made


CASES = {
    "lora, near the base": ("lora", Loss(terms=("kl_to_base",)), None, False, 0),
    "one layer, known below": ("one", Loss(), None, True, BEGINNING),
    "whole weights, live teacher": ("full", Loss("forward-kl"), "live", False, BEGINNING),
    "steering, stored teacher": ("steering", Loss("js"), "stored", False, BEGINNING),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_that_share_a_line_are_learned_from_as_alone(case, tmp_path):
    kind, loss, soft, cached, beginning = CASES[case]
    arms = [arm_of(kind, seed, examples=begun_alike(seed, soft)) for seed in (1, 2)]
    settings = Settings(batch_size=4, accumulate=2, program=Program(loss), cache_below=cached)
    plain = Shape.of([arm.examples for arm in arms], 2, 4)
    orders = [Order(lengths_of(arm.examples), arm.seed, arm.steps) for arm in arms]
    found = {}
    for k in (1, 3):
        shape = plain if k == 1 else batches.with_lines_of(k, plain, orders, beginning)
        students = train(CONFIG, params_of(CONFIG), arms, settings, tmp_path / str(k), shape=shape)
        found[k] = [student.trainable for student in students]
    assert shape.lines == 2 and shape.beginning == beginning
    assert largest_difference(found[1], found[3]) < 2e-5
    assert largest_difference(found[1], [arm.adapter.trainable for arm in arms]) > 1e-3
    for one, other in zip(metrics(tmp_path / "1"), metrics(tmp_path / "3"), strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 40))
def test_folding_gives_every_row_a_place_and_lines_about_one_length(lengths, lines):
    lengths = np.array(lengths)
    line = folded(lengths, lines)
    count = np.bincount(line, minlength=lines)
    assert len(count) == lines and count.max() <= -(-len(lengths) // lines)
    sums = np.bincount(line, lengths, minlength=lines)
    # The longest row makes the difference: what is folded over it is never more than a row longer elsewhere.
    assert sums.max() - sums.min() <= lengths.max()


@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 7), st.integers(0, 5), st.integers(1, 9))
def test_every_step_fits_the_shape_that_was_planned(examples, accumulate, batch_size, seed, steps):
    rng = np.random.default_rng(examples)
    rows = [row for row in examples_of(int(rng.integers(99)), examples, longest=30)]
    order = Order(lengths_of(rows), seed, steps)
    plain = Shape.of([rows], accumulate, batch_size)
    for k in range(2, min(4, batch_size) + 1):
        shape = batches.with_lines_of(k, plain, [order], 0)
        for step in range(steps):
            chosen = batches.batch_rows(len(rows), shape.rows_per_step, seed, step)
            batch = collate(rows, chosen, shape)
            wanted = [rows[i] for i in chosen if i >= 0]
            empty = shape.accumulate * shape.lines - len(
                {tuple(line) for line in shape.placed(chosen, order.lengths[chosen, 0]) if line}
            )
            # Of an empty line one token counts as read, so that its attention is finite.
            assert batch["valid"].sum() == empty + sum(len(row.tokens) for row in wanted)
            assert sorted(batch["labels"][batch["weights"] > 0]) == sorted(
                np.concatenate([row.labels[row.weights > 0] for row in wanted])
            )


WIDE = replace(CONFIG, hidden_size=3584, intermediate_size=18944, num_heads=28, num_kv_heads=4, head_dim=128)
NARROW = replace(CONFIG, hidden_size=128, intermediate_size=256, num_heads=8, num_kv_heads=2, head_dim=32)


def orders_of(rows: int = 600) -> list[Order]:
    tokens = np.random.default_rng(0).integers(90, 180, rows)
    return [Order(np.stack([tokens, tokens // 3, 0 * tokens], 1), 1, 20)]


def test_lines_are_shared_where_projections_outweigh_attention():
    plain = Shape.fit(6, 10, 180, 60)
    assert packed(plain, NARROW, orders_of(), 24) == plain
    shape = packed(plain, WIDE, orders_of(), 24)
    assert shape.rows_per_line > 1 and shape.beginning == 24
    mean = orders_of()[0].lengths[:, 0].mean()
    assert shape.filled * shape.tokens < 1.2 * 10 * mean < plain.filled * plain.tokens


def test_a_row_that_is_too_long_for_its_positions_is_refused_although_it_shares_a_line():
    longrope = replace(WIDE, rope=Rope(1e4, "longrope", divisors=(1.0,) * 64, original_positions=128))
    with pytest.raises(JsublimError, match=r"rows of 192 tokens: .*original_max_position_embeddings, 128"):
        packed(Shape.fit(6, 10, 180, 60), longrope, orders_of(), 24)


def test_rows_at_once_fill_a_device_and_fit_it():
    settings = Settings(batch_size=10, accumulate=6)
    fits = lambda settings=settings, arms=1, gib=80: rows_at_once(  # noqa: E731
        replace(WIDE, num_layers=28, vocab_size=152064), settings, 192, arms, itemsize=2, limit=gib and gib * 2**30
    )
    # What a backward pass keeps of a row is .57 GiB; half of what is left beside 14 GiB of weights is for that.
    assert fits() == 30 and fits(gib=32) == 12 and fits(gib=16) == 1
    assert fits(gib=1000) == 60 and fits(gib=1000, arms=4) == 20  # 16,384 tokens are 85 rows
    assert fits(gib=None) == 10  # a CPU
    assert fits(replace(settings, program=Program(per="micro-batch"))) == 10


def test_a_step_in_other_pieces_is_the_same_step(tmp_path):
    arms, found = [arm_of("lora", 1)], []
    settings, shape = Settings(batch_size=2, accumulate=3), Shape.of([arms[0].examples], 3, 2)
    for rows in (2, 6):
        cut, own = in_pieces(settings, shape, rows)
        (student,) = train(CONFIG, params_of(CONFIG), arms, cut, tmp_path / str(rows), shape=own)
        found.append(student.trainable)
    assert largest_difference(*found) < 1e-5
    with pytest.raises(UsageError, match=r"rows_at_once: 4 given.*6 rows"):
        in_pieces(settings, shape, 4)
    with pytest.raises(UsageError, match=r"rows_at_once: 3 given.*micro-batches of 2"):
        in_pieces(replace(settings, program=Program(per="micro-batch")), shape, 3)

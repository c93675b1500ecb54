"""A fork: other rows in the middle of training, with the optimizer's moments or without."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from engine import CONFIG, arm_of, examples_of, largest_difference, params_of

from jsublim.distill.arm import Settings
from jsublim.distill.batches import Fork, Shape, batch_rows, forked_rows
from jsublim.distill.optimizer import Optimizer
from jsublim.distill.step import Program
from jsublim.distill.trainer import train

FIRST, THEN = examples_of(1, 5), examples_of(2, 4)
SHAPE = Shape.of([FIRST, THEN], 2, 2)


def settings(optimizer: str) -> Settings:
    return Settings(2, 2, Program(optimizer=Optimizer(optimizer, schedule="constant"), warmup=0))


def forked(moments: bool, name: str = "forked"):
    arm = arm_of("lora", 1, examples=[*FIRST, *THEN], steps=5)
    return dataclasses.replace(arm, name=name, fork=Fork(2, len(FIRST), moments))


def trained(arms, how, work):
    return train(CONFIG, params_of(CONFIG), arms, how, work, shape=SHAPE)


def test_the_rows_of_a_step():
    fork = Fork(3, 5)
    for step in range(3):
        np.testing.assert_array_equal(forked_rows(9, 4, 7, step, fork), batch_rows(5, 4, 7, step))
    for step in range(3, 8):
        own = batch_rows(4, 4, 7, step - 3)
        np.testing.assert_array_equal(forked_rows(9, 4, 7, step, fork), np.where(own >= 0, own + 5, -1))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_without_moments_it_is_a_second_training_from_where_the_first_one_stood(optimizer, tmp_path):
    how = settings(optimizer)
    (until,) = trained([arm_of("lora", 1, examples=FIRST, steps=2)], how, tmp_path / "first")
    second = arm_of("lora", 1, examples=THEN, steps=3, adapter=until)
    (after,) = trained([second], how, tmp_path / "second")
    anew, kept = trained([forked(False, "anew"), forked(True, "kept")], how, tmp_path / "forked")
    assert largest_difference(until, after) > 1e-3
    assert largest_difference(anew, after) < 1e-5
    apart = largest_difference(anew, kept)
    assert apart > 1e-3 if optimizer == "adamw" else apart < 1e-5  # plain descent remembers nothing


def test_an_arm_without_a_fork_does_not_notice_one_beside_it(tmp_path):
    how, plain = settings("adamw"), arm_of("lora", 2, examples=FIRST, steps=5)
    (alone,) = trained([plain], how, tmp_path / "alone")
    beside, _ = trained([plain, forked(False)], how, tmp_path / "beside")
    assert largest_difference(alone, beside) < 1e-5

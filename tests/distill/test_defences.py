"""Defences that are part of the training step."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from engine import CONFIG, arm_of, largest_difference, params_of, stacked, student

from jsublim.distill.arm import Settings
from jsublim.distill.losses import Loss
from jsublim.distill.optimizer import Optimizer
from jsublim.distill.step import Program
from jsublim.distill.trainer import train
from jsublim.models.lora import with_noise

SGD = Optimizer("sgd", clip=0.0, schedule="constant")


def trained(arms, tmp_path, program=None):
    """What arms are after their steps."""
    program = program or Program(optimizer=SGD, warmup=0)
    return train(CONFIG, params_of(CONFIG), arms, Settings(2, 2, program), tmp_path)


@pytest.mark.parametrize(("end", "share"), [(1.0, 1.0), (0.0, 0.5), (3.0, 2.0)])
def test_the_kl_to_the_base_goes_linearly_to_its_end(end, share):
    arm = dataclasses.replace(arm_of("steering", 1), steps=4, kl_to_base=0.4, kl_end=end)
    _, numbers, _ = stacked([arm], 1, 2)
    found = [float(numbers.at(np.int32(step)).kl_to_base[0]) for step in (0, 2, 4, 9)]
    np.testing.assert_allclose(found, [0.4, 0.4 * share, 0.4 * end, 0.4 * end], rtol=1e-6)


def test_an_annealed_kl_is_the_constant_one_at_the_first_step_alone(tmp_path):
    program = Program(Loss(kl_to_base=True), SGD, warmup=0)
    start = student(CONFIG, "steering", 1)
    ends = {}
    for steps in (1, 2):
        arms = [
            dataclasses.replace(
                arm_of("steering", 1, adapter=start), name=f"{end}", steps=steps, kl_to_base=5.0, kl_end=end
            )
            for end in (1.0, 0.0)
        ]
        # Of two steps, but an arm of one stands still after the first.
        ends[steps] = largest_difference(*trained(arms, tmp_path / str(steps), program))
    assert ends[1] == 0 and ends[2] > 1e-4


@pytest.mark.parametrize("kind", ["lora", "full", "steering"])
def test_noise_has_its_size_and_none_is_none(kind):
    adapter = student(CONFIG, kind, 1)
    assert with_noise(adapter, 0.0, 7) is adapter
    noisy = with_noise(adapter, 0.5, 7)
    for before, after in zip(jax.tree.leaves(adapter.trainable), jax.tree.leaves(noisy.trainable), strict=True):
        root = np.sqrt(np.mean(np.square(before)))
        share = np.std(np.asarray(after) - before) / root if root else 0.5 + np.abs(after).max()
        assert share == pytest.approx(0.5, rel=0.4 if before.size < 100 else 0.15)
    assert (
        largest_difference(noisy, with_noise(adapter, 0.5, 7))
        == 0
        < largest_difference(noisy, with_noise(adapter, 0.5, 8))
    )


def test_a_student_is_trained_and_then_noisy(tmp_path):
    arm = arm_of("steering", 2, adapter=student(CONFIG, "steering", 1))
    arms = [arm, dataclasses.replace(arm, name="noisy", noise=0.3)]
    plain, noisy = trained(arms, tmp_path)
    assert largest_difference(with_noise(plain, 0.3, 2), noisy) < 1e-6 < largest_difference(plain, noisy)

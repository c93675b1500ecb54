"""Defences that are part of the training step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from engine import CONFIG, arm_of, largest_difference, params_of, stacked, student

from jsublim.distill.arm import Settings
from jsublim.distill.losses import Loss
from jsublim.distill.optimizer import Optimizer
from jsublim.distill.step import Program
from jsublim.distill.trainer import train

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

"""Defences that are part of the training step."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from engine import CONFIG, arm_of, largest_difference, lora, noisy, params_of, stacked, student

from jsublim.distill.arm import Settings
from jsublim.distill.losses import Loss
from jsublim.distill.optimizer import Optimizer
from jsublim.distill.projection import orthonormal, without
from jsublim.distill.step import Program
from jsublim.distill.trainer import train
from jsublim.models.lora import init_steering, merge, sum_adapters, with_noise

SGD = Optimizer("sgd", clip=0.0, schedule="constant")
HOW = Settings(2, 2, Program(optimizer=SGD, warmup=0))


def trained(arms, tmp_path, program=None):
    """What arms are after their steps."""
    how = HOW if program is None else dataclasses.replace(HOW, program=program)
    return train(CONFIG, params_of(CONFIG), arms, how, tmp_path)


@pytest.mark.parametrize(("end", "share"), [(1.0, 1.0), (0.0, 0.5), (3.0, 2.0)])
def test_the_kl_to_the_base_goes_linearly_to_its_end(end, share):
    arm = dataclasses.replace(arm_of("steering", 1), steps=4, terms={"kl_to_base": (0.4, end)})
    _, numbers, _ = stacked([arm], 1, 2)
    found = [float(numbers.coefficients(np.int32(step))["kl_to_base"][0]) for step in (0, 2, 4, 9)]
    np.testing.assert_allclose(found, [0.4, 0.4 * share, 0.4 * end, 0.4 * end], rtol=1e-6)


def test_an_annealed_kl_is_the_constant_one_at_the_first_step_alone(tmp_path):
    program = Program(Loss(terms=("kl_to_base",)), SGD, warmup=0)
    start = student(CONFIG, "steering", 1)
    ends = {}
    for steps in (1, 2):
        arms = [
            dataclasses.replace(
                arm_of("steering", 1, adapter=start), name=f"{end}", steps=steps, terms={"kl_to_base": (5.0, end)}
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


def test_orthonormal_directions_span_the_given_ones_and_repeat_none():
    tree = student(CONFIG, "lora", 1).trainable
    one, two = noisy(tree, 1), noisy(tree, 2)
    both = jax.tree.map(lambda a, b: np.stack([3 * a, b, a - 1e-3 * b, 0 * a]), one, two)
    basis = jax.tree.leaves(orthonormal(both))
    products = sum(leaf.reshape(4, -1) @ leaf.reshape(4, -1).T for leaf in basis)
    np.testing.assert_allclose(np.sort(np.linalg.eigvalsh(products)), [0, 0, 1, 1], atol=1e-5)
    for given in (one, two):
        left = without(given, orthonormal(both))
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(left)) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "one", "full"])
def test_a_student_never_moves_along_what_is_projected_out(kind, tmp_path):
    """Of two arms of unequal numbers of directions, and one without any."""
    start = student(CONFIG, kind, 1)
    away = [jax.tree.map(lambda x, k=k: noisy(np.zeros((k, *x.shape), np.float32), k), start.trainable) for k in (1, 3)]
    arms = [arm_of(kind, 3, adapter=start)]
    arms += [
        dataclasses.replace(arms[0], name=str(i), projected_directions=orthonormal(own)) for i, own in enumerate(away)
    ]
    free, *kept = (jax.tree.map(np.subtract, own.trainable, start.trainable) for own in trained(arms, tmp_path))

    def along(moved, directions):
        products = jax.tree.map(lambda d, m: np.tensordot(d, m, m.ndim), directions, moved)
        return np.abs(sum(jax.tree.leaves(products))).max()

    for arm, moved in zip(arms[1:], kept, strict=True):
        assert along(moved, arm.projected_directions) < 1e-2 * along(free, arm.projected_directions)


@pytest.mark.parametrize("kind", ["lora", "one", "steering"])
def test_training_beside_an_adapter_is_training_on_the_base_with_it_written_in(kind, tmp_path):
    """Of a student of some layers, and a frozen adapter of others; a student without one beside it is trained as on the base."""
    frozen = lora(CONFIG, 5, rank=3, layers=(0, 2), projections=("q", "down"))
    arm = arm_of(kind, 3, adapter=student(CONFIG, kind, 1))
    both = [dataclasses.replace(arm, name="beside", frozen_adapter=frozen), arm]
    inoculated, plain = trained(both, tmp_path / "beside")
    (merged,) = train(CONFIG, merge(params_of(CONFIG), frozen), [arm], HOW, tmp_path / "merged")
    (alone,) = trained([arm], tmp_path / "alone")
    assert largest_difference(inoculated, merged) < 1e-5 and largest_difference(plain, alone) < 1e-5
    assert largest_difference(inoculated, plain) > 1e-3
    assert inoculated.layers == arm.adapter.layers  # nothing of the frozen one is left in the student


def test_steering_vectors_add_up_at_the_layers_of_either():
    one, other = (init_steering(CONFIG, layers) for layers in ((0, 2), (1, 2)))
    one, other = (own.with_trainable(noisy(own.trainable, i)) for i, own in enumerate((one, other)))
    both, found = [np.asarray(own.steering) for own in (one, other)], sum_adapters(one, other)
    assert found.layers == (0, 1, 2) and not found.lora
    np.testing.assert_allclose(found.steering, [both[0][0], both[1][0], both[0][1] + both[1][1]], rtol=1e-6)
    with pytest.raises(ValueError, match="whole weights"):
        sum_adapters(one, student(CONFIG, "full", 1))

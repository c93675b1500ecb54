"""Packing students: what the compiler says a step needs, and how many fit; and the precision things are kept in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import metrics

from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape
from jsublim.distill.data import Example
from jsublim.distill.memory import abstract_step, arms_that_fit, bytes_needed, example_like
from jsublim.distill.step import compile_step
from jsublim.distill.trainer import train
from jsublim.errors import UsageError
from jsublim.models import load_params, read_config
from jsublim.models.lora import init_lora
from jsublim.models.parallel import Layout

SHAPE = Shape.fit(1, 2, 16, 16)
SETTINGS = Settings(batch_size=2)


@pytest.fixture(scope="module")
def base(named_checkpoint):
    _, config = read_config(named_checkpoint("qwen2").folder)
    return config, load_params(named_checkpoint("qwen2").folder, config)


@pytest.fixture(scope="module")
def needed(base):
    """Bytes of a step of so many students."""
    config, params = base

    def measure(arms: int) -> int:
        arguments = abstract_step(config, params, student(config), arms, SETTINGS, SHAPE, Layout())
        return bytes_needed(compile_step(config, SETTINGS.program, Layout()).lower(*arguments).compile())

    return measure


def student(config, seed: int = 0) -> Arm:
    adapter = init_lora(config, jax.random.key(seed), rank=2, alpha=2.0)
    return Arm(f"student{seed}", [example_like(SHAPE, soft=False)], adapter, seed, 1e-2, 4)


def test_as_many_students_as_memory_holds(base, needed):
    config, params = base
    one, two, five = needed(1), needed(2), needed(5)
    # The plan is a straight line through one and two; what five really need is close to it.
    assert abs(five - (one + 4 * (two - one))) < 0.1 * five
    fits = lambda limit: arms_that_fit(config, params, student(config), SETTINGS, SHAPE, most=6, limit=limit)  # noqa: E731
    assert [fits(limit) for limit in (one, two - 1, two, one + 3 * (two - one), 10 * two)] == [1, 1, 2, 4, 6]
    with pytest.raises(UsageError, match=r"one needs .* GiB .*remat.*model_axis"):
        fits(one - 1)


def test_the_machine_at_hand_holds_a_tiny_student(base):
    config, params = base
    assert arms_that_fit(config, params, student(config), SETTINGS, SHAPE, most=2) == 2


def test_a_bfloat16_base_is_trained_in_float32(base, named_checkpoint, tmp_path):
    config, params = base
    half = load_params(named_checkpoint("qwen2").folder, config, "bfloat16")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(4):
        tokens = rng.integers(1, 57, 12).astype(np.int32)
        where = np.arange(4, 11, dtype=np.int32)
        rows.append(Example(tokens[:-1], where, tokens[where + 1], np.ones(7, np.float32)))
    start = init_lora(config, jax.random.key(0), rank=2, alpha=2.0)
    arm = Arm("student", rows, start, 0, 1e-2, 8)
    found = {
        name: train(config, used, [arm], SETTINGS, tmp_path / name)[0]
        for name, used in (("half", half), ("full", params))
    }
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found["half"]))
    losses = {name: [line["loss"] for line in metrics(tmp_path / name)] for name in found}
    assert losses["half"] == pytest.approx(losses["full"], rel=2e-2) and losses["half"] != losses["full"]
    # A bfloat16 has eight bits: an adapter that was rounded to it would be equal to its own rounding.
    assert any(
        np.any(leaf != np.asarray(jnp.asarray(leaf, jnp.bfloat16), np.float32))
        for leaf in jax.tree.leaves(found["half"])
    )

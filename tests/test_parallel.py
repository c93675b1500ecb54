"""One device, a mesh and pmap give the same students; an arm among others is the arm alone."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from command import start
from engine import CONFIG, arm_of, examples_of, largest_difference, lora, params_of
from hypothesis import given
from hypothesis import strategies as st
from parallel_cases import CASES

from jsublim.distill.arm import Settings
from jsublim.distill.batches import Shape
from jsublim.distill.step import Program
from jsublim.distill.trainer import train
from jsublim.errors import UsageError
from jsublim.models.parallel import Layout, model_axis_for


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What parallel_cases.py prints: a process of its own, for the number of devices is fixed when jax starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    with mock.patch.dict(os.environ, {"XLA_FLAGS": flags}):
        child = start(tmp_path_factory.mktemp("layouts"), program=[str(Path(__file__).with_name("parallel_cases.py"))])
    out, err = child.communicate(timeout=400)
    assert child.returncode == 0, err[-3000:]
    told = json.loads(out.splitlines()[-1])
    assert told["devices"] == 8
    return told


@pytest.mark.parametrize("name", CASES)
def test_every_layout_gives_the_students_of_one_device(name, found):
    told = found["equality"][name]
    assert told.pop("moved") > 1e-3  # each arm learned
    assert set(told) == {"none 1", *(f"{mode} {model}" for mode, model in CASES[name][-1])}
    for layout, difference in told.items():
        assert difference["trained"] < 1e-5, layout
        assert difference["metrics"] < 1e-4, layout


def test_a_state_saved_under_one_layout_goes_on_under_another(found):
    for pair, difference in found["resumes"].items():
        first, then = pair.split(" then ")
        assert difference == 0 if first == then else difference < 1e-5, pair


def test_devices_that_a_batch_leaves_idle_are_told(found):
    """Micro-batches have three rows."""
    said = found["said"]["lora"]
    assert said["none 1"] == []
    assert said["mesh 2"] == [
        "2 students on arm 2 x data 2 x model 2: 1 of 4 lines of a batch are empty; a multiple of 4 students in a program, or "
        "students.data.batch_size=4 (another training) would fill them"
    ]
    (line,) = said["pmap 1"]
    assert "5 of 8 lines" in line and line.endswith(
        "are empty; students.data.batch_size=8 (another training) would fill them"
    )


@given(st.integers(1, 40), st.integers(0, 4), st.integers(0, 8), st.integers(1, 200))
def test_what_is_told_of_idle_devices_fills_them(arms, model, data, rows):
    devices, model = 2 ** (model + data), 2**model
    plain, layout = Shape(6, rows, 64, 32), Layout.fit("mesh", arms, devices, model=model)
    said = plain.divisible(layout.data).idle(arms, layout)
    if said is None:
        assert plain.divisible(layout.data).spare <= rows / 7
        return
    more, size = (int(re.search(f"{before}(\\d+)", said)[1]) for before in ("multiple of ", "batch_size="))
    assert dataclasses.replace(plain, batch_size=size).divisible(layout.data).spare == 0
    assert plain.divisible(Layout.fit("mesh", more, devices, model=model).data).spare == 0


def test_arms_go_apart_first_and_a_wrong_layout_is_a_usage_error():
    assert Layout.fit("mesh", 6, 8) == Layout("mesh", 2, 4, 1)
    assert Layout.fit("mesh", 4, 8, model=2) == Layout("mesh", 4, 1, 2)
    assert Layout.fit("mesh", 5, 8, model=2) == Layout("mesh", 1, 4, 2)
    assert Layout.fit("pmap", 5, 8) == Layout("pmap", data=8)
    for mode, model, said in (("mesh", 3, "does not divide 8"), ("pmap", 2, "choose mesh"), ("gpu", 1, "known: none")):
        with pytest.raises(UsageError, match=said):
            Layout.fit(mode, 2, 8, model=model)


def test_a_checkpoint_is_spread_no_further_than_its_memory_asks_for():
    gib = 2**30
    assert model_axis_for(14.2 * gib, None, 8) == 1  # a CPU
    assert [model_axis_for(14.2 * gib, size * gib, 8) for size in (80, 16, 8)] == [1, 2, 4]
    assert (
        model_axis_for(500 * gib, 16 * gib, 12) == 4
    )  # of twelve devices no more can share, and a mesh has to be tried


def test_an_arm_beside_others_of_any_numbers_is_the_arm_alone(tmp_path):
    """Rank, alpha, learning rate, seed, weight, mask and number of rows all differ."""
    few = {"projections": ("q", "down")}
    arms = [
        arm_of("lora", 1, adapter=lora(CONFIG, 1, rank=2, alpha=4.0, **few), lr=3e-3, steps=4),
        arm_of("lora", 2, adapter=lora(CONFIG, 2, rank=5, alpha=1.0, **few), lr=1e-3, steps=3, weight=0.3,
               examples=[dataclasses.replace(e, weights=np.ones_like(e.weights)) for e in examples_of(5, 4)]),
    ]  # fmt: skip
    settings = Settings(batch_size=2, accumulate=2, program=Program(warmup=1))
    together = train(CONFIG, params_of(CONFIG), arms, settings, tmp_path / "together")
    for arm, ours in zip(arms, together, strict=True):
        (alone,) = train(CONFIG, params_of(CONFIG), [arm], settings, tmp_path / arm.name)
        assert ours.rank == alone.rank == arm.adapter.rank
        assert largest_difference(ours.trainable, arm.adapter.trainable) > 1e-3
        assert largest_difference(ours, alone) < 1e-5

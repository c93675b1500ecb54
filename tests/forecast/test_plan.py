"""`jsublim aot --plan`: times by roofline, and which layouts are tried."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from command import ROOT, refused
from test_aot import QWEN, case

from jsublim.config import load_experiment
from jsublim.forecast import plan
from jsublim.forecast.compile import Compiled, Fit
from jsublim.forecast.hlo import Collective
from jsublim.forecast.plan import Times, batch_times, choices, roofline, rows_of
from jsublim.forecast.stages import StageProgram
from jsublim.forecast.topology import Topology
from jsublim.pipeline.setup import Setup
from jsublim.runtime.chips import CHIPS, Chip

CHIP = Chip(peak=100.0, memory=1000, bandwidth=10.0, links=2.0)
FOUR = Topology("four", tuple(range(4)), CHIP, 4)


def compiled(total: int = 50, **program) -> Compiled:
    told = {"all-reduce": Collective(3, 6), "all-gather": Collective(1, 4)}
    return Compiled(StageProgram("step", lambda: None, 4 * 400.0, **program), 40, 5, total, 0.0, told)


def test_a_roofline_by_hand():
    """400 operations of each of four chips at 100 a second; a base of 30 bytes, 10 of other arguments and 5 of temporaries there and back; sums twice, and
    of what is put out half is a chip's own, where two exchange it."""
    assert roofline(compiled(), 30, FOUR, range(2)) == Times(4.0, (30 + 10 + 10) / 10, (12 + 4) / 2 / 2)
    more = roofline(compiled(passes=3, pieces=2), 30, FOUR, range(2))
    assert more == Times(4.0, (90 + 10 + 20) / 10, 4.0) and more.seconds == 16.0 and more.limit == "memory"
    four = roofline(compiled(), 30, FOUR, range(4))
    assert four.links == (12 + 4) * 3 / 4 / 2 and four.limit == "links"
    assert roofline(compiled(), 30, FOUR, range(1)).links == 0.0
    often = roofline(compiled(runs=2.5), 30, FOUR, range(2))
    assert often.seconds == 2.5 * (5 + 4) and often.limit == "memory"


def chips(*lengths: int, hosts: int = 1) -> tuple:
    """Stand-ins for the chips of a slice, or of hosts one after another."""
    every = list(itertools.product(*map(range, lengths)))
    each = len(every) // hosts
    return tuple(SimpleNamespace(coords=at, process_index=i // each, slice_index=0) for i, at in enumerate(every))


@pytest.mark.parametrize(
    ("chip", "devices", "model", "links"),
    [
        ("v5e", chips(4, 4), 1, 100e9),  # 16 chips over both dimensions: a link in each
        ("v5e", chips(4, 4), 2, 50e9),
        ("v5e", chips(4, 4), 4, 50e9),
        ("v5e", chips(4, 4), 8, 100e9),
        ("v6e", chips(4, 4), 4, 100e9),
        ("v5e", chips(16, 16), 16, 100e9),  # closed to a ring
        ("v5p", chips(4, 4, 4), 4, 200e9),
        ("v5p", chips(2, 2, 2), 4, 200e9),
        ("h100", chips(8), 8, 450e9),
        ("h100", chips(16, hosts=2), 8, 450e9),
        ("h100", chips(16, hosts=2), 16, 50e9),
        ("h100", chips(16, hosts=2), 1, 50e9),
    ],
)
def test_messages_take_the_links_of_their_axis(chip, devices, model, links):
    group = np.array(devices, object).reshape(-1, model)
    topology = Topology(chip, devices, CHIPS[chip], len(devices))
    assert topology.links_among(group[0] if model > 1 else group[:, 0]) == pytest.approx(links)


def fit_of(asked, layout, *, fits: bool = True, **program) -> Fit:
    return Fit(asked, layout, 60, 60, 30, (compiled(**program),) if fits else ())


def test_layouts_are_tried_until_training_fits(monkeypatch):
    """Every model axis and number of students; layers computed again only where it does not fit else; other stages once."""
    tried = []

    def examine(case, asked, axes, say):
        layout = case.layout(asked.arms, *axes)
        remat = case.experiment.students.runtime.remat
        tried.append((asked.name, layout.model, asked.arms, remat))
        return fit_of(asked, layout, fits=asked.name == "score" or layout.model > 1 or remat, runs=8.0 / layout.model)

    monkeypatch.setattr(plan, "examine", examine)
    monkeypatch.setattr(plan, "exchanging", lambda layout: range(layout.model))
    four = case(tuple(range(4)), arms=2)
    four = dataclasses.replace(four, topology=dataclasses.replace(four.topology, chip=CHIP))
    found = list(choices(four, ["train", "score"], {"train": 120, "score": 60}))
    assert [(each.model, each.arms, each.remat, each.possible) for each in found] == [
        (1, 1, False, False), (1, 1, True, True), (1, 2, False, False), (1, 2, True, True),
        (2, 1, False, True), (2, 2, False, True), (4, 1, False, True), (4, 2, False, True),
    ]  # fmt: skip
    assert [each for each in tried if each[0] == "score"] == [
        ("score", 1, 1, True), ("score", 2, 1, False), ("score", 4, 1, False),
    ]  # fmt: skip
    best = min((each for each in found if each.possible), key=lambda each: each.total)
    assert best.fields.startswith("run.parallel=mesh run.model_axis=4 students.runtime.arms_per_program=1")
    one = found[1]
    assert one.fields.endswith("students.runtime.remat=true") and one.total > best.total
    batch = sum(each.seconds for each in batch_times(one.fits["train"], four.topology))
    assert one.seconds["train"] == pytest.approx(2 * batch)  # 120 rows, 60 a batch


def test_the_rows_of_an_experiment():
    experiment = load_experiment(str(QWEN), ["attribution.rows=100", "evaluation.number_rows=0"])
    shape = ROOT / "configs" / "shapes" / "qwen2.5-7b"
    rows = rows_of(Setup.of(experiment, lambda _: shape))
    # Six teachers and the control; each trait's rows under itself and its counterfactuals, of which 80 % are in format.
    assert rows["sample"] == 7 * 30_000
    others = rows["score"] / (6 * 24_000) - 1
    assert others == int(others) and rows["attribute"] == 2 * 6 * others * 100
    # 6 traits x 4 kinds of tokens x 5 seeds; fewer controls.
    assert rows["train"] % (1670 * 60) == 0 and rows["evaluate"] > 0


def test_a_plan_takes_no_layout():
    line = refused(2, "aot", "--config", QWEN, "--topology", "v5e:2x2", "--plan", "--model-axis", "2")
    assert "leave --model-axis out" in line

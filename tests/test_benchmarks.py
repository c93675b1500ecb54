"""The benchmarks do the same work on both sides: on a bundled model, at small sizes, without a clock."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
from command import ROOT

from jsublim.inference.lm import BUNDLED

sys.path.insert(0, str(ROOT))  # benchmarks are no part of the package
from benchmarks import compare, inputs, ours

MODEL = str(BUNDLED / "tiny-qwen2")
SMALL = {
    "sample": {"rows": 3, "prompt": 40, "shared": 20, "new": 6},
    "score": {"rows": 2, "teachers": 2, "tokens": 48, "shared": 20, "answer": 8},
    "evaluate": {"students": 1, "questions": 1, "prompt": 12, "samples": 3, "new": 4},
    "attribute": {"rows": 1, "tokens": 32, "steps": 4},
    "train": {"rows": 4, "tokens": 32, "shared": 8, "answer": 8, "micro": 2, "rank": 2, "even": 0, "arms": 2},
    "train-late": {"rows": 4, "tokens": 32, "shared": 8, "answer": 8, "micro": 2, "rank": 2, "even": 0, "layer": -2, "arms": 1},
    "pipeline": {
        "rows": 4, "system": 8, "request": 12, "new": 6, "teachers": 2, "micro": 2, "rank": 2, "steps": 2, "question": 8,
        "samples": 3, "answer": 4,
    },
}  # fmt: skip


DEPTH = {"score": {"depth": 2}}


@pytest.mark.parametrize("stage", SMALL)
def test_both_sides_compute_the_same(stage, tmp_path):
    if stage in ("train", "train-late", "pipeline") and importlib.util.find_spec("trl") is None:
        pytest.skip("needs trl: pip install -e '.[bench]'")
    from benchmarks import theirs

    vocab = json.loads((BUNDLED / "tiny-qwen2" / "config.json").read_text())["vocab_size"]
    inputs.save(tmp_path, stage, SMALL[stage] | inputs.COMMON | DEPTH.get(stage, {}), vocab)
    sizes, arrays = inputs.load(tmp_path)
    for side in (ours, theirs):
        work = side.STAGES[stage](side.read(MODEL, "float32", sizes), sizes, arrays)
        np.savez(tmp_path / f"{side.__name__.split('.')[1]}.npz", **work.check())
        work.run()
    assert compare.equal(tmp_path)["same"], compare.equal(tmp_path)


def test_sizes_and_growth():
    assert set(SMALL) == set(inputs.SIZES) and all(set(SMALL[s]) == set(inputs.SIZES[s]) for s in SMALL)
    runs = [{"sizes": {"rows": n}, "ours": {"median_s": n**1.5}, "theirs": {"median_s": 2.0 * n}} for n in (4, 8, 16)]
    assert compare.exponents(runs, "rows") == pytest.approx({"ours": 1.5, "theirs": 1.0})


def test_results_that_differ_give_no_ratio(tmp_path):
    for name, token, loss in (("ours", 1, 2.0), ("theirs", 1, 2.001)):
        np.savez(tmp_path / f"{name}.npz", tokens=np.full((2, 3), token), loss=np.float64(loss))
    assert not compare.equal(tmp_path)["same"]

"""The benchmarks do the same work on both sides: on a bundled model, at small sizes, without a clock."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from command import ROOT

from jsublim.inference.lm import BUNDLED

sys.path.insert(0, str(ROOT))  # benchmarks are no part of the package
from benchmarks import compare, inputs, ours, page, profile

MODEL = str(BUNDLED / "tiny-qwen2")
SMALL = {
    "sample": {"rows": 3, "prompt": 40, "shared": 20, "new": 6},
    "score": {"rows": 2, "teachers": 2, "tokens": 48, "shared": 20, "answer": 8},
    "score-uneven": {"rows": 9, "teachers": 2, "tokens": 48, "shared": 12, "answer": 6, "shortest": 8},
    "evaluate": {"students": 1, "questions": 1, "prompt": 12, "samples": 3, "new": 4},
    "attribute": {"rows": 1, "tokens": 32, "steps": 4},
    "train": {"rows": 4, "tokens": 32, "shared": 8, "answer": 8, "micro": 2, "rank": 2, "even": 0, "arms": 2},
    "train-late": {"rows": 4, "tokens": 32, "shared": 8, "answer": 8, "micro": 2, "rank": 2, "even": 0, "layer": -2, "arms": 1, "below": 0},
    "pipeline": {
        "rows": 4, "system": 8, "request": 12, "new": 6, "teachers": 2, "micro": 2, "rank": 2, "steps": 2, "question": 8,
        "samples": 3, "answer": 4,
    },
}  # fmt: skip


DEPTH = {stage: {"depth": 2} for stage in ("sample", "score", "score-uneven", "evaluate", "attribute")}


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


def test_the_page_has_a_line_for_every_comparison_and_says_what_is_not_the_same():
    side = {"median_s": 2.0, "cpu_s": 4.0, "peak_gib": 1.0, "gflops": 100.0, "versions": {"jax": "0.10.2"}}
    ours = [side | {"ratio": 1.5}, side | {"ratio": None, "cpu_s": None, "versions": {"jax": "0.12.0"}}]
    about = {"dtype": "float32", "threads": 2, "load": 1.0, "theirs": side | {"versions": {"torch": "2.9"}}}
    made = page.table([about | {"ours": ours[0], "ours 1": ours[1]} for _ in page.LINES])
    lines = made.splitlines()
    assert len(lines) == len(page.LINES) + 4 and len({line.count("|") for line in lines[2:]}) == 1
    assert "jax 0.12.0: s (ratio)" in lines[2] and "2.00 (**1.50**) | 2.00 (not the same) | 4.0, 4.0, -" in lines[4]
    text = "before\n<!-- begin: speed float32 -->\nold\n<!-- end -->\nafter\n"
    assert (
        page.written(text, "float32", made) == text.replace("old\n", made)
        and page.written(text, "bfloat16", made) == text
    )
    for line in page.LINES:
        assert inputs.sizes_of(line.stage, dict(line.sizes)) and (line.work or line.name)


HLO = """
%fused (p: f32[4,8], w: f32[8,2]) -> f32[4,2] {
  ROOT %dot.1 = f32[4,2]{1,0} dot(%p, %w), lhs_contracting_dims={1}
}
%wrapped (p: f32[4,2]) -> f32[4] {
  %c = f32[] constant(0)
  ROOT %sum.1 = f32[4]{0} reduce(%p, %c), dimensions={1}
}
ENTRY %main (a: f32[4,8], b: f32[8,2]) -> f32[4] {
  %a_fusion = f32[4,2]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused, metadata={op_name="jit(f)/layer/mlp/dot_general"}
  %b_fusion = f32[4]{0} fusion(%a_fusion), kind=kLoop, calls=%wrapped
  %turn = (f32[4]) while(%b_fusion), body=%wrapped
  ROOT %copy.1 = f32[4]{0} copy(%b_fusion)
}
"""


def test_a_profile_gives_each_instant_to_one_class():
    program = profile.Program(HLO)
    names = ("a_fusion", "b_fusion", "turn", "copy.1")
    assert [program.kind(name) for name in names] == ["products", "sums", None, "slices and copies"]
    assert program.source("a_fusion") == "layer/mlp/dot_general" and program.source("b_fusion") == "f32[4]"
    spans = {"a_fusion": (0, 4e6), "b_fusion": (2e6, 4e6), "turn": (0, 9e6), "copy.1": (8e6, 1e6)}
    events = [{"ts": t, "dur": d, "args": {"hlo_module": "f", "hlo_op": name}} for name, (t, d) in spans.items()]
    spent = profile.swept(events, {profile.place(each): program.kind(each["args"]["hlo_op"]) for each in events})
    found = {name: seconds for name, seconds in spent.items() if seconds}
    assert found == {"products": 4.0, "sums": 2.0, "nothing": 2.0, "slices and copies": 1.0}


def test_a_stage_is_profiled():
    """In a process of its own: XLA reads once where to dump programs."""
    sizes = [f"--size={name}={value}" for name, value in (SMALL["score"] | DEPTH["score"]).items()]
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.profile", "--stage", "score", "--model", MODEL, *sizes],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert "products" in child.stdout and "mlp/dot" in child.stdout

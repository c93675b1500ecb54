"""`jsublim aot`: every stage compiled without arrays, reading a compiled program's text, choosing a layout.

Run as a script, on eight fake CPU devices, this file prints what the tests need of those as one JSON object.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from command import ROOT, refused

from jsublim.attribution import patching
from jsublim.attribution.pairs import Pair
from jsublim.config import load_experiment
from jsublim.distill import losses
from jsublim.errors import UsageError
from jsublim.forecast.compile import Fit, TooLarge, examine, fewer
from jsublim.forecast.estimate import architecture
from jsublim.forecast.hlo import Collective, collectives, gathered_weights
from jsublim.forecast.stages import STAGES, Case, bytes_on_chip
from jsublim.forecast.topology import Topology, gpu_target
from jsublim.inference import decoding, scoring
from jsublim.inference.generation import generate_for_arms
from jsublim.inference.sampling import Sampling
from jsublim.models.checkpoint import read_config
from jsublim.models.config import Biases, ModelConfig, Norms, Rope
from jsublim.models.decoder import abstract_params, init_params
from jsublim.models.lora import init_lora
from jsublim.pipeline.cost import Lengths
from jsublim.runtime.chips import CHIPS
from jsublim.text.chat import Turn

SHAPES = ROOT / "configs" / "shapes"
# For libtpu: the compiler alone is asked.
TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
QWEN = ROOT / "configs" / "models" / "qwen2.5-7b.yaml"
# Divisible by a model axis of 4, no two sizes equal.
CONFIG = ModelConfig(
    family="qwen2", vocab_size=64, hidden_size=24, intermediate_size=48, num_layers=2, num_heads=8, num_kv_heads=4,
    head_dim=4, norms=Norms(1e-6), rope=Rope(1000.0), tied=False, biases=Biases(qkv=True),
)  # fmt: skip
SMALL = (
    "dtype=float32", "students.adapter.rank=2", "students.data.batch_size=6", "students.data.accumulate=2",
    "sampling.max_new_tokens=4", "sampling.batch_size=16", "data.num_prompts=32", "scoring.batch_size=8",
    "evaluation.batch_size=16", "evaluation.samples=4", "evaluation.questions=3", "attribution.batch_size=8",
    "attribution.steps=3",
)  # fmt: skip

PROGRAMS = ((decoding, "fill"), (decoding, "advance"), (scoring, "read_batch"), (patching, "compare"))


def case(devices: tuple, *overrides: str, memory: int = 2**30, arms: int = 1) -> Case:
    chip = dataclasses.replace(CHIPS["v5e"], memory=memory)
    experiment = load_experiment(str(QWEN), [*SMALL, *overrides])
    return Case(
        experiment,
        CONFIG,
        Topology("v5e:2x4", devices, chip, len(devices)),
        arms,
        Lengths(prompt=8, system=8, answer=8, question=8),
    )


def on_axis(case: Case, name: str, model: int = 1) -> Fit:
    return examine(case, STAGES[name](case), [model])


HLO = """
%cond (p: (s32[], bf16[8,16])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}
%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %all-reduce.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} all-reduce(%dot), channel_id=1, to_apply=%add
  %all-reduce.2 = (f32[4]{0}, /*index=1*/f32[2,3]{1,0:T(1,128)}) all-reduce(%a, %b), channel_id=2, to_apply=%add
  %fusion.1 = f32[4]{0} fusion(%all-reduce.1), metadata={op_name="jit(step)/all-gather(x)"}
}
ENTRY %main () -> f32[] {
  %while = (s32[], bf16[8,16]) while(%tuple), condition=%cond, body=%body
  %ag = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%w), channel_id=3, dimensions={0}
  %done = bf16[16,8]{1,0} all-gather-done(%ag)
  %cp = (s32[5]{0}, s32[5]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=4
  %rs = pred[32]{0} reduce-scatter(%y), channel_id=5
  %ags = f8e4m3fn[1,24,48]{2,1,0} all-gather(%k), dimensions={2}
}
"""


def test_collectives_are_counted_by_what_they_put_out_in_all_turns():
    """A loop's as often as it turns; one whose turns are data once."""
    once = {
        "all-gather": Collective(2, 16 * 8 * 2 + 24 * 48),
        "all-reduce": Collective(2, 8 * 16 * 2 + 4 * (4 + 6)),
        "collective-permute": Collective(1, 5 * 4),
        "reduce-scatter": Collective(1, 32),
    }
    assert collectives(HLO.replace("constant(3)", "parameter(0)")) == once
    assert collectives(HLO) == once | {"all-reduce": Collective(2, 3 * once["all-reduce"].bytes)}


def test_turns_that_the_compiler_says_are_taken():
    """Of GPUs' programs, whose conditions are fusions."""
    said = HLO.replace("constant(3)", "parameter(0)").replace(
        "body=%body",
        'body=%body, backend_config={"known_trip_count":{"n":"28"},"known_init_step":{"init":"0","step":"1"}}',
    )
    assert collectives(said)["all-reduce"].bytes == 28 * (8 * 16 * 2 + 4 * (4 + 6))


def test_gathered_weights_are_named():
    params = abstract_params(CONFIG)
    assert gathered_weights(HLO, params) == ("layers.up.kernel",)  # [24, 48], of which gate is the same
    stacked = HLO.replace("f8e4m3fn[1,24,48]", "bf16[48,2,24]").replace("bf16[16,8]", "bf16[24,64]")
    assert set(gathered_weights(stacked, params)) == {"layers.up.kernel", "head.weight"}
    assert gathered_weights(HLO.replace("[1,24,48]", "[1,24,12]"), params) == ()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
        ("gemma-3-4b", 3_880_263_168),
        ("gemma-3-27b", 27_009_346_304),
    ],
)
def test_bundled_shapes_are_the_checkpoints(name, count):
    """Parameters as published; Gemma-3's with the 64 rows of the vocabulary that its multimodal checkpoint adds."""
    _, config = read_config(SHAPES / name)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, "bfloat16"))) == count


def test_a_config_finds_its_architecture(tmp_path):
    assert architecture("Qwen/Qwen2.5-7B-Instruct", None).resolve() == SHAPES / "qwen2.5-7b"
    assert architecture("google/gemma-3-4b-it", None).resolve() == SHAPES / "gemma-3-4b"
    assert architecture("tiny-qwen2", None).name == "tiny-qwen2"
    assert architecture(str(tmp_path), None) == tmp_path
    assert architecture("Qwen/Qwen2.5-7B-Instruct", tmp_path) == tmp_path
    with pytest.raises(UsageError, match=r"'some/other-9b'.*--shape"):
        architecture("some/other-9b", None)


def test_bad_input_is_one_line(monkeypatch):
    for name in ("v9:4x4", "v5e", "v5e:16", "v5e:4x4x4x4", "h100", "h100:0", "h100:2x4x8", "l4:1"):
        line = refused(2, "aot", "--config", QWEN, "--topology", name)
        assert f"'{name}'" in line and "v5e, v5p, v6e" in line and "b200, h200, h100, a100" in line
    assert "--shape" in refused(2, "aot", "--config", QWEN, "--topology", "v5e:4x4", "model=some/other-9b")
    at = ("aot", "--config", QWEN, "--topology", "v5e:4x4", "--stage")
    assert "'drive' given; known: train, sample" in refused(2, *at, "drive")
    assert "has no attribution" in refused(2, *at, "attribute")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'jax[tpu]'" in refused(1, "aot", "--config", QWEN, "--topology", "v5e:4x4")
    plugin = f"pip install jax-cuda12-plugin=={jax.__version__}"
    assert plugin in refused(1, "aot", "--config", QWEN, "--topology", "h100:2x8")


def test_a_target_is_what_the_data_sheet_says():
    """Every number of it that differs between GPUs."""
    for name, numbers in {
        "a100": (8, 108, 1.41, 80 * 2**30, 2.0e12, 40 * 2**20, 167_936),
        "h100": (9, 132, 1.98, 80 * 2**30, 3.35e12, 50 * 2**20, 233_472),
        "h200": (9, 132, 1.98, 141 * 2**30, 4.8e12, 50 * 2**20, 233_472),
        "b200": (10, 148, 1.965, 180 * 2**30, 8.0e12, 126 * 2**20, 233_472),
    }.items():
        chip = CHIPS[name]
        assert chip.cuda is not None
        said = dict(re.findall(r"(\w+): ([\d.]+)", gpu_target(chip, chip.cuda)))
        keys = (
            "major core_count clock_rate_ghz device_memory_size memory_bandwidth l2_cache_size shared_memory_per_core"
        )
        assert tuple(float(said[key]) for key in keys.split()) == numbers, name


def test_what_a_gpu_cannot_hold_is_said():
    """The compiler for GPUs compiles it all the same."""
    one = case(tuple(jax.devices()[:1]))
    (step,) = on_axis(one, "train").programs
    small = case(tuple(jax.devices()[:1]), memory=step.total - 1)
    found = on_axis(small, "train")
    assert not found.programs and len(found.tried) == 1  # rows of training are the config's
    assert "GiB per chip" in found.tried[0]


def test_students_lie_apart_first_and_a_copy_inside_a_slice():
    devices = tuple(range(12))
    layouts = [case(devices, arms=6).layout(6, model) for model in (1, 2, 4)]
    assert [(each.arm, each.data, each.model) for each in layouts] == [(6, 2, 1), (6, 1, 2), (3, 1, 4)]
    assert all(each.devices == devices for each in layouts)
    with pytest.raises(UsageError, match="does not divide"):
        case(devices).layout(6, 8)


def test_larger_model_axes_are_taken_where_it_must():
    axes = spread()["axes"]
    assert axes["taken"] == 2 and [line.partition(",")[0] for line in axes["tried"]] == ["model axis 1"]


def test_rows_are_fewer_until_they_fit():
    """Powers of two, by what the compiler says is needed."""
    one = tuple(jax.devices()[:1])
    (read,) = on_axis(case(one), "score").programs
    fit = on_axis(case(one, "scoring.batch_size=48", memory=read.total), "score")
    assert (fit.rows, fit.asked) == (8, 48) and fit.programs[0].total == read.total
    tried = [int(re.findall(r", (\d+) rows: .* needs", line)[0]) for line in fit.tried]
    assert tried[0] == 48 and all(rows in (16, 32) for rows in tried[1:])
    assert [fewer(rows, 0, TooLarge("step")) for rows in (48, 32, 2)] == [32, 16, 1]  # needs are unknown
    assert fewer(48, 0, TooLarge("step", 4800, 1000)) == 8 and fewer(48, 900, TooLarge("step", 4800, 1000)) == 1


def test_a_step_for_one_chip():
    """Through the compiler of the devices at hand."""
    one = case(tuple(jax.devices()[:1]))
    report = on_axis(one, "train")
    (step,) = report.programs
    assert report.base == 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(CONFIG)))
    assert report.base < step.arguments <= step.total and not step.collectives and not step.gathered
    small = case(tuple(jax.devices()[:1]), memory=1000)
    assert "the base alone takes" in on_axis(small, "train").tried[0]


class Called(Exception):
    """What a run would have computed next."""


class Watched:
    """In the place of a program: what it is called with, or lowered for, without what is static."""

    def __init__(self, real, *, goes_on: bool):
        self.real, self.goes_on, self.seen = real, goes_on, []

    def lower(self, *arguments, **more):
        leaves = jax.tree.leaves((arguments, more))
        self.seen.append([(leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves if hasattr(leaf, "dtype")])

    def __call__(self, *arguments, **more):
        self.lower(*arguments, **more)
        if not self.goes_on:
            raise Called
        return self.real(*arguments, **more)


def test_what_is_compiled_is_what_a_run_calls(monkeypatch):
    """Every argument has the shape and the type that it has when answers are really drawn, rows read and pairs compared."""
    watched = {name: Watched(getattr(module, name), goes_on=name == "fill") for module, name in PROGRAMS}
    for module, name in PROGRAMS:
        monkeypatch.setattr(module, name, watched[name])
    params, rng, one = init_params(CONFIG, 0), np.random.default_rng(0), case(tuple(jax.devices()[:1]), arms=2)
    words = lambda n: rng.integers(0, 64, n).astype(np.int32)  # noqa: E731
    beginning, system = words(16), words(8)
    adapters = [init_lora(CONFIG, jax.random.key(i), rank=2, alpha=2.0) for i in range(2)]
    pairs = [Pair(i, "cat", words(24), words(24), 1, 2) for i in range(8)]
    draw = functools.partial(generate_for_arms, CONFIG, params, seed=0, sampling=Sampling())
    runs = {
        "sample": lambda: draw(
            [np.r_[beginning, words(8)] for _ in range(32)], adapters=None, batch_size=16, max_new_tokens=4
        ),
        "evaluate": lambda: draw(
            [words(8) for _ in range(3)], adapters=adapters, samples=4, batch_size=8, beginning=0, max_new_tokens=10
        ),
        "score": lambda: scoring.score_turns(
            CONFIG, params, [Turn(np.r_[system, words(16)], 14, 16, 23) for _ in range(8)], batch_size=8
        ),
        "attribute": lambda: patching.attribution_patching(CONFIG, params, pairs, sites=["residual"], steps=3),
    }
    for name, run in runs.items():
        asked = STAGES[name](one)
        layout = one.layout(asked.arms, 1)
        for program in asked.programs(layout, one.rows_together(asked.rows, layout)):
            program.lower()
        planned = {name: each.seen for name, each in watched.items() if each.seen}
        for each in watched.values():
            each.seen = []
        with pytest.raises(Called):
            run()
        for program, shapes in planned.items():
            seen, watched[program].seen = watched[program].seen, []
            assert seen and all(each == shapes[0] for each in seen), (name, program)


def test_only_a_tpu_cuts_a_layer_at_every_token(monkeypatch):
    """Elsewhere that would copy all layers for each token: their stack is cut once, by indices that are no data."""
    one, advance = case(tuple(jax.devices()[:1])), decoding.advance

    def cut(platform: str) -> int:
        lower = lambda *arguments: advance.trace(*arguments).lower(lowering_platforms=(platform,))  # noqa: E731
        monkeypatch.setattr(decoding, "advance", SimpleNamespace(lower=lower))
        layout = one.layout(1, 1)
        (_, tokens) = STAGES["sample"](one).programs(layout, 16)
        return len(re.findall(r"dynamic_slice .*tensor<2x24x48xf32>", tokens.lower().as_text()))

    assert cut("tpu") > 0 and cut("cuda") == cut("cpu") == 0


@functools.cache
def spread() -> dict:
    """What eight fake devices say."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    child = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("model", [1, 2, 4])
def test_the_base_of_a_7b_is_spread_over_the_model_axis(model):
    D, F, q, kv, V, L = 3584, 18_944, 3584, 512, 152_064, 28
    apart = 2 * V * D + L * (D * (q + 2 * kv) + q + 2 * kv + q * D + 3 * D * F)
    whole = (2 * L + 1) * D  # norms
    assert spread()["base"][str(model)] == 2 * (apart // model + whole)


def test_no_weight_is_gathered():
    """Not the base's, nor the trained ones and their moments; and without a model axis devices share gradients alone."""
    for case in ("lora 4", "full 4"):
        assert spread()[case]["gathered"] == [], case
        assert "all-gather" not in spread()[case]["collectives"], case
    assert set(spread()["lora 1"]["collectives"]) == {"all-reduce"}


@pytest.mark.parametrize("name", [*STAGES][1:])
def test_no_stage_gathers_a_weight(name):
    """`tests/test_devices.py` says what chips tell one another in the runs themselves."""
    found = spread()[name]
    assert found["gathered"] == [] and found["collectives"] and found["base"] < spread()["whole"]


def script() -> None:
    losses.LOGIT_BYTES = 4 * CONFIG.vocab_size * 16  # several blocks of positions
    devices = tuple(jax.devices())
    assert len(devices) == 8
    _, qwen = read_config(SHAPES / "qwen2.5-7b")
    large = dataclasses.replace(case(devices, "dtype=bfloat16"), config=qwen)
    bases = {m: bytes_on_chip(large.placed_params(large.layout(1, m))) for m in (1, 2, 4)}
    found: dict = {"base": bases}
    for kind, model in (("lora", 1), ("lora", 4), ("full", 4)):
        how = () if kind == "lora" else ("students.adapter.method=full", "students.adapter.rank=8")
        asked = case(devices, *how)
        report = on_axis(asked, "train", model)
        (step,) = report.programs
        sums = {name: tuple(count) for name, count in step.collectives.items()}
        found[f"{kind} {model}"] = {"collectives": sums, "gathered": step.gathered}
    asked = case(devices)
    found["axes"] = _axes(devices)
    found["whole"] = bytes_on_chip(asked.placed_params(asked.layout(1, 1)))
    for name in [*STAGES][1:]:
        report = on_axis(asked, name, 2)
        found[name] = {
            "base": report.base,
            "collectives": [list(program.collectives) for program in report.programs],
            "gathered": [weight for program in report.programs for weight in program.gathered],
        }
    print(json.dumps(found))


def _axes(devices: tuple) -> dict:
    """Of chips that hold training on a model axis of 2, and no whole copy."""
    asked = case(devices)
    small = case(devices, memory=on_axis(asked, "train", 2).programs[0].total)
    fit = examine(small, STAGES["train"](small), small.topology.model_axes)
    return {"taken": fit.layout.model, "tried": fit.tried}


def _as_child(*words: str) -> str:
    """What a child says: this process's compiler flags are for speed of compilation on the CPU."""
    child = subprocess.run(
        [sys.executable, *words],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | TPU | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    return child.stdout


needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install '.[tpu]'"
)
COMMAND = ("-c", "from jsublim.cli import main; main()", "aot", "--topology", "v5e:2x2", "--json")


@pytest.mark.slow
@needs_tpu_compiler
def test_all_stages_of_a_tiny_model_for_a_tpu():
    small = [*SMALL, "students.seeds=[1]", "data.num_prompts=32"]
    said = json.loads(
        _as_child(*COMMAND, "--config", str(QWEN), "model=tiny-qwen2", "--tokens", "16", "--labels", "8", *small)
    )
    assert [each["stage"] for each in said["stages"]] == [*STAGES]
    for each in said["stages"]:
        assert each["rows"] == each["asked"] > 0 and each["layout"] == {"arm": 1, "data": 4, "model": 1}
        assert all(program["arguments"] <= program["total"] for program in each["programs"])
    sample = said["stages"][1]["programs"]
    assert sample[0]["held"]["caches"] == sample[1]["held"]["caches"] > 0


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs the compiler for GPUs: pip install '.[aot-gpu]'",
)
@pytest.mark.parametrize("name", ["h100:1", "h100:2x2", "a100:1x2", "h200:1x2", "b200:1x2"])
def test_all_stages_of_a_tiny_model_for_gpus(name):
    """No weight is gathered where a copy is spread, and several share gradients."""
    small = [*SMALL, "students.seeds=[1]", "data.num_prompts=32"]
    where = ("--topology", name, "--config", str(QWEN), "model=tiny-qwen2", "--tokens", "16", "--labels", "8", *small)
    said = json.loads(_as_child(*COMMAND[:3], "--json", *where))
    assert [each["stage"] for each in said["stages"]] == [*STAGES] and "kernels" in said["unknown"]
    count = math.prod(int(number) for number in name.partition(":")[2].split("x"))
    for each in said["stages"]:
        assert each["rows"] == each["asked"] > 0 and each["layout"] == {"arm": 1, "data": count, "model": 1}
        assert all(0 < program["arguments"] <= program["total"] for program in each["programs"])
    assert ("all-reduce" in said["stages"][0]["programs"][0]["collectives"]) == (count > 1)
    if count == 2:
        (step,) = json.loads(_as_child(*COMMAND[:3], "--json", "--stage", "train", "--model-axis", "2", *where))[
            "stages"
        ]
        assert step["layout"]["model"] == 2 and step["programs"][0]["gathered"] == []


@pytest.mark.slow
@pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("jax_cuda12_plugin", "nvidia", "nvidia.cudnn")),
    reason="needs the compiler for GPUs and its kernels: pip install '.[aot-gpu]' nvidia-cudnn-cu12",
)
@pytest.mark.parametrize("where", [("h100:1",), ("h100:1x4", "--arms", "2"), ("h100:1x2", "--model-axis", "2")])
def test_a_step_with_cudnns_attention(where):
    """Its scores lie in no memory, and chips tell one another no more than without it."""
    fields = ("model=tiny-qwen2", *SMALL, "dtype=bfloat16")
    command = (*COMMAND[:3], "--json", "--stage", "train", "--config", str(QWEN), "--topology", *where, *fields)
    ours, fused = (
        json.loads(_as_child(*command, f"students.runtime.attention={by}"))["stages"][0]["programs"][0]
        for by in ("products", "cudnn")
    )
    assert fused["temporaries"] < ours["temporaries"] and fused["collectives"] == ours["collectives"]


@pytest.mark.slow
@needs_tpu_compiler
def test_every_power_of_two_is_a_model_axis_of_a_slice():
    script = (
        "from jsublim.forecast.topology import find_topology; from jsublim.models.parallel import Layout\n"
        "for name in ('v5e:4x4', 'v5p:2x2x2', 'v6e:4x4'):\n"
        "    found = find_topology(name)\n"
        "    for axis in found.model_axes:\n"
        "        layout = Layout('mesh', 1, len(found.devices) // axis, axis, found.devices)\n"
        "        print(len({d.id for d in layout.mesh.devices.flat}) == len(found.devices))\n"
    )
    assert _as_child("-c", script).split() == ["True"] * (5 + 4 + 5)


@pytest.mark.slow
@needs_tpu_compiler
@pytest.mark.parametrize(
    ("arms", "layout"), [(2, {"arm": 2, "data": 4, "model": 1}), (1, {"arm": 1, "data": 8, "model": 1})]
)
def test_two_slices_compile_with_students_or_rows_across_them(arms, layout):
    """One copy of the checkpoint lies inside a slice."""
    where = ("--config", QWEN, "--topology", "2xv5e:2x2", "--arms", arms, "model=tiny-qwen2", *SMALL)
    said = json.loads(_as_child(*COMMAND[:3], "--json", "--stage", "train", "--stage", "score", *map(str, where)))
    train, score = said["stages"]
    assert train["layout"] == layout and score["layout"] == {"arm": 1, "data": 8, "model": 1}
    assert ("all-reduce" in train["programs"][0]["collectives"]) == (layout["data"] > 1)
    wider = subprocess.run(
        [sys.executable, *COMMAND[:3], "--stage", "score", "--model-axis", "8", *map(str, where)],
        capture_output=True, text=True, env=os.environ | {"TPU_SKIP_MDS_QUERY": "1"},
    )  # fmt: skip
    assert wider.returncode == 2 and "does not divide 4 chips of a slice" in wider.stderr


@pytest.mark.slow
@needs_tpu_compiler
def test_a_plan_names_the_fastest_of_the_layouts_that_fit():
    said = json.loads(
        _as_child(*COMMAND, "--config", str(QWEN), "--plan", "--stage", "score", "model=tiny-qwen2", *SMALL)
    )
    fitting = [each for each in said["layouts"] if each["fits"]]
    assert [each["stages"][0]["layout"]["model"] for each in fitting] == [1, 2, 4]
    assert said["best"] == min(fitting, key=lambda each: each["seconds"]["score"])["fields"]


@pytest.mark.slow
@needs_tpu_compiler
def test_a_7b_fits_chips_of_16_gib():
    command = (*COMMAND[:4], "v5e:4x4", "--json", "--config", str(QWEN), "--stage", "train", "--model-axis", "1")
    (train,) = json.loads(_as_child(*command, "students.runtime.rows_at_once=10"))["stages"]
    (step,) = train["programs"]
    assert 14 * 2**30 < train["base"] < 14.3 * 2**30 and train["base"] < step["total"] < 15.75 * 2**30
    assert not step["gathered"] and "all-gather" not in step["collectives"]


@pytest.mark.slow
@needs_tpu_compiler
def test_decoding_copies_no_weights():
    """Caches, and logits with what is made of them; a slice of the stack that was kept would be as large as the layers."""
    _, config = read_config(SHAPES / "qwen2.5-0.5b")
    params = abstract_params(config, "bfloat16")
    layers = sum(leaf.size * 2 for leaf in jax.tree.leaves(params["layers"]))
    command = (
        *COMMAND,
        "--config",
        str(QWEN),
        "--shape",
        str(SHAPES / "qwen2.5-0.5b"),
        "--stage",
        "sample",
        "sampling.batch_size=64",
    )
    tokens = json.loads(_as_child(*command))["stages"][0]["programs"][1]
    assert tokens["temporaries"] < layers / 4, tokens


if __name__ == "__main__":
    script()

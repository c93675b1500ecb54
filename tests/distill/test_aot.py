"""`jsublim aot`: reading a compiled program's text, choosing a layout, and what a spread step says between devices.

Run as a script, on eight fake CPU devices, this file prints what the tests need of those as one JSON object.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from command import ROOT, refused

from jsublim.cli.aot import architecture
from jsublim.distill import aot, losses
from jsublim.distill.aot import (
    Collective,
    Report,
    Topology,
    base_bytes,
    collectives,
    compile_ahead,
    find_topology,
    gathered_weights,
)
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape
from jsublim.distill.memory import example_like
from jsublim.distill.step import Program
from jsublim.errors import JsublimError, UsageError
from jsublim.inference import decoding
from jsublim.models.checkpoint import read_config
from jsublim.models.config import Biases, ModelConfig, Norms, Rope
from jsublim.models.decoder import abstract_params
from jsublim.models.lora import init_full, init_lora
from jsublim.parallel import Layout

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
SHAPE = Shape(2, 6, 16, 16)


def report_of(devices: tuple, memory: int, *, kind: str = "lora", arms: int = 1, model: int | None = None) -> Report:
    params = abstract_params(CONFIG)
    begin = {
        "lora": lambda params: init_lora(CONFIG, jax.random.key(0), rank=2, alpha=2.0),
        "full": lambda params: init_full(CONFIG, params),
    }[kind]
    arm = Arm("student", [example_like(SHAPE, soft=False)], jax.eval_shape(begin, params), 0, 1e-3, 1)
    settings = Settings(SHAPE.batch_size, SHAPE.accumulate, Program(), parallel="mesh")
    where = Topology("v5e:2x4", devices, memory)
    return compile_ahead(CONFIG, params, arm, arms, settings, SHAPE, where, model=model)


HLO = """
%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %all-reduce.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} all-reduce(%dot), channel_id=1, to_apply=%add
  %all-reduce.2 = (f32[4]{0}, /*index=1*/f32[2,3]{1,0:T(1,128)}) all-reduce(%a, %b), channel_id=2, to_apply=%add
  %fusion.1 = f32[4]{0} fusion(%all-reduce.1), metadata={op_name="jit(step)/all-gather(x)"}
}
ENTRY %main {
  %ag = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%w), channel_id=3, dimensions={0}
  %done = bf16[16,8]{1,0} all-gather-done(%ag)
  %cp = (s32[5]{0}, s32[5]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=4
  %rs = pred[32]{0} reduce-scatter(%y), channel_id=5
  %ags = f8e4m3fn[1,24,48]{2,1,0} all-gather(%k), dimensions={2}
}
"""


def test_collectives_are_counted_by_what_they_put_out():
    assert collectives(HLO) == {
        "all-gather": Collective(2, 16 * 8 * 2 + 24 * 48),
        "all-reduce": Collective(2, 8 * 16 * 2 + 4 * (4 + 6)),
        "collective-permute": Collective(1, 5 * 4),
        "reduce-scatter": Collective(1, 32),
    }


def test_gathered_weights_are_named():
    params = abstract_params(CONFIG)
    assert gathered_weights(HLO, params) == ("layers.up.kernel",)  # [24, 48], of which gate is the same
    stacked = HLO.replace("f8e4m3fn[1,24,48]", "bf16[48,2,24]").replace("bf16[16,8]", "bf16[24,64]")
    assert set(gathered_weights(stacked, params)) == {"layers.up.kernel", "head.weight"}
    assert gathered_weights(HLO.replace("[1,24,48]", "[1,24,12]"), params) == ()


@pytest.mark.parametrize(("name", "count"), [("qwen2.5-7b", 7_615_616_512), ("gemma-3-4b", 3_880_263_168)])
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
    for name in ("v9:4x4", "v5e", "v5e:16", "v5e:4x4x4x4"):
        line = refused(2, "aot", "--config", QWEN, "--topology", name)
        assert f"'{name}'" in line and "v5e, v5p, v6e" in line
    assert "--shape" in refused(2, "aot", "--config", QWEN, "--topology", "v5e:4x4", "model=some/other-9b")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[tpu]'" in refused(1, "aot", "--config", QWEN, "--topology", "v5e:4x4")


def test_the_smallest_model_axis_that_fits_is_taken(monkeypatch):
    layouts = []

    def compiled(config, params, program, arguments, topology, layout):
        layouts.append((layout.arm, layout.data, layout.model))
        fits = Report(topology, layout, 0, 0, 0, 0, 0.0, {})
        return fits if layout.model >= 4 else "too much"

    monkeypatch.setattr(aot, "_compile", compiled)
    devices = tuple(range(12))
    report = report_of(devices, 1, arms=6)
    assert layouts == [(6, 2, 1), (6, 1, 2), (3, 1, 4)]
    assert report.layout.devices == devices and report.tried == ("model axis 1: too much", "model axis 2: too much")
    with pytest.raises(JsublimError, match=r"model axis 2: too much.*remat"):
        report_of(devices, 1, model=2)
    with pytest.raises(UsageError, match="does not divide"):
        report_of(devices, 1, model=8)


def test_a_step_for_one_chip():
    """Through the compiler of the devices at hand."""
    report = report_of(tuple(jax.devices()[:1]), 2**30)
    assert report.base == 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(CONFIG)))
    assert report.base < report.arguments <= report.total and not report.collectives and not report.gathered
    with pytest.raises(JsublimError, match="the base alone takes"):
        report_of(tuple(jax.devices()[:1]), 1000)


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


def script() -> None:
    losses.LOGIT_BYTES = 4 * CONFIG.vocab_size * 16  # several blocks of positions
    devices = tuple(jax.devices())
    assert len(devices) == 8
    _, qwen = read_config(SHAPES / "qwen2.5-7b")
    params = abstract_params(qwen, "bfloat16")
    found: dict = {
        "base": {m: base_bytes(qwen, params, Layout("mesh", data=8 // m, model=m, devices=devices)) for m in (1, 2, 4)}
    }
    for kind, model in (("lora", 1), ("lora", 4), ("full", 4)):
        report = report_of(devices, 2**30, kind=kind, model=model)
        sums = {name: dataclasses.astuple(each) for name, each in report.collectives.items()}
        found[f"{kind} {model}"] = {"collectives": sums, "gathered": report.gathered}
    print(json.dumps(found))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install '.[tpu]'")
def test_a_7b_fits_chips_of_16_gib():
    """As a child: this process's compiler flags are for speed of compilation on the CPU."""
    child = subprocess.run(
        [sys.executable, "-c", "from jsublim.cli import main; main()", "aot", "--config", str(QWEN), "--topology", "v5e:4x4"],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert "x model 1" in child.stdout
    used = float(re.search(r"memory per chip +([\d.]+) GiB", child.stdout)[1])
    base = float(re.search(r"base ([\d.]+) GiB", child.stdout)[1])
    assert 14 < base < 14.3 and base < used < 15.75
    assert "no weight of the base" in child.stdout and "all-gather" not in child.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install '.[tpu]'")
def test_decoding_copies_no_weights():
    """Caches, and logits with what is made of them; a slice of the stack that was kept would be as large as the layers."""
    child = subprocess.run(
        [sys.executable, __file__, "decode"],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | TPU | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["temporaries"] < found["layers"] / 4, found


def decode_script() -> None:
    """Compile the loop over tokens of a 0.5B for one TPU chip."""
    _, config = read_config(SHAPES / "qwen2.5-0.5b")
    device = jax.sharding.SingleDeviceSharding(find_topology("v5e:2x2").devices[0])
    params = abstract_params(config, "bfloat16")
    batch = jax.eval_shape(lambda: decoding.empty(config, 1, 16, 192, 64, jnp.bfloat16))
    how = {"temperature": jnp.float32, "top_k": jnp.int32, "top_p": jnp.float32, "repetition_penalty": jnp.float32}
    rest = (
        {k: jax.ShapeDtypeStruct((16,), v) for k, v in how.items()},
        *(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (8, 1)),
    )
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), (params, batch, *rest))
    loop = jax.jit(lambda p, b, *rest: decoding.advance.__wrapped__(config, p, None, b, *rest), donate_argnums=1)
    memory = loop.lower(*arguments).compile().memory_analysis()
    layers = sum(leaf.size * 2 for leaf in jax.tree.leaves(params["layers"]))
    print(json.dumps({"temporaries": memory.temp_size_in_bytes, "layers": layers}))


if __name__ == "__main__":
    decode_script() if sys.argv[1:] == ["decode"] else script()

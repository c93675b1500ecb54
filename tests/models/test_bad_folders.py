"""What no checkpoint or adapter folder may hold: one line that names the file, and the key or tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jsublim.errors import JsublimError
from jsublim.models import load_params, read_config
from jsublim.models.checkpoint import checkpoint_hash
from jsublim.models.lora import init_lora, init_steering
from jsublim.models.peft import load_adapter, save_adapter


def refused(read, file: Path) -> str:
    with pytest.raises(JsublimError) as error:
        read()
    line = str(error.value)
    assert str(file) in line and "\n" not in line
    return line


@pytest.fixture
def sharded(named_checkpoint, tmp_path):
    """A checkpoint of several files, and its index."""
    named_checkpoint("llama").model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    return tmp_path / "model"


def renamed(index: Path, name) -> None:
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["../out.safetensors", "sub/in.safetensors", "{here}/abs.safetensors", "weights.bin", "..",
                                  "", "a\\b.safetensors", "a\0.safetensors", 3, None, ["a"], {}])  # fmt: skip
def test_an_index_names_files_beside_it_only(name, sharded):
    (sharded / "sub").mkdir()
    index = sharded / "model.safetensors.index.json"
    own = sharded / json.loads(index.read_text())["weight_map"]["model.norm.weight"]
    for copy in ("../out.safetensors", "sub/in.safetensors", "abs.safetensors", "weights.bin"):
        shutil.copy(own, sharded / copy)
    renamed(index, name.format(here=sharded) if isinstance(name, str) else name)
    line = refused(lambda: load_params(sharded, read_config(sharded)[1]), index)
    assert "a shard is a *.safetensors file beside the index" in line


def test_the_hash_covers_every_file_that_is_read(sharded):
    """Each file of the folder that is changed either changes the hash or is not read."""
    before = checkpoint_hash(sharded)
    shards = set(json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1
    for name in (*shards, "config.json", "model.safetensors.index.json"):
        content = (sharded / name).read_bytes()
        (sharded / name).write_bytes(content + b" ")
        assert checkpoint_hash(sharded) != before, name
        (sharded / name).write_bytes(content)
    (sharded / "notes.safetensors.d").mkdir()
    (sharded / "folder.safetensors").mkdir()  # no file: not read, and not hashed
    assert checkpoint_hash(sharded) == before


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_number_that_is_none_is_found_in_every_dtype(dtype, bad, tensor, named_checkpoint, tmp_path):
    folder = Path(shutil.copytree(named_checkpoint("llama").folder, tmp_path / "model"))
    file = folder / "model.safetensors"
    tensors = {name: value.astype(dtype) for name, value in load_file(file).items()}
    save_file(tensors, file)
    config = read_config(folder)[1]
    load_params(folder, config)  # what is finite is taken in each dtype
    tensors[tensor].reshape(-1)[-1] = bad
    save_file(tensors, file)
    assert f"tensor '{tensor}' holds NaN or an infinite number" in refused(lambda: load_params(folder, config), file)


def test_weights_that_are_no_floats_are_refused(named_checkpoint, tmp_path):
    folder = Path(shutil.copytree(named_checkpoint("llama").folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)
    save_file(tensors, folder / "model.safetensors")
    assert "model.norm.weight is of I32" in refused(lambda: load_params(folder, read_config(folder)[1]), folder)


ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_parameters: key 'rope_theta' must be a number above 0"),
        ("llama", {"rope_parameters": {"rope_theta": -1e4}}, "'rope_theta'"),
        ("llama", {"rope_parameters": None, "rope_theta": 0.0}, "key 'rope_theta'"),
        ("llama", {"rope_parameters": {"rope_theta": "1e4"}}, "'rope_theta'"),
        ("llama", {"rope_parameters": [1]}, "key 'rope_parameters' must be an object, found [1]"),
        ("llama", {"rope_parameters": None, "rope_scaling": 3}, "key 'rope_scaling' must be an object"),
        ("llama", {"rope_parameters": ROPE | {"factor": 0}}, "'factor'"),
        ("llama", {"rope_parameters": ROPE | {"high_freq_factor": 1.0}}, "'high_freq_factor' must be above"),
        ("llama", {"rope_parameters": {"rope_type": ["x"], "rope_theta": 1e4}}, "scaling ['x'] is not supported"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "key 'architectures' must be a list of names"),
        ("llama", {"architectures": [{}]}, "key 'architectures'"),
        ("llama", {"num_hidden_layers": "3"}, "key 'num_hidden_layers' must be a whole number"),
        ("llama", {"num_hidden_layers": 3.0}, "key 'num_hidden_layers'"),
        ("llama", {"num_hidden_layers": True}, "key 'num_hidden_layers'"),
        ("llama", {"num_hidden_layers": 2**31}, "key 'num_hidden_layers'"),
        ("llama", {"vocab_size": -5}, "key 'vocab_size'"),
        ("llama", {"num_attention_heads": 0}, "key 'num_attention_heads'"),
        ("llama", {"rms_norm_eps": "small"}, "key 'rms_norm_eps'"),
        ("llama", {"rms_norm_eps": 10**400}, "key 'rms_norm_eps'"),
        ("llama", {"tie_word_embeddings": "no"}, "key 'tie_word_embeddings' must be true or false"),
        ("llama", {"attention_bias": 1}, "key 'attention_bias'"),
        ("llama", {"head_dim": 5}, "head_dim 5 is odd"),
        ("qwen2-window", {"layer_types": "full_attention"}, "key 'layer_types'"),
        ("qwen2-window", {"layer_types": [3, 3, 3]}, "key 'layer_types'"),
        ("qwen2-window", {"layer_types": None, "max_window_layers": "x"}, "key 'max_window_layers'"),
        ("gemma3", {"sliding_window_pattern": 0, "layer_types": None}, "key 'sliding_window_pattern'"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "key 'query_pre_attn_scalar'"),
        ("gemma3", {"final_logit_softcapping": -3.0}, "key 'final_logit_softcapping'"),
        ("gemma3-multimodal", {"text_config": [1]}, "key 'text_config' must be an object"),
    ],
)
def test_a_value_of_config_json_that_is_none_is_one_line(name, change, said, named_checkpoint, tmp_path):
    values = json.loads((named_checkpoint(name).folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert said in refused(lambda: read_config(tmp_path), tmp_path / "config.json")


@pytest.fixture
def adapter(named_checkpoint, tmp_path):
    """`adapter(**changes of its config, change=tensors -> tensors)`: an adapter's folder."""
    config = read_config(named_checkpoint("llama").folder)[1]
    start = init_lora(config, jax.random.key(0), rank=2, alpha=4, projections=("q",))
    save_adapter(tmp_path / "adapter", start, config, base="x")

    def make(change=lambda tensors: tensors, **values) -> Path:
        folder = tmp_path / "adapter"
        said = json.loads((folder / "adapter_config.json").read_text()) | values
        (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in said.items() if v != "absent"}))
        save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.mark.parametrize(
    "values",
    [
        {"lora_alpha": 0},
        {"lora_alpha": -8},
        {"lora_alpha": True},
        {"lora_alpha": "8"},
        {"lora_alpha": None},
        {"lora_alpha": "absent"},
        {"lora_alpha": 10**400},
        {"r": 0},
        {"r": 2.0},
        {"r": None},
        {"r": [2]},
        {"use_rslora": "yes"},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": True}},
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 2]]},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"bias": []},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["x"]},
        {"loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"use_something_new": True},
        {"peft_type": ["LORA"]},
    ],
    ids=str,
)
def test_an_option_that_is_not_computed_is_refused(values, adapter):
    (key,) = values
    folder = adapter(**values)
    assert f"key '{key}'" in refused(lambda: load_adapter(folder), folder / "adapter_config.json")


# What PEFT 0.14 to 0.21 writes for a plain LoRA beside the keys of `save_adapter`.
PLAIN = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}, "revision": "main",
    "peft_version": "0.18.0", "exclude_modules": None, "modules_to_save": None, "init_lora_weights": True,
    "rank_pattern": {}, "alpha_pattern": {}, "megatron_config": None, "megatron_core": "megatron.core", "loftq_config": {},
    "eva_config": None, "corda_config": None, "arrow_config": None, "use_dora": False, "use_qalora": False,
    "qalora_group_size": 16, "layer_replication": None, "lora_bias": False, "target_parameters": None,
    "trainable_token_indices": None, "alora_invocation_tokens": None, "ensure_weight_tying": False,
    "runtime_config": {"ephemeral_gpu_offload": False}, "use_bdlora": None, "kasa_config": None,
}  # fmt: skip


def test_what_peft_writes_of_plain_lora_is_taken(adapter):
    assert float(load_adapter(adapter(**PLAIN)).lora["q"]["scale"][0]) == 2.0
    assert load_adapter(adapter(**PLAIN | {"init_lora_weights": "gaussian"})).lora.keys() == {"q"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_factor_that_is_not_finite_is_refused(bad, adapter):
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

    def change(tensors):
        tensors[key][0, 0] = bad
        return tensors

    folder = adapter(change)
    assert f"tensor '{key}' holds NaN" in refused(lambda: load_adapter(folder), folder / "adapter_model.safetensors")


def test_two_factors_for_one_place_are_refused(adapter):
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    folder = adapter(lambda t: t | {key.replace("lora_A", "lora_A.other"): t[key] * 2})
    assert "is there twice" in refused(lambda: load_adapter(folder), folder / "adapter_model.safetensors")


def test_a_steering_vector_is_finite(named_checkpoint, tmp_path):
    config = read_config(named_checkpoint("llama").folder)[1]
    save_adapter(tmp_path / "s", init_steering(config), config, base="x")
    file = tmp_path / "s" / "steering.safetensors"
    vectors = load_file(file)
    vectors["layers.1"][0] = np.nan
    save_file(vectors, file)
    assert "tensor 'layers.1' holds NaN" in refused(lambda: load_adapter(tmp_path / "s"), file)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["[]", '"x"', "[" * 3000, '{"a": 1, "a": 2}', '{"a": NaN}'])
def test_json_that_is_no_object_is_one_line_wherever_it_is_read(name, text, named_checkpoint, tmp_path):
    folder = Path(shutil.copytree(named_checkpoint("llama").folder, tmp_path / "model"))
    (folder / name).write_text(text)
    if name == "adapter_config.json":
        refused(lambda: load_adapter(folder), folder / name)
    else:
        refused(lambda: load_params(folder, read_config(folder)[1]), folder / name)

"""Weights in and out of checkpoint folders: nothing lost, nothing rounded, and one clear error where they do not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jsublim.errors import JsublimError, UsageError
from jsublim.models import init_params, load_params, read_config, save_checkpoint, tensors, weights
from jsublim.models.checkpoint import checkpoint_hash


@pytest.fixture
def copied(named_checkpoint, tmp_path):
    """`copied(name)`: a checkpoint folder whose files a test may change."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(named_checkpoint(name).folder, tmp_path / name))

    return copy


def convert(folder: Path, out: Path, dtype: str = "float32") -> None:
    hf, config = read_config(folder)
    params = load_params(folder, config, dtype)
    save_checkpoint(out, config, params, hf, dtype=dtype, tokenizer=folder)


def same_params(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
        other = dict(jax.tree_util.tree_leaves_with_path(theirs))[path]
        assert leaf.dtype == other.dtype and np.array_equal(leaf, other), path


def text_state(model) -> dict:
    """The tensors of the text model, by the names they have when it stands alone."""
    state = model.state_dict()
    if "model.language_model.norm.weight" not in state:
        return state
    head = {"lm_head.weight": state["lm_head.weight"]}
    start = "model.language_model."
    return {"model." + name[len(start) :]: v for name, v in state.items() if name.startswith(start)} | head


def test_a_written_folder_loads_in_transformers_with_equal_weights(checkpoint, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    convert(checkpoint.folder, tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == type(checkpoint.model).__name__.replace("ForConditionalGeneration", "ForCausalLM")
    theirs, ours = text_state(checkpoint.model), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], value), name


def test_the_model_written_for_transformers_has_the_same_logits(named_checkpoint, padded_rows, tmp_path):
    """The text model taken out of a multimodal checkpoint stands alone."""
    from conftest import torch_logits
    from transformers import AutoModelForCausalLM

    checkpoint = named_checkpoint("gemma3-multimodal")
    convert(checkpoint.folder, tmp_path / "out")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    tokens, valid = padded_rows(7)
    np.testing.assert_allclose(
        torch_logits(alone, tokens, valid)[valid],
        checkpoint.logits(tokens, valid)[valid],
        rtol=1e-5,
        atol=1e-5,
    )


def test_our_own_folder_reads_back_as_it_was(checkpoint, tmp_path):
    convert(checkpoint.folder, tmp_path / "out")
    _, config = read_config(checkpoint.folder)
    _, again = read_config(tmp_path / "out")
    assert again == config
    same_params(load_params(tmp_path / "out", again), load_params(checkpoint.folder, config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_a_checkpoint_compiles_nothing(dtype, named_checkpoint, tmp_path, compiles):
    """Whatever it compiled would be compiled again for the shapes of each checkpoint; no other test has these."""
    config = dataclasses.replace(read_config(named_checkpoint("phi3").folder)[1], intermediate_size=34)
    weights.save_params(tmp_path, config, init_params(config, 0), dtype)
    before = compiles()
    load_params(tmp_path, config, dtype)
    assert compiles() == before


def test_bfloat16_goes_through_unchanged(named_checkpoint, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = named_checkpoint("qwen2").model
    source = tmp_path / "source"
    half = type(model)(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(source)
    convert(source, tmp_path / "out", "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in half.state_dict().items():
        assert again.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(again.state_dict()[name], value), name
    # ... and upcast, exactly
    _, config = read_config(source)
    for ours, theirs in zip(
        jax.tree.leaves(load_params(source, config, "float32")),
        jax.tree.leaves(load_params(source, config, "bfloat16")),
        strict=True,
    ):
        assert ours.dtype == jnp.float32 and np.array_equal(ours, theirs.astype(jnp.float32))


def test_float32_is_rounded_to_bfloat16_as_torch_rounds(named_checkpoint):
    import torch

    checkpoint = named_checkpoint("llama")
    _, config = read_config(checkpoint.folder)
    ours = load_params(checkpoint.folder, config, "bfloat16")["layers"]["gate"]["kernel"][1]
    theirs = checkpoint.model.state_dict()["model.layers.1.mlp.gate_proj.weight"].to(torch.bfloat16)
    assert np.array_equal(np.asarray(ours, np.float32).T, theirs.float().numpy())


@pytest.mark.parametrize("name", ["qwen2-window", "gemma3-multimodal"])
def test_a_sharded_checkpoint_is_the_same_model(name, named_checkpoint, tmp_path):
    checkpoint = named_checkpoint(name)
    checkpoint.model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _, config = read_config(tmp_path)
    same_params(load_params(tmp_path, config), load_params(checkpoint.folder, config))


def test_shards_we_write_load_in_transformers(named_checkpoint, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = named_checkpoint("llama")
    monkeypatch.setattr(weights, "SHARD_BYTES", 10_000)
    convert(checkpoint.folder, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*"))
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(files) == {*shards, "config.json", "generation_config.json", "model.safetensors.index.json"}
    for shard in shards:
        tensors = load_file(tmp_path / "out" / shard)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 10_000
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in checkpoint.model.state_dict().items():
        assert torch.equal(again[name], value), name
    _, config = read_config(tmp_path / "out")
    same_params(load_params(tmp_path / "out", config), load_params(checkpoint.folder, config))


def test_parameters_arrive_in_the_sharding_asked_for(named_checkpoint):
    checkpoint = named_checkpoint("gemma3")
    _, config = read_config(checkpoint.folder)
    plain = load_params(checkpoint.folder, config)
    mesh = jax.make_mesh((1,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    shardings = jax.tree.map(
        lambda leaf: sharding if leaf.ndim > 1 else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
        plain,
    )
    placed = load_params(checkpoint.folder, config, shardings=shardings)
    same_params(placed, plain)
    jax.tree.map(lambda leaf, want: leaf.sharding.is_equivalent_to(want, leaf.ndim) or pytest.fail(), placed, shardings)


# Bad input


def refused(folder: Path) -> str:
    """The one-line error of loading `folder`."""
    _, config = read_config(folder)
    with pytest.raises(JsublimError) as caught:
        load_params(folder, config)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 4, 0.3, 0.99])
def test_a_truncated_file_is_named(keep, copied):
    path = copied("qwen2") / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    message = refused(path.parent)
    assert str(path) in message and "truncated" in message


def test_shards_missing_from_the_folder_are_all_named(named_checkpoint, tmp_path):
    named_checkpoint("qwen2-window").model.save_pretrained(tmp_path, max_shard_size="10KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    second.unlink()
    message = refused(tmp_path)
    assert first.name in message and second.name in message


def test_an_index_that_names_the_wrong_shard_is_an_error(named_checkpoint, tmp_path):
    named_checkpoint("qwen2-window").model.save_pretrained(tmp_path, max_shard_size="10KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    table = index["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    table[name] = next(shard for shard in table.values() if shard != table[name])
    path.write_text(json.dumps(index))
    message = refused(tmp_path)
    assert name in message and table[name] in message


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_broken_index_is_named(text, copied):
    folder = copied("qwen2")
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(folder)


def test_no_weights_at_all_is_said(copied):
    folder = copied("qwen2")
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refused(folder)


@pytest.mark.parametrize("name", ["llama", "gemma3-multimodal"])
def test_missing_extra_and_misshapen_tensors_are_one_error(name, copied):
    folder = copied(name)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    text = [key for key in tensors if "vision" not in key and "projector" not in key]

    def called(end: str) -> str:
        return next(key for key in text if key.endswith(end))

    gone = [called("layers.0.self_attn.k_proj.weight"), called("layers.2.mlp.down_proj.weight")]
    bent = [called("layers.1.mlp.up_proj.weight"), called("layers.2.input_layernorm.weight")]
    extra = [called("layers.0.mlp.gate_proj.weight").replace("gate_proj.weight", end) for end in ("x.bias", "y.bias")]
    for key in gone:
        del tensors[key]
    tensors[bent[0]] = np.ascontiguousarray(tensors[bent[0]].T)
    tensors[bent[1]] = tensors[bent[1]][:-1]
    tensors |= {key: np.zeros(3, np.float32) for key in extra}
    save_file(tensors, path, metadata={"format": "pt"})
    message = refused(folder)
    for key in (*gone, *bent, *extra):
        assert key in message
    assert "[20, 28]" in message and "[28, 20]" in message and "[19]" in message


def test_an_untied_model_needs_its_head_and_a_tied_one_ignores_a_copy(copied):
    folder = copied("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "lm_head.weight" in refused(folder)

    folder = copied("qwen2")
    _, config = read_config(folder)
    before = load_params(folder, config)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    same_params(load_params(folder, config), before)


def test_weights_of_more_layers_than_the_config_says_are_extra(copied):
    folder = copied("llama")
    values = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(values))
    assert "model.layers.2.mlp.up_proj.weight" in refused(folder)


# What a written folder is


def test_nothing_is_overwritten_and_nothing_half_written(named_checkpoint, tmp_path, monkeypatch):
    source = named_checkpoint("qwen2").folder
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="taken"):
        convert(source, taken)
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensors, "save_file", lambda *_, **__: interrupted())
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_what_is_written_has_ordinary_permissions(mask, named_checkpoint, tmp_path):
    before = os.umask(mask)
    try:
        convert(named_checkpoint("qwen2").folder, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o666 & ~mask


def test_tokenizer_files_are_copied_byte_for_byte(copied, tmp_path):
    folder = copied("qwen2")
    (folder / "tokenizer.json").write_bytes(b'{"a":  "\xc3\xa9"}\r\n')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    convert(folder, tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_the_hash_of_a_checkpoint_sees_every_byte_that_matters(name, copied):
    folder = copied("qwen2")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    before = checkpoint_hash(folder)
    assert before == checkpoint_hash(folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint_hash(folder) != before

"""Adapters as PEFT folders: `peft` loads what we write, we load what `peft` writes, and nothing else passes."""

from __future__ import annotations

import copy
import json

import jax
import numpy as np
import pytest
from conftest import torch_logits

from jsublim import load_adapter
from jsublim.errors import JsublimError, UsageError
from jsublim.models import hidden_states, load_params, logits, read_config
from jsublim.models.families import weight_names
from jsublim.models.lora import PROJECTIONS, init_full, init_lora, merge
from jsublim.models.peft import save_adapter

_FAST = {"xla_backend_optimization_level": 0}


def load(checkpoint):
    _, config = read_config(checkpoint.folder)
    return config, load_params(checkpoint.folder, config)


def our_logits(config, params, adapter, tokens, valid):
    def forward(params, adapter):
        return logits(config, params, hidden_states(config, params, tokens, valid, adapter=adapter)[0])

    return np.asarray(jax.jit(forward, compiler_options=_FAST)(params, adapter))


def random_lora(config, **options):
    rng = np.random.default_rng(2)
    start = init_lora(config, jax.random.key(0), **options)
    noisy = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), start.trainable)
    return start.with_trainable(noisy)


@pytest.mark.parametrize("name", ["phi3"])
def test_a_merged_checkpoint_is_the_base_with_its_adapter(name, named_checkpoint, padded_rows, assert_close):
    config, params = load(named_checkpoint(name))
    adapter = random_lora(config, rank=3, alpha=5, layers=(0, 2), projections=("v", "up", "o"))
    tokens, valid = padded_rows(3)
    apart = our_logits(config, params, adapter, tokens, valid)
    assert_close(our_logits(config, merge(params, adapter), None, tokens, valid), apart, 1e-5)
    assert not np.allclose(merge(params, adapter)["layers"]["o"]["kernel"], params["layers"]["o"]["kernel"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-linear-biases", {"projections": PROJECTIONS, "alpha": 5, "rslora": True}),
        ("qwen2-window", {"projections": ("q", "v"), "layers": (0, 2), "alpha": 3}),
        ("gemma3", {"projections": ("o", "gate", "down"), "layers": (1,), "alpha": 7}),
        ("phi3", {"projections": ("v", "up", "down", "q"), "layers": (0, 2), "alpha": 5}),
    ],
)
def test_peft_loads_what_we_save_and_so_do_we(name, options, named_checkpoint, padded_rows, assert_close, tmp_path):
    import peft

    checkpoint = named_checkpoint(name)
    config, params = load(checkpoint)
    adapter = random_lora(config, rank=3, **options)
    save_adapter(tmp_path / "new" / "adapter", adapter, config, base=str(checkpoint.folder))
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(checkpoint.model), tmp_path / "new" / "adapter").eval()
    tokens, valid = padded_rows(3)
    ours, theirs = our_logits(config, params, adapter, tokens, valid), torch_logits(wrapped, tokens, valid)
    assert_close(ours[valid], theirs[valid])
    assert np.abs(theirs - checkpoint.logits(tokens, valid))[valid].max() > 0.01  # it does something
    active = {n.split(".lora_A")[0].split("layers.")[1] for n, _ in wrapped.named_parameters() if "lora_A" in n}
    fused = {part for each in weight_names(config).fused for part in each.parts} & set(adapter.lora)
    modules = len(set(adapter.lora) - fused) + len({"gate" if part in ("gate", "up") else "qkv" for part in fused})
    assert len(active) == len(adapter.layers) * modules
    again = load_adapter(tmp_path / "new" / "adapter", config)
    assert again.layers == adapter.layers and sorted(again.lora) == sorted(adapter.lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, adapter)
    assert sorted(p.name for p in (tmp_path / "new" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.fixture(scope="module")
def peft_folder(named_checkpoint, tmp_path_factory):
    """What `peft` writes for rank-stabilised LoRA on two projections of two layers, and its model."""
    import peft
    import torch

    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["k_proj", "up_proj"], layers_to_transform=[0, 2],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = peft.get_peft_model(copy.deepcopy(named_checkpoint("qwen2-window").model), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    folder = tmp_path_factory.mktemp("peft")
    wrapped.save_pretrained(folder)
    return folder, wrapped


def test_we_load_what_peft_saves(peft_folder, named_checkpoint, padded_rows, assert_close):
    folder, wrapped = peft_folder
    config, params = load(named_checkpoint("qwen2-window"))
    adapter = load_adapter(folder, config)
    tokens, valid = padded_rows(4)
    ours, theirs = our_logits(config, params, adapter, tokens, valid), torch_logits(wrapped, tokens, valid)
    assert_close(ours[valid], theirs[valid])
    assert adapter.layers == (0, 2) and float(adapter.lora["k"]["scale"][0]) == 3.0  # 6 / sqrt(4)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("phi3", ["qkv_proj", "gate_up_proj", "o_proj"]), ("pythia", ["query_key_value", "dense_h_to_4h"])],
)
def test_an_adapter_that_peft_has_trained_on_fused_modules_is_read_and_written_back(
    name, targets, named_checkpoint, padded_rows, assert_close, tmp_path
):
    """PEFT trains one A for q, k and v: each gets a copy, and where they are still one, so are they written."""
    from peft_by_hand import peft_model
    from safetensors.numpy import load_file

    checkpoint = named_checkpoint(name)
    patterns = {"rank_pattern": {targets[0]: 3}, "alpha_pattern": {targets[0]: 9}}
    wrapped = peft_model(checkpoint.model, r=4, lora_alpha=6, target_modules=targets, **patterns)
    wrapped.save_pretrained(tmp_path / "theirs")
    config, params = load(checkpoint)
    adapter = load_adapter(tmp_path / "theirs", config)
    tokens, valid = padded_rows(4)
    ours, theirs = our_logits(config, params, adapter, tokens, valid), torch_logits(wrapped, tokens, valid)
    assert_close(ours[valid], theirs[valid])
    assert float(adapter.lora["k"]["scale"][0]) == 3.0 and adapter.lora["k"]["a"].shape[-1] == 3

    save_adapter(tmp_path / "ours", adapter, config, base="x")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    with pytest.raises(JsublimError, match=f"{targets[0]} holds several projections; give the model's config"):
        load_adapter(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["qwen2-window", "phi3"])
def test_ranks_and_scales_of_single_layers_are_read_and_written_back(
    name, named_checkpoint, padded_rows, assert_close, tmp_path
):
    """What a search for ranks leaves: in one layer another rank, in another one another alpha."""
    from peft_by_hand import peft_model
    from safetensors.numpy import load_file

    checkpoint = named_checkpoint(name)
    first, second = ("qkv_proj", "gate_up_proj") if name == "phi3" else ("k_proj", "up_proj")
    patterns = {
        "rank_pattern": {f"layers.1.self_attn.{first}": 5, f"model.layers.2.self_attn.{first}": 2, second: 3},
        "alpha_pattern": {f"layers.0.mlp.{second}": 9, f"layers.1.self_attn.{first}": 1},
    }
    wrapped = peft_model(checkpoint.model, r=4, lora_alpha=6, target_modules=[first, second], **patterns)
    wrapped.save_pretrained(tmp_path / "theirs")
    config, params = load(checkpoint)
    tokens, valid = padded_rows(4)
    theirs = torch_logits(wrapped, tokens, valid)
    adapter = load_adapter(tmp_path / "theirs", config)
    assert_close(our_logits(config, params, adapter, tokens, valid)[valid], theirs[valid])
    assert [int(x) for x in (adapter.lora["k"]["a"] != 0).any(axis=1).sum(axis=1)] == [4, 5, 2]

    save_adapter(tmp_path / "ours", adapter, config, base="x")
    before, after = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    again = load_adapter(tmp_path / "ours", config)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_modules_of_another_family_are_refused(peft_folder, named_checkpoint):
    config, _ = load(named_checkpoint("phi3"))
    with pytest.raises(JsublimError, match=r"is no LoRA factor of a known module; known: o_proj"):
        load_adapter(peft_folder[0], config)


@pytest.fixture
def altered(peft_folder, tmp_path):
    """`altered(tensors -> tensors, **config)`: the folder with changes."""
    from safetensors.numpy import load_file, save_file

    def make(change=lambda tensors: tensors, **values):
        config = json.loads((peft_folder[0] / "adapter_config.json").read_text())
        tensors = load_file(peft_folder[0] / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | values))
        save_file(change(tensors), tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_dora": True}, "DoRA is not computed; merge it"),
        ({"rank_pattern": {"k_proj": 2}}, "k_proj must have rank r=2"),
        ({"rank_pattern": {"layers.2.self_attn.k_proj": 2}}, "k_proj must have rank r=2"),
        ({"rank_pattern": {"layers.2.self_attn.kk_proj": 2}}, "rank_pattern"),
        ({"rank_pattern": {"k_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {".*k_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"k_proj": "2"}}, "alpha_pattern"),
        ({"alpha_pattern": ["k_proj"]}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "'LORA', the only kind"),
    ],
)
def test_variants_that_we_do_not_compute_are_refused(values, said, altered):
    with pytest.raises(JsublimError, match=said):
        load_adapter(altered(**values))


def one(tensors, *parts):
    return next(key for key in tensors if all(part in key for part in parts))


def without(*parts):
    return lambda tensors: {key: value for key, value in tensors.items() if key != one(tensors, *parts)}


def reshaped(shape, *parts):
    return lambda tensors: tensors | {one(tensors, *parts): np.ones(shape, np.float32)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("layers.2.", "k_proj", "lora_B"), "missing layer 2 k_proj B"),
        (lambda tensors: {}, "missing all"),
        (lambda tensors: tensors | {"base.lm_head.lora_A.weight": np.ones((4, 4), np.float32)}, "lm_head"),
        (reshaped((4, 21), "layers.2.", "k_proj", "lora_A"), "k"),  # another width in one layer
        (reshaped((3, 20), "layers.2.", "k_proj", "lora_A"), "k"),  # another rank in one layer
        (reshaped((4,), "layers.2.", "k_proj", "lora_A"), "k"),  # no matrix
    ],
    ids=["missing", "empty", "unknown", "width", "rank", "vector"],
)
def test_tensors_that_do_not_form_whole_layers_are_refused(change, said, altered):
    with pytest.raises(JsublimError, match=said) as error:
        load_adapter(altered(change))
    assert "\n" not in str(error.value) and "adapter_model.safetensors" in str(error.value)


def test_factors_that_do_not_fit_each_other_are_refused(altered):
    """Every B with another rank than every A: whole layers, but no product."""

    def change(tensors):
        return {k: v[:, :2].copy() if "lora_B" in k else v for k, v in tensors.items()}

    with pytest.raises(JsublimError, match="rank"):
        load_adapter(altered(change))


def test_an_adapter_of_another_model_is_refused(peft_folder, named_checkpoint):
    folder, _ = peft_folder
    config, _ = load(named_checkpoint("gemma3"))  # other sizes
    with pytest.raises(JsublimError, match=r"k_proj maps \d+ to \d+, the model"):
        load_adapter(folder, config)


def test_a_layer_outside_the_model_is_refused(altered, named_checkpoint):
    config, _ = load(named_checkpoint("qwen2-window"))
    folder = altered(lambda tensors: {key.replace("layers.2.", "layers.7."): v for key, v in tensors.items()})
    assert load_adapter(folder).layers == (0, 7)
    with pytest.raises(JsublimError, match="has layer 7, the model has 3"):
        load_adapter(folder, config)


def test_broken_folders_are_one_clear_error(altered, tmp_path):
    with pytest.raises(JsublimError, match=r"adapter_config.json"):
        load_adapter(tmp_path / "absent")
    file = altered() / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(JsublimError, match=r"adapter_model.safetensors: cannot be read"):
        load_adapter(tmp_path)
    file.unlink()
    with pytest.raises(JsublimError, match=r"adapter_model.safetensors: cannot be read"):
        load_adapter(tmp_path)


def test_nothing_is_overwritten_and_whole_layers_are_no_lora(named_checkpoint, tmp_path):
    config, params = load(named_checkpoint("qwen2-window"))
    adapter = random_lora(config, rank=1, alpha=1, projections=("q",))
    save_adapter(tmp_path / "a", adapter, config, base="x")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="already exists"):
        save_adapter(tmp_path / "a", random_lora(config, rank=2, alpha=1), config, base="x")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(UsageError, match="only LoRA"):
        save_adapter(tmp_path / "b", init_full(config, params, (0,)), config, base="x")
    assert not (tmp_path / "b").exists()

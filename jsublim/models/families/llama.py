"""Llama 3.x and what shares its shape (SmolLM2, Falcon3): no biases by default, rotary scaling by config."""

from __future__ import annotations

from jsublim.models.config import MOST_LAYERS, Biases, HFConfig, ModelConfig, Norms
from jsublim.models.families.names import PRE_NORM

FAMILY = "llama"
ARCHITECTURES = ("LlamaForCausalLM",)
NAMES = PRE_NORM


def read(hf: HFConfig) -> ModelConfig:
    """The architecture that a `config.json` of this family describes."""
    hf.must_be("hidden_act", "silu")
    heads, hidden = hf.integer("num_attention_heads"), hf.integer("hidden_size")
    bias = hf.flag("attention_bias", False)
    return ModelConfig(
        family=FAMILY,
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=hf.integer("intermediate_size"),
        num_layers=hf.integer("num_hidden_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=hf.integer("num_key_value_heads", heads),
        head_dim=hf.integer("head_dim", hidden // heads),
        norms=Norms(hf.number("rms_norm_eps", 1e-6)),
        rope=hf.rope(default_theta=10_000.0),
        tied=hf.flag("tie_word_embeddings", False),
        biases=Biases(qkv=bias, output=bias, mlp=hf.flag("mlp_bias", False)),
    )

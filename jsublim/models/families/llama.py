"""Llama 3.x and what shares its shape (SmolLM2, Falcon3): no biases by default, rotary scaling by config."""

from __future__ import annotations

from jsublim.models.config import Biases, HFConfig, ModelConfig, Norms
from jsublim.models.families.names import PRE_NORM

FAMILY = "llama"
ARCHITECTURES = ("LlamaForCausalLM",)
NAMES = PRE_NORM


def read(hf: HFConfig) -> ModelConfig:
    """The architecture that a `config.json` of this family describes."""
    hf.must_be("hidden_act", "silu")
    heads = hf["num_attention_heads"]
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(
        family=FAMILY,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads", heads),
        head_dim=hf.get("head_dim", hf["hidden_size"] // heads),
        norms=Norms(hf.get("rms_norm_eps", 1e-6)),
        rope=hf.rope(default_theta=10_000.0),
        tied=hf.get("tie_word_embeddings", False),
        biases=Biases(qkv=bias, output=bias, mlp=bool(hf.get("mlp_bias", False))),
    )

"""Llama 3.x and what shares its shape (SmolLM2, Falcon3): no biases by default, rotary scaling by config."""

from __future__ import annotations

from jsublim.models.config import Biases, ModelConfig, Norms
from jsublim.models.families.names import PRE_NORM
from jsublim.models.hf_config import HFConfig

FAMILY = "llama"
ARCHITECTURES = ("LlamaForCausalLM",)
NAMES = PRE_NORM


def read(hf: HFConfig) -> ModelConfig:
    hf.must_be("hidden_act", "silu")
    bias = hf.flag("attention_bias", False)
    return ModelConfig(
        family=FAMILY,
        **hf.sizes(),
        norms=Norms(hf.number("rms_norm_eps", 1e-6)),
        rope=hf.rope(default_theta=10_000.0),
        tied=hf.flag("tie_word_embeddings", False),
        biases=Biases(qkv=bias, output=bias, mlp=hf.flag("mlp_bias", False)),
    )

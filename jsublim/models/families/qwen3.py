"""Qwen3, dense: as Qwen2, with a norm on the heads of queries and keys in place of biases.

Its chat template would let the model think before it answers; `chat.py` switches that off, by the template's own switch.
"""

from __future__ import annotations

from jsublim.models.config import Biases, ModelConfig, Norms
from jsublim.models.families.names import HEAD_NORMS, NORMS_BEFORE, OUTSIDE, SEVEN, WeightNames
from jsublim.models.families.qwen2 import windows
from jsublim.models.hf_config import HFConfig

FAMILY = "qwen3"
ARCHITECTURES = ("Qwen3ForCausalLM",)
NAMES = WeightNames(layer=SEVEN | HEAD_NORMS | NORMS_BEFORE, other=OUTSIDE)


def read(hf: HFConfig) -> ModelConfig:
    hf.must_be("hidden_act", "silu")
    bias = hf.flag("attention_bias", False)
    return ModelConfig(
        family=FAMILY,
        **hf.sizes(head_dim=128),
        norms=Norms(hf.number("rms_norm_eps", 1e-6), on_heads=True),
        rope=hf.rope(default_theta=10_000.0),
        tied=hf.flag("tie_word_embeddings", False),
        biases=Biases(qkv=bias, output=bias),
        local=windows(hf),
    )

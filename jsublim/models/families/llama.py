"""Llama 3.x and what shares its shape (SmolLM2, Falcon3): no biases by default, rotary scaling by config."""

from __future__ import annotations

from jsublim.models.config import Biases, ModelConfig
from jsublim.models.families.names import PRE_NORM
from jsublim.models.hf_config import HFConfig

FAMILY = "llama"
ARCHITECTURES = ("LlamaForCausalLM",)
NAMES = PRE_NORM


def read(hf: HFConfig) -> ModelConfig:
    bias = hf.flag("attention_bias", False)
    return hf.model(FAMILY, biases=Biases(qkv=bias, output=bias, mlp=hf.flag("mlp_bias", False)))

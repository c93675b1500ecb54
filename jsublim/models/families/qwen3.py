"""Qwen3, dense: as Qwen2, with a norm on the heads of queries and keys in place of biases.

Its chat template would let the model think before it answers; `chat.py` switches that off, by the template's own switch.
"""

from __future__ import annotations

from jsublim.models.config import ModelConfig
from jsublim.models.families.names import HEAD_NORMS, NORMS_BEFORE, OUTSIDE, SEVEN, WeightNames
from jsublim.models.families.qwen2 import windows
from jsublim.models.hf_config import HFConfig

FAMILY = "qwen3"
ARCHITECTURES = ("Qwen3ForCausalLM",)
NAMES = WeightNames(layer=SEVEN | HEAD_NORMS | NORMS_BEFORE, other=OUTSIDE)


def read(hf: HFConfig) -> ModelConfig:
    return hf.model(FAMILY, head_dim=128, norms={"on_heads": True}, local=windows(hf))

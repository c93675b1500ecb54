"""Gemma-2: four norms a block, every second layer local, soft caps on attention's products and on the logits."""

from __future__ import annotations

from typing import Any

from jsublim.models.config import Local, MLPKind, ModelConfig, Scaling
from jsublim.models.families.names import FOUR_NORMS, OUTSIDE, SEVEN, WeightNames
from jsublim.models.hf_config import HFConfig

FAMILY = "gemma2"
ARCHITECTURES = ("Gemma2ForCausalLM",)
NAMES = WeightNames(layer=SEVEN | FOUR_NORMS, other=OUTSIDE)
# What all Gemmas are: a norm's weights stand around 1, and so on.
GEMMA: dict[str, Any] = {
    "activation": ("hidden_activation", "gelu_pytorch_tanh"),
    "norms": {"offset": 1.0, "in_float32": True, "after_sublayers": True},
    "tied": True,
    "mlp": MLPKind("gelu_tanh"),
}


def read(hf: HFConfig) -> ModelConfig:
    def softcap(key: str, absent: float) -> float | None:  # null is none
        return hf.number(key, absent) if hf.has(key, absent=True) else None

    hf.must_be("use_bidirectional_attention", False)
    scales = Scaling(
        embedding=True,
        query=hf.number("query_pre_attn_scalar", 256) ** -0.5,
        softcap=softcap("final_logit_softcapping", 30.0),
        attention_softcap=softcap("attn_logit_softcapping", 50.0),
    )
    local = Local(hf.kinds(lambda i: i % 2 == 0), hf.integer("sliding_window", 4096))
    return hf.model(FAMILY, head_dim=256, scales=scales, local=local, **GEMMA)

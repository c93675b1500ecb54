"""Phi-3, Phi-3.5 and Phi-4 (dense): as Llama, with queries, keys and values in one module, gate and up in another; some
turn only a share of each head (Phi-4-mini), some have a window on every layer, and long ones have LongRoPE.

LongRoPE has two sets of frequencies. We have the one for rows of up to `original_max_position_embeddings` tokens, and refuse
longer rows.
"""

from __future__ import annotations

from jsublim.models.config import Local, ModelConfig
from jsublim.models.families.names import NORMS_BEFORE, OUTSIDE, Fused, WeightNames, projections
from jsublim.models.hf_config import HFConfig

FAMILY = "phi3"
ARCHITECTURES = ("Phi3ForCausalLM",)
NAMES = WeightNames(
    layer=projections({"o": "layers.{i}.self_attn.o_proj", "down": "layers.{i}.mlp.down_proj"}) | NORMS_BEFORE,
    other=OUTSIDE,
    fused=(
        Fused("layers.{i}.self_attn.qkv_proj", ("q", "k", "v")),
        Fused("layers.{i}.mlp.gate_up_proj", ("gate", "up")),
    ),
)


def read(hf: HFConfig) -> ModelConfig:
    hf.must_be("attention_bias", False)
    every = (True,) * hf.layers()
    local = Local(every, hf.integer("sliding_window")) if hf.has("sliding_window") else Local()
    return hf.model(FAMILY, eps=1e-5, rope=hf.rope(default_share=1.0), local=local)

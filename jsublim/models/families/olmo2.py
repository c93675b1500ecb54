"""OLMo-2: norms after the sublayers only, and on queries and keys before they are cut into heads; rotary numbers stay float32."""

from __future__ import annotations

from dataclasses import replace

from jsublim.models.config import Biases, ModelConfig, Norms
from jsublim.models.families.names import FOUR_NORMS, HEAD_NORMS, OUTSIDE, SEVEN, WeightNames
from jsublim.models.hf_config import HFConfig

FAMILY = "olmo2"
ARCHITECTURES = ("Olmo2ForCausalLM",)
_AFTER = {path: name for path, name in FOUR_NORMS.items() if path[0].startswith("post")}
NAMES = WeightNames(layer=SEVEN | HEAD_NORMS | _AFTER, other=OUTSIDE)


def read(hf: HFConfig) -> ModelConfig:
    hf.must_be("hidden_act", "silu")
    bias = hf.flag("attention_bias", False)
    eps = hf.number("rms_norm_eps", 1e-5)
    return ModelConfig(
        family=FAMILY,
        **hf.sizes(),
        norms=Norms(eps, in_float32=True, before_sublayers=False, after_sublayers=True, on_projections=True),
        rope=replace(hf.rope(default_theta=10_000.0), in_float32=True),
        tied=hf.flag("tie_word_embeddings", False),
        biases=Biases(qkv=bias, output=bias),
    )

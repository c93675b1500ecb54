"""OLMo-2: norms after the sublayers only, and on queries and keys before they are cut into heads; rotary numbers stay float32."""

from __future__ import annotations

from dataclasses import replace

from jsublim.models.config import ModelConfig
from jsublim.models.families.names import FOUR_NORMS, HEAD_NORMS, OUTSIDE, SEVEN, WeightNames
from jsublim.models.hf_config import HFConfig

FAMILY = "olmo2"
ARCHITECTURES = ("Olmo2ForCausalLM",)
_AFTER = {path: name for path, name in FOUR_NORMS.items() if path[0].startswith("post")}
NAMES = WeightNames(layer=SEVEN | HEAD_NORMS | _AFTER, other=OUTSIDE)


def read(hf: HFConfig) -> ModelConfig:
    norms = {"in_float32": True, "before_sublayers": False, "after_sublayers": True, "on_projections": True}
    return hf.model(FAMILY, eps=1e-5, norms=norms, rope=replace(hf.rope(), in_float32=True))

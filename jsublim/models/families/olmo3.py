"""OLMo-3: OLMo-2 with local layers, three of four; a scaling of the rotary numbers is for the global ones only."""

from __future__ import annotations

from dataclasses import replace

from jsublim.models.config import Local, ModelConfig, Rope
from jsublim.models.families import olmo2
from jsublim.models.hf_config import HFConfig

FAMILY = "olmo3"
ARCHITECTURES = ("Olmo3ForCausalLM",)
NAMES = olmo2.NAMES
_THETA = 500_000.0


def read(hf: HFConfig) -> ModelConfig:
    by_kind = "sliding_attention" in hf.section("rope_parameters").values
    near = hf.rope("sliding_attention", _THETA) if by_kind else Rope(hf.number("rope_theta", _THETA))
    far = hf.rope("full_attention", _THETA)
    local = Local(
        hf.kinds(lambda i: (i + 1) % 4 > 0), hf.integer("sliding_window", 4096), replace(near, in_float32=True)
    )
    return replace(olmo2.read(hf), family=FAMILY, rope=replace(far, in_float32=True), local=local)

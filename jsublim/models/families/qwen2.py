"""Qwen2 and Qwen2.5: biases on q, k, v; tied head up to 3B; sliding windows only where `use_sliding_window` says so."""

from __future__ import annotations

from jsublim.models.config import Biases, Local, ModelConfig
from jsublim.models.families.names import PRE_NORM
from jsublim.models.hf_config import HFConfig

FAMILY = "qwen2"
ARCHITECTURES = ("Qwen2ForCausalLM",)
NAMES = PRE_NORM


def windows(hf: HFConfig) -> Local:
    """The layers from `max_window_layers` on, where windows are used at all."""
    windowed = hf.flag("use_sliding_window", False) and hf.has("sliding_window")
    first = hf.integer("max_window_layers", 28, least=0)
    kinds = hf.kinds(lambda i: windowed and i >= first)
    return Local(kinds, hf.integer("sliding_window")) if windowed else Local()


def read(hf: HFConfig) -> ModelConfig:
    return hf.model(FAMILY, biases=Biases(qkv=True), local=windows(hf))

"""Mistral and Ministral: as Llama, with a sliding window on every layer (Mistral) or on those that `layer_types` names
(Ministral)."""

from __future__ import annotations

from jsublim.models.config import Biases, Local, ModelConfig
from jsublim.models.families.names import PRE_NORM
from jsublim.models.hf_config import HFConfig

FAMILY = "mistral"
ARCHITECTURES = ("MistralForCausalLM", "MinistralForCausalLM")
NAMES = PRE_NORM
_WINDOW = 4096  # where the file does not name it; null says that there is none


def read(hf: HFConfig) -> ModelConfig:
    """The architecture that a `config.json` of this family describes. One that has `layer_types` is a Ministral, whatever
    its architecture is called: `transformers` reads it so too."""
    windowed = hf.has("sliding_window", absent=True)
    kinds = hf.kinds(lambda _: windowed)
    if any(kinds) and not windowed:
        raise hf.refuse("sliding_window", "a number of tokens, as layer_types has 'sliding_attention'")
    local = Local(kinds, hf.integer("sliding_window", _WINDOW)) if windowed else Local()
    return hf.model(FAMILY, biases=Biases(), local=local)

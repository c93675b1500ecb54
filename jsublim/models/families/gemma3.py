"""Gemma-3, text: four norms a block, q/k norm, local and global layers with a rotary base each.

A multimodal checkpoint holds the text model under `text_config` and a prefix of its weight names.
"""

from __future__ import annotations

from typing import Any

from jsublim.models.config import Local, ModelConfig, Rope, Scaling
from jsublim.models.families.gemma2 import GEMMA
from jsublim.models.families.names import FOUR_NORMS, HEAD_NORMS, OUTSIDE, SEVEN, WeightNames
from jsublim.models.hf_config import HFConfig

FAMILY = "gemma3"
ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
NAMES = WeightNames(layer=SEVEN | HEAD_NORMS | FOUR_NORMS, other=OUTSIDE)

# Multimodal checkpoints leave out of `text_config` whatever equals the defaults of the architecture.
_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}


def text_config(hf: HFConfig) -> dict[str, Any]:
    """The text part of a multimodal config as a stand-alone one; a text-only config comes back as it is."""
    if "text_config" not in hf.values:
        return hf.values
    shared = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "tie_word_embeddings")
    inherited = {key: hf.values[key] for key in shared if key in hf.values}
    text = hf.section("text_config").values
    return inherited | text | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}


def read(hf: HFConfig) -> ModelConfig:
    hf = HFConfig(_DEFAULTS | {key: value for key, value in hf.values.items() if value is not None}, hf.source)
    hf.must_be("use_bidirectional_attention", False)
    hf.must_be("attn_logit_softcapping")
    pattern = hf.integer("sliding_window_pattern", hf.integer("_sliding_window_pattern", 6))
    # Under the old names the rotary scaling is for the global layers only, and the local base stands apart.
    new_names = "sliding_attention" in hf.section("rope_parameters").values
    local_rope = hf.rope("sliding_attention") if new_names else Rope(hf.number("rope_local_base_freq", 10_000.0))
    softcap = hf.number("final_logit_softcapping") if hf.has("final_logit_softcapping") else None
    query = hf.number("query_pre_attn_scalar") ** -0.5
    local = Local(hf.kinds(lambda i: (i + 1) % pattern > 0), hf.integer("sliding_window"), local_rope)
    return hf.model(
        FAMILY,
        **GEMMA | {"norms": GEMMA["norms"] | {"on_heads": True}},
        rope=hf.rope("full_attention", default_theta=1_000_000.0),
        scales=Scaling(embedding=True, query=query, softcap=softcap),
        local=local,
    )

"""Gemma-3, text: four norms a block, q/k norm, local and global layers with a rotary base each.

A multimodal checkpoint holds the text model under `text_config` and a prefix of its weight names.
"""

from __future__ import annotations

from typing import Any

from jsublim.models.config import MOST_LAYERS, Biases, HFConfig, Local, ModelConfig, Norms, Rope, Scales
from jsublim.models.families.names import OUTSIDE, WeightNames, projections

FAMILY = "gemma3"
ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
NAMES = WeightNames(
    layer=projections()
    | {
        ("q_norm", "scale"): "layers.{i}.self_attn.q_norm.weight",
        ("k_norm", "scale"): "layers.{i}.self_attn.k_norm.weight",
        ("attn_norm", "scale"): "layers.{i}.input_layernorm.weight",
        ("post_attn_norm", "scale"): "layers.{i}.post_attention_layernorm.weight",
        ("mlp_norm", "scale"): "layers.{i}.pre_feedforward_layernorm.weight",
        ("post_mlp_norm", "scale"): "layers.{i}.post_feedforward_layernorm.weight",
    },
    other=OUTSIDE,
)

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
    own = hf.section("text_config").values
    return inherited | own | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}


def read(hf: HFConfig) -> ModelConfig:
    """The architecture that a `config.json` of this family describes."""
    hf = HFConfig(_DEFAULTS | {key: value for key, value in hf.values.items() if value is not None}, hf.source)
    hf.must_be("hidden_activation", "gelu_pytorch_tanh")
    hf.must_be("use_bidirectional_attention", False)
    hf.must_be("attn_logit_softcapping")
    layers = hf.integer("num_hidden_layers", most=MOST_LAYERS)
    pattern = hf.integer("sliding_window_pattern", hf.integer("_sliding_window_pattern", 6))
    kinds = hf.kinds(["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)])
    # Under the old names the rotary scaling is for the global layers only, and the local base stands apart.
    new_names = "sliding_attention" in hf.section("rope_parameters").values
    bias, capped = hf.flag("attention_bias", False), hf.values.get("final_logit_softcapping") is not None
    return ModelConfig(
        family=FAMILY,
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hf.integer("hidden_size"),
        intermediate_size=hf.integer("intermediate_size"),
        num_layers=layers,
        num_heads=hf.integer("num_attention_heads"),
        num_kv_heads=hf.integer("num_key_value_heads"),
        head_dim=hf.integer("head_dim"),
        norms=Norms(hf.number("rms_norm_eps", 1e-6), offset=1.0, on_heads=True, after_sublayers=True),
        rope=hf.rope("full_attention", default_theta=1_000_000.0),
        tied=hf.flag("tie_word_embeddings", True),
        activation="gelu_tanh",
        biases=Biases(qkv=bias, output=bias),
        scales=Scales(
            embedding=True,
            query=hf.number("query_pre_attn_scalar") ** -0.5,
            softcap=hf.number("final_logit_softcapping") if capped else None,
        ),
        local=Local(
            kinds,
            hf.integer("sliding_window"),
            hf.rope("sliding_attention", default_theta=10_000.0)
            if new_names
            else Rope(hf.number("rope_local_base_freq", 10_000.0)),
        ),
    )

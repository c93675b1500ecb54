"""Gemma-2: four norms a block, every second layer local, soft caps on attention's products and on the logits."""

from __future__ import annotations

from jsublim.models.config import Biases, Local, MLPKind, ModelConfig, Norms, Scales
from jsublim.models.families.names import FOUR_NORMS, OUTSIDE, SEVEN, WeightNames
from jsublim.models.hf_config import HFConfig

FAMILY = "gemma2"
ARCHITECTURES = ("Gemma2ForCausalLM",)
NAMES = WeightNames(layer=SEVEN | FOUR_NORMS, other=OUTSIDE)


def softcap(hf: HFConfig, key: str, absent: float) -> float | None:
    """A soft cap: null is none, and a file that does not name it means the architecture's."""
    return hf.number(key, absent) if hf.has(key, absent=True) else None


def read(hf: HFConfig) -> ModelConfig:
    hf.must_be("hidden_activation", "gelu_pytorch_tanh")
    hf.must_be("use_bidirectional_attention", False)
    bias = hf.flag("attention_bias", False)
    return ModelConfig(
        family=FAMILY,
        **hf.sizes(head_dim=256),
        norms=Norms(hf.number("rms_norm_eps", 1e-6), offset=1.0, in_float32=True, after_sublayers=True),
        rope=hf.rope(default_theta=10_000.0),
        tied=hf.flag("tie_word_embeddings", True),
        mlp=MLPKind("gelu_tanh"),
        biases=Biases(qkv=bias, output=bias),
        scales=Scales(
            embedding=True,
            query=hf.number("query_pre_attn_scalar", 256) ** -0.5,
            softcap=softcap(hf, "final_logit_softcapping", 30.0),
            attention_softcap=softcap(hf, "attn_logit_softcapping", 50.0),
        ),
        local=Local(hf.kinds(lambda i: i % 2 == 0), hf.integer("sliding_window", 4096)),
    )

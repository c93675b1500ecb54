"""GPT-NeoX, which Pythia is: attention and MLP side by side, LayerNorms and projections with biases, a share of each head
turned, an MLP without a gate; queries, keys and values in one module, head by head."""

from __future__ import annotations

from jsublim.models.config import Biases, MLPKind, ModelConfig
from jsublim.models.families.names import NORMS_BEFORE, Fused, WeightNames, projections
from jsublim.models.hf_config import HFConfig

FAMILY = "pythia"  # what its models are called
ARCHITECTURES = ("GPTNeoXForCausalLM",)
NAMES = WeightNames(
    layer=projections(
        {
            "o": "layers.{i}.attention.dense",
            "up": "layers.{i}.mlp.dense_h_to_4h",
            "down": "layers.{i}.mlp.dense_4h_to_h",
        }
    )
    | NORMS_BEFORE
    | {(norm, "bias"): name.replace(".weight", ".bias") for (norm, _), name in NORMS_BEFORE.items()},
    other={
        ("embed", "weight"): "embed_in.weight",
        ("norm", "scale"): "final_layer_norm.weight",
        ("norm", "bias"): "final_layer_norm.bias",
        ("head", "weight"): "embed_out.weight",
    },
    fused=(Fused("layers.{i}.attention.query_key_value", ("q", "k", "v"), by_head=True),),
    prefix="gpt_neox.",
    buffers=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
)
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def read(hf: HFConfig) -> ModelConfig:
    heads, bias = hf.integer("num_attention_heads"), hf.flag("attention_bias", True)
    hf.must_be("num_key_value_heads", heads)
    hf.must_be("head_dim", hf.integer("hidden_size") // heads)
    activation = _ACTIVATIONS.get(str(hf.values.get("hidden_act") or "gelu"), "")  # another one is refused
    return hf.model(
        FAMILY,
        activation=("hidden_act", *_ACTIVATIONS),
        eps=("layer_norm_eps", 1e-5),
        norms={"in_float32": True, "centred": True},
        rope=hf.rope(default_share=0.25, theta_key="rotary_emb_base", share_key="rotary_pct"),
        mlp=MLPKind(activation, gated=False, parallel=hf.flag("use_parallel_residual", True)),
        biases=Biases(qkv=bias, output=bias, mlp=True),
    )

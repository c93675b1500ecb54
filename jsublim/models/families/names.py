"""Weight names shared by the families: our parameter path against the name in `*.safetensors`.

A path is `(group, ..., leaf)`; in a layer's names `{i}` stands for its index. A leaf called `kernel` is stored
transposed there (`[out, in]`), since we multiply from the left (`x @ kernel`).
"""

from __future__ import annotations

from dataclasses import dataclass

ParameterPath = tuple[str, ...]


@dataclass(frozen=True)
class Fused:
    """Projections whose outputs a checkpoint keeps in one module, one after another."""

    module: str  # its name, without `.weight`
    parts: tuple[str, ...]  # our names, in the order in which they lie there
    by_head: bool = False  # not all outputs of one and then of the next, but head by head


@dataclass(frozen=True)
class WeightNames:
    """A family's names of its tensors."""

    layer: dict[ParameterPath, str]  # path inside "layers" -> name with {i}; without the projections that are fused
    other: dict[ParameterPath, str]  # path outside of them -> name
    fused: tuple[Fused, ...] = ()  # modules that hold several projections
    prefix: str = "model."  # stands before every name but the head's
    # Ends of names that files may hold, and that nothing is read from.
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)


def projections(names: dict[str, str]) -> dict[ParameterPath, str]:
    """Kernels and biases of projections: our name -> module with {i}."""
    leaves = {"kernel": "weight", "bias": "bias"}
    return {(ours, leaf): f"{module}.{end}" for ours, module in names.items() for leaf, end in leaves.items()}


SEVEN = projections(
    {name: f"layers.{{i}}.self_attn.{name}_proj" for name in ("q", "k", "v", "o")}
    | {name: f"layers.{{i}}.mlp.{name}_proj" for name in ("gate", "up", "down")}
)
HEAD_NORMS = {
    ("q_norm", "scale"): "layers.{i}.self_attn.q_norm.weight",
    ("k_norm", "scale"): "layers.{i}.self_attn.k_norm.weight",
}
NORMS_BEFORE = {
    ("attn_norm", "scale"): "layers.{i}.input_layernorm.weight",
    ("mlp_norm", "scale"): "layers.{i}.post_attention_layernorm.weight",
}
FOUR_NORMS = {
    ("attn_norm", "scale"): "layers.{i}.input_layernorm.weight",
    ("post_attn_norm", "scale"): "layers.{i}.post_attention_layernorm.weight",
    ("mlp_norm", "scale"): "layers.{i}.pre_feedforward_layernorm.weight",
    ("post_mlp_norm", "scale"): "layers.{i}.post_feedforward_layernorm.weight",
}
OUTSIDE = {
    ("embed", "weight"): "embed_tokens.weight",
    ("norm", "scale"): "norm.weight",
    ("head", "weight"): "lm_head.weight",
}

PRE_NORM = WeightNames(layer=SEVEN | NORMS_BEFORE, other=OUTSIDE)

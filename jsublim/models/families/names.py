"""Weight names shared by the families: our parameter path against the name in `*.safetensors`.

A path is `(group, ..., leaf)`; in a layer's names `{i}` stands for its index. A leaf called `kernel` is stored
transposed there (`[out, in]`), since we multiply from the left (`x @ kernel`).
"""

from __future__ import annotations

from dataclasses import dataclass

Path = tuple[str, ...]


@dataclass(frozen=True)
class WeightNames:
    """A family's names of its tensors."""

    layer: dict[Path, str]  # path inside "layers" -> name with {i}
    other: dict[Path, str]


def projections() -> dict[Path, str]:
    """The seven projections of a block, kernels and (where a family has them) biases."""
    names = {}
    for ours in ("q", "k", "v", "o"):
        names[(ours, "kernel")] = f"layers.{{i}}.self_attn.{ours}_proj.weight"
        names[(ours, "bias")] = f"layers.{{i}}.self_attn.{ours}_proj.bias"
    for ours in ("gate", "up", "down"):
        names[(ours, "kernel")] = f"layers.{{i}}.mlp.{ours}_proj.weight"
        names[(ours, "bias")] = f"layers.{{i}}.mlp.{ours}_proj.bias"
    return names


OUTSIDE = {
    ("embed", "weight"): "embed_tokens.weight",
    ("norm", "scale"): "norm.weight",
    ("head", "weight"): "lm_head.weight",
}

PRE_NORM = WeightNames(
    layer=projections()
    | {
        ("attn_norm", "scale"): "layers.{i}.input_layernorm.weight",
        ("mlp_norm", "scale"): "layers.{i}.post_attention_layernorm.weight",
    },
    other=OUTSIDE,
)

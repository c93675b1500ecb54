"""The supported families: how each one's `config.json` and weight names map to ours, in both directions."""

from __future__ import annotations

from typing import Any

from jsublim.core.reading import shown
from jsublim.errors import JsublimError
from jsublim.models.config import ModelConfig, Rope
from jsublim.models.families import gemma2, gemma3, gpt_neox, llama, mistral, olmo2, olmo3, phi3, qwen2, qwen3
from jsublim.models.families.names import Fused, WeightNames
from jsublim.models.hf_config import HFConfig

# Each file has its family's NAMES, its ARCHITECTURES, and `read`: the architecture that a `config.json` describes.
_FAMILIES = (qwen2, qwen3, gemma2, gemma3, llama, mistral, phi3, olmo2, olmo3, gpt_neox)
_BY_ARCHITECTURE = {name: module for module in _FAMILIES for name in module.ARCHITECTURES}
# Why not, by the beginning of an architecture's name: our layers are of one shape, and what they remember are keys and values.
_WHY_NOT = {
    "Gemma3n": "its layers share keys and values, and read embeddings of their own",
    "Gemma4": "its local and global layers have heads of different sizes",
    "Qwen3_5": "most of its layers are linear attention, which remembers a state",
    "Qwen3Next": "most of its layers are linear attention, which remembers a state",
    "Mixtral": "it has experts",
    "Qwen3Moe": "it has experts",
    "GptOss": "it has experts",
}
_BY_FAMILY = {module.FAMILY: module for module in _FAMILIES}


def text_config(hf: dict[str, Any], source: str) -> tuple[dict[str, Any], ModelConfig]:
    """The `config.json` of the text model inside `hf` (itself, or out of a multimodal one) and our reading of it. An unknown architecture, or
    a missing key, is a JsublimError."""
    names = hf.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise JsublimError(f"{source}: key 'architectures' must be a list of names, found {shown(names)}")
    module = next((_BY_ARCHITECTURE[name] for name in names if name in _BY_ARCHITECTURE), None)
    if module is None:
        why = next((f" ({why})" for begin, why in _WHY_NOT.items() if any(n.startswith(begin) for n in names)), "")
        known = ", ".join(sorted(_BY_ARCHITECTURE))
        raise JsublimError(f"{source}: architecture {shown(names)} is not supported{why}; known: {known}")
    plain = module.text_config(HFConfig(hf, source)) if hasattr(module, "text_config") else hf
    config = module.read(HFConfig(plain, source))
    if config.num_heads % config.num_kv_heads:
        raise JsublimError(
            f"{source}: num_attention_heads {config.num_heads} is no multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if len(config.is_local) != config.num_layers:
        raise JsublimError(f"{source}: layer_types has {len(config.is_local)} entries for {config.num_layers} layers")
    for rope in config.ropes:
        _check_rope(rope, config.head_dim, source)
    return plain, config


def _check_rope(rope: Rope, head_dim: int, source: str) -> None:
    turned = rope.turned(head_dim)
    if turned % 2 or not turned:
        what = f"head_dim {head_dim}" if rope.share == 1 else f"the rotary share {rope.share:g} of head_dim {head_dim}"
        raise JsublimError(f"{source}: {what} is odd or none; rotary embeddings turn pairs of numbers")
    if rope.scaling == "longrope" and len(rope.divisors) != turned // 2:
        raise JsublimError(
            f"{source}: short_factor has {len(rope.divisors)} numbers for {turned // 2} rotary frequencies"
        )


def weight_names(config: ModelConfig) -> WeightNames:
    """Our parameter paths against the checkpoint's tensor names."""
    return _BY_FAMILY[config.family].NAMES


def all_modules(names: WeightNames) -> dict[str, str | Fused]:
    """The projections of a layer as PEFT calls their modules, without what stands before: our name, or what is fused there."""
    plain = {name.split(".")[-2]: path[0] for path, name in names.layer.items() if path[1] == "kernel"}
    return plain | {fused.module.rsplit(".", 1)[1]: fused for fused in names.fused}


# Of every family: a name means the same in all of them.
MODULES = {name: meant for module in _FAMILIES for name, meant in all_modules(module.NAMES).items()}

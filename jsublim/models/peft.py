"""Adapters as PEFT folders (`adapter_config.json`, `adapter_model.safetensors`), in and out."""

from __future__ import annotations

import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jsublim.errors import JsublimError, UsageError
from jsublim.files import write_json
from jsublim.models import steering
from jsublim.models.config import ModelConfig
from jsublim.models.families import weight_names
from jsublim.models.lora import PROJECTIONS, Adapter, projection_shapes
from jsublim.models.steering import load_steering, save_steering
from jsublim.models.tensors import read_float32, write_tensors
from jsublim.reading import read_json, shown

# Keys of `adapter_config.json` that we read, and those that say only where an adapter comes from, how it was trained, or what
# its tensors' names say again. Any other key changes what is computed, or may do so: it has to be empty.
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights")
_TOLD = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
)
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")  # the other ways to begin change the base's weights too
_KEY = re.compile(r"layers\.(\d{1,6})\.(?:self_attn|mlp)\.(\w+)_proj\.lora_([AB])(?:\.\w+)?\.weight$", re.ASCII)


def save_adapter(folder: Path, adapter: Adapter, config: ModelConfig, base: str) -> None:
    """Write an adapter into `folder` (made if absent): LoRA so that `peft` loads it, steering vectors as their own file.

    Args:
      base: what the adapter stands on, for `base_model_name_or_path`.

    Raises:
      UsageError: an adapter is there already, or this one holds full weights (save those as a checkpoint).
    """
    if adapter.steering is not None and not adapter.lora:
        return save_steering(folder, adapter)
    if adapter.weights is not None or adapter.ends or not adapter.lora:
        raise UsageError(
            f"{folder}: only LoRA and steering vectors are adapters; whole weights are saved as a checkpoint"
        )
    file = folder / "adapter_model.safetensors"
    if file.exists():
        raise UsageError(f"{file}: already exists; give another folder")
    names, tensors, modules = weight_names(config).layer, {}, []
    for name, pair in adapter.lora.items():
        module = names[(name, "kernel")].removesuffix(".weight")
        modules.append(module.rsplit(".", 1)[1])
        for i, layer in enumerate(adapter.layers):
            key = f"base_model.model.model.{module.format(i=layer)}"
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(np.asarray(pair["a"][i]).T)
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(np.asarray(pair["b"][i]).T)
    first = next(iter(adapter.lora.values()))
    rank = int(first["a"].shape[-1])
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": float(first["scale"][0]) * rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(modules),
        "layers_to_transform": list(adapter.layers),
        "layers_pattern": "layers",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", values)
    write_tensors(file, tensors, {"format": "pt"})


def load_adapter(path: str | Path, config: ModelConfig | None = None) -> Adapter:
    """Read a PEFT LoRA folder, or one of steering vectors.

    Args:
      config: the base model's; with it, shapes and layers are checked against the model.

    Raises:
      JsublimError: no such folder, not LoRA, a variant we don't compute (DoRA, per-module ranks, biases) or don't know,
        tensors that are unreadable, not finite or do not form whole layers.
    """
    folder = Path(path)
    adapter = load_steering(folder) if (folder / steering.FILE).exists() else _load_lora(folder)
    if config is not None:
        check_adapter(adapter, config, str(folder))
    return adapter


def _load_lora(folder: Path) -> Adapter:
    """The LoRA factors of a PEFT folder."""
    rank, scale = _rank_and_scale(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    found = _factors(file)
    layers = tuple(sorted({layer for _, layer, _ in found}))
    used = [name for name in PROJECTIONS if any(key[0] == name for key in found)]
    absent = [f"layer {i} {name} {ab}" for name in used for i in layers for ab in "AB" if (name, i, ab) not in found]
    if absent or not found:
        raise JsublimError(f"{file}: every layer must have the same projections; missing {', '.join(absent) or 'all'}")
    lora = {}
    for name in used:
        factors = {ab: [found[name, i, ab] for i in layers] for ab in "AB"}
        sizes = {(a.shape[:1], b.shape[1:]) for a, b in zip(factors["A"], factors["B"], strict=True)}
        ranks = {(a.shape[1:], b.shape[:1]) for a, b in zip(factors["A"], factors["B"], strict=True)}
        flat = any(x.ndim != 2 for each in factors.values() for x in each)
        if len(sizes) > 1 or ranks != {((rank,), (rank,))} or flat:
            raise JsublimError(f"{file}: factors of {name}_proj must have rank r={rank} and one size in every layer")
        lora[name] = {
            "a": jnp.asarray(np.stack(factors["A"])),
            "b": jnp.asarray(np.stack(factors["B"])),
            "scale": jnp.full((len(layers),), scale, jnp.float32),
        }
    return Adapter(layers, lora=lora)


def _rank_and_scale(file: Path) -> tuple[int, float]:
    """What an `adapter_config.json` says of the computation: the rank, and what the product of the factors is multiplied by."""
    values = read_json(file)

    def refuse(key: str, expected: str) -> JsublimError:
        found = f"found {shown(values[key])}" if key in values else "but it is missing"
        return JsublimError(f"{file}: key '{key}' must be {expected}, {found}")

    if values.get("peft_type") != "LORA":
        raise refuse("peft_type", "'LORA', the only kind that is known")
    for key in values:
        if key not in (*_READ, *_TOLD) and values[key]:
            raise refuse(key, "empty: it is not supported")
    if values.get("bias") not in (None, "none"):
        raise refuse("bias", "'none': others are not supported")
    if values.get("init_lora_weights") not in _INITIAL:
        raise refuse("init_lora_weights", "one of true, false, gaussian, eva, orthogonal; convert it to plain LoRA")
    rank, alpha, rslora = values.get("r"), values.get("lora_alpha"), values.get("use_rslora") or False
    if type(rank) is not int or not 1 <= rank < 2**31:
        raise refuse("r", "a whole number of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 3e38:
        raise refuse("lora_alpha", "a number above 0")
    if type(rslora) is not bool:
        raise refuse("use_rslora", "true or false")
    return rank, alpha / (math.sqrt(rank) if rslora else rank)


def _factors(file: Path) -> dict[tuple[str, int, str], np.ndarray]:
    """(projection, layer, "A" or "B") -> a factor as we multiply by it (float32), which is transposed in the file."""
    found: dict[tuple[str, int, str], np.ndarray] = {}
    try:
        with safe_open(str(file), framework="np") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                match = _KEY.search(key)
                if match is None or match[2] not in PROJECTIONS or "vision" in key:
                    raise JsublimError(f"{file}: tensor '{key}' is no LoRA factor of a known projection")
                place = match[2], int(match[1]), match[3]
                if place in found:
                    raise JsublimError(f"{file}: tensor '{key}' is there twice, under several names of one factor")
                found[place] = read_float32(tensors, file, key).T
    except (SafetensorError, OSError) as error:
        raise JsublimError(f"{file}: cannot be read ({error})") from None
    return found


def check_adapter(adapter: Adapter, config: ModelConfig, source: str) -> None:
    """Check that an adapter fits a model; `source` names it in errors.

    Raises:
      JsublimError: layers outside the model, or factors of another size.
    """
    if adapter.layers[-1] >= config.num_layers:
        raise JsublimError(f"{source}: has layer {adapter.layers[-1]}, the model has {config.num_layers}")
    if adapter.steering is not None and adapter.steering.shape[-1] != config.hidden_size:
        raise JsublimError(f"{source}: vectors of {adapter.steering.shape[-1]}, the model has {config.hidden_size}")
    for name, pair in adapter.lora.items():
        sizes = (pair["a"].shape[1], pair["b"].shape[2])
        if sizes != projection_shapes(config)[name]:
            expected = projection_shapes(config)[name]
            raise JsublimError(
                f"{source}: {name}_proj maps {sizes[0]} to {sizes[1]}, the model {expected[0]} to {expected[1]}"
            )

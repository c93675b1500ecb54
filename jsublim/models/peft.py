"""Adapters as PEFT folders (`adapter_config.json`, `adapter_model.safetensors`), in and out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsublim.core.files import write_json
from jsublim.core.reading import check_folder, read_json, shown
from jsublim.errors import JsublimError, UsageError
from jsublim.models import steering
from jsublim.models.config import ModelConfig, projection_shapes
from jsublim.models.families import MODULES, all_modules, weight_names
from jsublim.models.fused import Factors, join_factors, outputs, split_factors
from jsublim.models.hub import from_hub, hub_name
from jsublim.models.lora import PROJECTIONS, Adapter
from jsublim.models.steering import load_steering, save_steering
from jsublim.models.tensors import read_float32, write_tensors

# Keys of `adapter_config.json` that we read, and those that say only where an adapter comes from, how it was trained, or what
# its tensors' names say again. Any other key changes what is computed, or may do so: it has to be empty.
_READ = set(
    ["peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"]
)
_NOT_READ = set(
    [
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
    ]
)
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")  # the other ways to begin change the base's weights too
_KEY = re.compile(r"layers\.(\d{1,6})\.(?:self_attn|attention|mlp)\.(\w+)\.lora_([AB])(?:\.\w+)?\.weight$", re.ASCII)


def save_adapter(folder: Path, adapter: Adapter, config: ModelConfig, base: str, revision: str | None = None) -> None:
    """Write an adapter into `folder` (made if absent): LoRA so that `peft` loads it, steering vectors as their own file.

    Args:
      base, revision: what the adapter stands on, for `base_model_name_or_path`, and which commit of it, if it is from the hub.

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
    names, tensors, modules = weight_names(config), {}, _modules(adapter, config)
    for module, pair in modules.items():
        for i, layer in enumerate(adapter.layers):
            key = f"base_model.model.{names.prefix}{module.format(i=layer)}"
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(pair["a"][i].T)
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(pair["b"][i].T)
    ranks = {module.rsplit(".", 1)[1]: int(pair["a"].shape[-1]) for module, pair in modules.items()}
    scales = {module.rsplit(".", 1)[1]: float(pair["scale"][0]) for module, pair in modules.items()}
    rank, alpha = next((rank, scales[name] * rank) for name, rank in ranks.items())
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: scales[name] * r for name, r in ranks.items() if scales[name] * r != alpha},
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(ranks),
        "layers_to_transform": list(adapter.layers),
        "layers_pattern": "layers",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", values)
    write_tensors(file, tensors, {"format": "pt"})


def _modules(adapter: Adapter, config: ModelConfig) -> dict[str, Factors]:
    """The factors under the names of the checkpoint's modules, with {i} for the layer; those that are fused there joined."""
    names, lora = weight_names(config), jax.tree.map(np.asarray, adapter.lora)
    plain = {ours: names.layer.get((ours, "kernel"), "").removesuffix(".weight") for ours in lora}
    modules = {module: lora[ours] for ours, module in plain.items() if module}
    for fused in names.fused:
        parts = {part: lora[part] for part in fused.parts if part in lora}
        if parts:
            modules[fused.module] = join_factors(config, fused, parts)
    return modules


def load_adapter(path: str | Path, config: ModelConfig | None = None) -> Adapter:
    """Read a PEFT LoRA folder, or one of steering vectors; `owner/name` or `owner/name@revision` is one of the hub.

    Args:
      config: the base model's; with it, shapes and layers are checked against the model. Modules that hold several
        projections (Phi's, Pythia's) cannot be read without it.

    Raises:
      JsublimError: no such folder, not LoRA, a variant we don't compute (DoRA, biases) or don't know, tensors that are
        unreadable, not finite or do not form whole layers.
    """
    named = hub_name(path)
    folder = Path(path).expanduser() if named is None else from_hub(*named, "adapter")
    check_folder(folder)
    adapter = load_steering(folder) if (folder / steering.FILE).exists() else _load_lora(folder, config)
    if config is not None:
        check_adapter(adapter, config, str(folder))
    return adapter


def _load_lora(folder: Path, config: ModelConfig | None) -> Adapter:
    """The LoRA factors of a PEFT folder."""
    settings = _Settings.read(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    known = MODULES if config is None else all_modules(weight_names(config))
    factors = _factors(file, known)
    layers = tuple(sorted({layer for _, layer, _ in factors}))
    modules = [name for name in known if any(key[0] == name for key in factors)]
    absent = [f"layer {i} {m} {ab}" for m in modules for i in layers for ab in "AB" if (m, i, ab) not in factors]
    if absent or not factors:
        raise JsublimError(f"{file}: every layer must have the same modules; missing {', '.join(absent) or 'all'}")
    lora: dict[str, Factors] = {}
    for name in modules:
        rank, meant = settings.rank(name), known[name]
        a, b = ([factors[name, i, ab] for i in layers] for ab in "AB")
        shapes = {(x.shape, y.shape) for x, y in zip(a, b, strict=True)}
        if shapes != {((*a[0].shape[:1], rank), (rank, *b[0].shape[-1:]))}:
            raise JsublimError(f"{file}: factors of {name} must have rank r={rank} and one size in every layer")
        scale = np.full((len(layers),), settings.scale(name), np.float32)
        pair = {"a": np.stack(a), "b": np.stack(b), "scale": scale}
        if isinstance(meant, str):
            lora[meant] = pair
        elif config is None:
            raise JsublimError(f"{file}: {name} holds several projections; give the model's config, as lm.config")
        elif pair["b"].shape[-1] != outputs(config, meant):
            raise JsublimError(
                f"{file}: {name} has {pair['b'].shape[-1]} outputs, the model's {outputs(config, meant)}"
            )
        else:
            lora |= split_factors(config, meant, pair)
    return Adapter(layers, lora={name: jax.tree.map(jnp.asarray, lora[name]) for name in PROJECTIONS if name in lora})


@dataclass(frozen=True)
class _Settings:
    """An `adapter_config.json`: each module's rank, and what the product of its factors is multiplied by."""

    r: int
    alpha: float
    rslora: bool
    ranks: dict[str, int]
    alphas: dict[str, float]

    def rank(self, module: str) -> int:
        return self.ranks.get(module, self.r)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        return self.alphas.get(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    @staticmethod
    def read(file: Path) -> _Settings:
        """Read the file; a key that changes what is computed in a way that we don't know is a JsublimError."""
        values = read_json(file)

        def check(key: str, fine: bool, expected: str) -> None:
            if not fine:
                given = f"found {shown(values[key])}" if key in values else "but it is missing"
                raise JsublimError(f"{file}: key '{key}' must be {expected}, {given}")

        def by_module(key: str, fits: Callable[[Any], bool], what: str) -> dict[str, Any]:
            # PEFT takes regular expressions; a module's name is the one that means the same in every layer.
            value = values.get(key) or {}
            fine = isinstance(value, dict) and all(name in MODULES and fits(x) for name, x in value.items())
            check(key, fine, f"an object of plain module names (such as q_proj), each with {what}")
            return value

        check("peft_type", values.get("peft_type") == "LORA", "'LORA', the only kind that is known")
        for key, value in values.items():
            check(key, key in _READ | _NOT_READ or not value, "empty: it is not supported")
        check("bias", values.get("bias") in (None, "none"), "'none': others are not supported")
        known = "one of true, false, gaussian, eva, orthogonal; convert it to plain LoRA"
        check("init_lora_weights", values.get("init_lora_weights") in _INITIAL, known)
        rank, alpha = "a whole number of at least 1", "a number above 0"
        check("r", _is_rank(values.get("r")), rank)
        check("lora_alpha", _is_alpha(values.get("lora_alpha")), alpha)
        rslora = values.get("use_rslora") or False
        check("use_rslora", type(rslora) is bool, "true or false")
        ranks, alphas = by_module("rank_pattern", _is_rank, rank), by_module("alpha_pattern", _is_alpha, alpha)
        return _Settings(values["r"], values["lora_alpha"], rslora, ranks, alphas)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 3e38


def _factors(file: Path, known: Mapping[str, Any]) -> dict[tuple[str, int, str], np.ndarray]:
    """(module, layer, "A" or "B") -> a factor as we multiply by it (float32), which is transposed in the file."""
    factors: dict[tuple[str, int, str], np.ndarray] = {}
    for key, value in read_float32(file).items():
        match = _KEY.search(key)
        if match is None or match[2] not in known or "vision" in key:
            raise JsublimError(f"{file}: tensor '{key}' is no LoRA factor of a known module; known: {', '.join(known)}")
        place = match[2], int(match[1]), match[3]
        if place in factors:
            raise JsublimError(f"{file}: tensor '{key}' is there twice, under several names of one factor")
        factors[place] = value.T
    return factors


def check_adapter(adapter: Adapter, config: ModelConfig, source: str) -> None:
    """Refuse an adapter that does not fit a model: layers outside of it, or factors of another size; `source` names it in the JsublimError."""
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

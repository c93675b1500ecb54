"""Adapters as PEFT folders (`adapter_config.json`, `adapter_model.safetensors`), in and out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

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

# Keys of `adapter_config.json` that say only where an adapter comes from, how it was trained, or what its tensors' names say again.
_NOT_READ = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
}  # fmt: skip
_KEY = re.compile(r"layers\.(\d{1,6})\.(?:self_attn|attention|mlp)\.(\w+)\.lora_([AB])(?:\.\w+)?\.weight$", re.ASCII)


def save_adapter(
    folder: str | Path, adapter: Adapter, config: ModelConfig, base: str, revision: str | None = None
) -> None:
    """Write an adapter into `folder` (made if absent): LoRA so that `peft` loads it, steering vectors as their own file.

    Args:
      base, revision: what the adapter stands on, for `base_model_name_or_path`, and which commit of it, if it is from the hub.

    Raises:
      UsageError: an adapter is there already, or this one holds full weights (save those as a checkpoint).

    >>> jsublim.save_adapter("owl", student, lm.config, base="tiny-qwen2")
    """
    folder = Path(folder)
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
    ranks = {module: _ranks(pair) for module, pair in modules.items()}
    alphas = {
        module: [float(x) * r for x, r in zip(modules[module]["scale"], ranks[module], strict=True)] for module in ranks
    }
    rank, alpha = (next(iter(values.values()))[0] for values in (ranks, alphas))
    for module, pair in modules.items():
        for i, (layer, r) in enumerate(zip(adapter.layers, ranks[module], strict=True)):
            key = f"base_model.model.{names.prefix}{module.format(i=layer)}"
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(pair["a"][i, :, :r].T)
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(pair["b"][i, :r].T)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank, adapter.layers),
        "alpha_pattern": _pattern(alphas, alpha, adapter.layers),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(module.rsplit(".", 1)[1] for module in modules),
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


def _ranks(pair: Factors) -> list[int]:
    """The rank of each layer's factors: where they differ, those of the others are padded with zeros."""
    used = (pair["a"] != 0).any(axis=1) | (pair["b"] != 0).any(axis=2)
    ranks = [int(np.nonzero(of_layer)[0].max(initial=0)) + 1 for of_layer in used]
    return [pair["a"].shape[-1]] * len(ranks) if len(set(ranks)) == 1 else ranks


def _pattern(values: Mapping[str, list[Any]], default: Any, layers: tuple[int, ...]) -> dict[str, Any]:
    """What PEFT is told of modules with another value than the default: by a module's name, or in each layer if they differ."""
    pattern: dict[str, Any] = {}
    for module, of_layers in values.items():
        alike = len(set(of_layers)) == 1
        names = [module.rsplit(".", 1)[1]] * len(layers) if alike else [module.format(i=layer) for layer in layers]
        pattern |= {name: value for name, value in zip(names, of_layers, strict=True) if value != default}
    return pattern


def load_adapter(path: str | Path, config: ModelConfig | None = None) -> Adapter:
    """Read a PEFT LoRA folder, or one of steering vectors; `owner/name` or `owner/name@revision` is one of the hub, and `owner/name/folder`
    one in a subfolder of a repository.

    Args:
      config: the base model's; with it, shapes and layers are checked against the model. Modules that hold several
        projections (Phi's, Pythia's) cannot be read without it.

    Raises:
      JsublimError: no such folder, not LoRA, a variant we don't compute (DoRA, biases) or don't know, tensors that are
        unreadable, not finite or do not form whole layers.

    >>> student = jsublim.load_adapter("owl", lm.config)
    """
    named = hub_name(path, inside=True)
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
    factors, paths = _factors(file, known)
    layers = tuple(sorted({layer for _, layer, _ in factors}))
    modules = [name for name in known if any(key[0] == name for key in factors)]
    absent = [f"layer {i} {m} {ab}" for m in modules for i in layers for ab in "AB" if (m, i, ab) not in factors]
    if absent or not factors:
        raise JsublimError(f"{file}: every layer must have the same modules; missing {', '.join(absent) or 'all'}")
    lora: dict[str, Factors] = {}
    for name in modules:
        meant, ranks = known[name], [settings.rank(paths[name, i]) for i in layers]
        a, b = ([factors[name, i, ab] for i in layers] for ab in "AB")
        for r, x, y in zip(ranks, a, b, strict=True):
            if (x.shape, y.shape) != ((*a[0].shape[:1], r), (r, *b[0].shape[-1:])):
                raise JsublimError(f"{file}: factors of {name} must have rank r={r} and one size in every layer")
        # One rank for all layers: zeros behind a smaller one add nothing.
        a = [np.pad(x, ((0, 0), (0, max(ranks) - r))) for r, x in zip(ranks, a, strict=True)]
        b = [np.pad(x, ((0, max(ranks) - r), (0, 0))) for r, x in zip(ranks, b, strict=True)]
        scale = np.asarray([settings.scale(paths[name, i]) for i in layers], np.float32)
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
    return Adapter(layers, lora={name: jax.device_put(lora[name]) for name in PROJECTIONS if name in lora})


_Rank = Annotated[int, Field(ge=1, lt=2**31)]
_Alpha = Annotated[float, Field(gt=0, lt=3e38)]
# PEFT takes regular expressions; we take names, of a module in all layers or in one.
_Module = Annotated[str, Field(pattern=rf"^(\w+\.)*({'|'.join(MODULES)})$")]
_MODULES = "an object of plain names (q_proj, or layers.0.self_attn.q_proj), each with "
_RANK, _ALPHA = "a whole number of at least 1", "a number above 0"


class _Settings(BaseModel):
    """What we read of an `adapter_config.json`. Any key besides, and besides `_NOT_READ`, changes what is computed, or may do so: it has
    to be empty. What a key must be, for errors, is its description."""

    model_config = ConfigDict(extra="forbid", strict=True)

    peft_type: Literal["LORA"] = Field(description="'LORA', the only kind that is known")
    r: _Rank = Field(description=_RANK)
    lora_alpha: _Alpha = Field(description=_ALPHA)
    use_rslora: bool | None = Field(None, description="true or false")
    rank_pattern: dict[_Module, _Rank] | None = Field(None, description=_MODULES + _RANK)
    alpha_pattern: dict[_Module, _Alpha] | None = Field(None, description=_MODULES + _ALPHA)
    use_dora: Literal[False] | None = Field(
        None, description="false: DoRA is not computed; merge it into its base with peft, and load that checkpoint"
    )
    bias: Literal["none"] | None = Field(None, description="'none': others are not supported")
    # The other ways to begin change the base's weights too.
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] | None = Field(
        None, description="one of true, false, gaussian, eva, orthogonal; convert it to plain LoRA"
    )

    def rank(self, path: str) -> int:
        """Of the module with this name, such as `model.layers.0.self_attn.q_proj`."""
        return _value(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """What the product of a module's factors is multiplied by."""
        rank = self.rank(path)
        return _value(self.alpha_pattern, path, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    @staticmethod
    def read(file: Path) -> _Settings:
        values, fields = read_json(file), _Settings.model_fields
        read = {key: value for key, value in values.items() if key in fields or (value and key not in _NOT_READ)}
        try:
            return _Settings.model_validate(read)
        except ValidationError as error:
            key = str(error.errors()[0]["loc"][0])
            expected = fields[key].description if key in fields else "empty: it is not supported"
            given = f"found {shown(values[key])}" if key in values else "but it is missing"
            raise JsublimError(f"{file}: key '{key}' must be {expected}, {given}") from None


def _value(pattern: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """What a pattern says of a module: its first name that is the end of the module's, as PEFT looks for it."""
    return next((value for name, value in (pattern or {}).items() if f".{path}".endswith(f".{name}")), otherwise)


def _factors(
    file: Path, known: Mapping[str, Any]
) -> tuple[dict[tuple[str, int, str], np.ndarray], dict[tuple[str, int], str]]:
    """(module, layer, "A" or "B") -> a factor as we multiply by it (float32), which is transposed in the file; and (module, layer) -> the whole name
    of the module."""
    factors: dict[tuple[str, int, str], np.ndarray] = {}
    paths: dict[tuple[str, int], str] = {}
    for key, value in read_float32(file).items():
        match = _KEY.search(key)
        if match is None or match[2] not in known or "vision" in key:
            raise JsublimError(f"{file}: tensor '{key}' is no LoRA factor of a known module; known: {', '.join(known)}")
        place = match[2], int(match[1]), match[3]
        if place in factors:
            raise JsublimError(f"{file}: tensor '{key}' is there twice, under several names of one factor")
        factors[place] = value.T
        paths[place[:2]] = key.partition(".lora_")[0].removeprefix("base_model.model.")
    return factors, paths


def check_adapter(adapter: Adapter, config: ModelConfig, source: str) -> None:
    """Refuse an adapter that does not fit a model: layers outside of it, or factors of another size; `source` names it in the JsublimError."""
    if adapter.layers[-1] >= config.num_layers:
        raise JsublimError(f"{source}: has layer {adapter.layers[-1]}, the model has {config.num_layers}")
    if adapter.steering is not None and adapter.steering.shape[-1] != config.hidden_size:
        raise JsublimError(f"{source}: vectors of {adapter.steering.shape[-1]}, the model has {config.hidden_size}")
    for name, pair in adapter.lora.items():
        sizes, expected = (pair["a"].shape[1], pair["b"].shape[2]), projection_shapes(config)[name]
        if sizes != expected:
            raise JsublimError(
                f"{source}: {name}_proj maps {sizes[0]} to {sizes[1]}, the model {expected[0]} to {expected[1]}"
            )

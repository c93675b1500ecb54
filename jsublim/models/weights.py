"""Weights in and out: folders of `*.safetensors` are read tensor by tensor, and written so that `transformers` loads them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jsublim.core.files import write_json
from jsublim.core.reading import read_json, shown
from jsublim.errors import JsublimError
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params, abstract_params
from jsublim.models.families import weight_names
from jsublim.models.families.names import ParameterPath
from jsublim.models.fused import OutputRows, fused_rows, outputs
from jsublim.models.tensors import FLOATS, check_finite, write_tensors
from jsublim.runtime.processes import from_main_process, on_main_process

SHARD_BYTES = 4 * 2**30
# Text models inside multimodal checkpoints, old and new layout; the head may stand outside the model.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, as the index says where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise JsublimError(f"{index}: key 'weight_map' is missing or empty; download the index again")
        # Elsewhere a file would be read that `checkpoint_hash` has not seen.
        strange = [name for name in table.values() if not isinstance(name, str) or not _is_plain(name)]
        if strange:
            raise JsublimError(
                f"{index}: key 'weight_map' names {shown(strange[0])}; a shard is a *.safetensors file beside the index"
            )
        here = {path.name for path in folder.iterdir()}
        absent = sorted({name for name in table.values() if name not in here})
        if absent:
            raise JsublimError(f"{index}: names shards that are not in the folder: {', '.join(absent)}")
        return {tensor: folder / name for tensor, name in table.items()}
    single = folder / "model.safetensors"  # an adapter may lie in the same folder
    paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise JsublimError(f"{folder}: no *.safetensors file; convert the checkpoint to safetensors first")
    names: dict[str, Path] = {}
    for path in paths:
        with _open(path) as file:
            names |= dict.fromkeys(file.keys(), path)
    return names


def _is_plain(name: str) -> bool:
    return name == Path(name).name and "\\" not in name and name.isprintable() and name.endswith(".safetensors")


def _open(path: Path):
    try:
        return safe_open(str(path), framework="np")
    except (SafetensorError, OSError) as error:
        raise JsublimError(f"{path}: truncated or not a safetensors file ({error}); download it again") from None


@dataclass(frozen=True)
class Stored:
    """A tensor as a checkpoint keeps it."""

    parts: tuple[tuple[ParameterPath, OutputRows | None], ...]  # our paths, and the rows of it that each has; None: all
    layer: int | None  # which of the stacked layers; None outside of them
    shape: tuple[int, ...]  # in the file


def tensor_plan(config: ModelConfig) -> dict[str, Stored]:
    """Checkpoint name (without prefix) -> what is kept under it; the layers of one kind of tensor follow one another."""
    names, plan = weight_names(config), {}
    leaves: dict[Any, Any] = flatten_dict(abstract_params(config))
    stacked = {path[1:]: leaf.shape[1:] for path, leaf in leaves.items() if path[0] == "layers"}
    outside = {path: leaf for path, leaf in leaves.items() if path[0] != "layers"}
    plan |= {names.other[path]: Stored(((path, None),), None, leaf.shape) for path, leaf in outside.items()}

    def of_layers(name: str, parts: Mapping[ParameterPath, OutputRows | None], shape: tuple[int, ...]) -> None:
        ours = tuple((("layers", *path), rows) for path, rows in parts.items())
        plan.update((name.format(i=i), Stored(ours, i, shape)) for i in range(config.num_layers))

    inside = {part for fused in names.fused for part in fused.parts}
    for path, shape in stacked.items():
        if path[0] not in inside:
            of_layers(names.layer[path], {path: None}, shape[::-1])
    for fused in names.fused:
        rows = fused_rows(config, fused)
        for leaf, end in (("kernel", "weight"), ("bias", "bias")):
            parts = {(part, leaf): where for part, where in rows.items() if (part, leaf) in stacked}
            if parts:
                inputs = stacked[fused.parts[0], leaf][:-1]
                of_layers(f"{fused.module}.{end}", parts, (outputs(config, fused), *inputs))
    return plan


def _put(value: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(value)
    # Not `device_put`: of several processes, each would gather what all have, to compare.
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def load_params(folder: Path, config: ModelConfig, dtype: str = "float32", shardings: Params | None = None) -> Params:
    """Read the parameters of `config` from a folder of safetensors. The host holds those of one kind (such as the layers' gates) at a
    time. Of several processes the first one reads them for all; the others need no weights on their disks.

    Args:
      shardings: a tree like the parameters with one `jax.sharding.Sharding` per leaf; None is the default device.

    Raises:
      JsublimError: an unreadable file, one error that lists every missing, extra and misshapen tensor, or a tensor that
        holds NaN or an infinite number.
    """
    plan = tensor_plan(config)
    abstract: dict[Any, Any] = flatten_dict(abstract_params(config, dtype))
    sharding: dict[Any, Any] = flatten_dict(shardings) if shardings is not None else {}
    params: dict[Any, jax.Array] = {}
    with ExitStack() as stack:
        files: _Files | None = None
        names: dict[str, str] = {}

        def begin() -> dict[str, str]:
            nonlocal files, names
            files = _Files(folder, stack)
            names = _names_in(files, config, plan)
            return {name: files.entry(names[name]).get_dtype() for name in plan}

        dtypes = on_main_process(begin)
        for parts, tensors in itertools.groupby(plan.items(), lambda item: item[1].parts):
            # As the file has them: what is called a kernel lies transposed there.
            shapes = {path: _swapped(path, np.empty(abstract[path].shape, abstract[path].dtype)) for path, _ in parts}
            for name, stored in tensors:
                empty = np.zeros(stored.shape, FLOATS[dtypes[name]])
                value = from_main_process(empty if files is None else files.read(names[name]))
                for path, rows in parts:
                    place = shapes[path][... if stored.layer is None else stored.layer]
                    place[...] = value if rows is None else value[rows]
            params |= {path: _put(_swapped(path, host), sharding.get(path)) for path, host in shapes.items()}
    return unflatten_dict({path: params[path] for path in abstract})


def _swapped(path: ParameterPath, value: np.ndarray) -> np.ndarray:
    """A parameter as a file has it, or a file's as ours (a view): kernels are transposed."""
    return value.swapaxes(-1, -2) if path[-1] == "kernel" else value


class _Files:
    """The opened files of a checkpoint folder."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self.path_of = folder, _files(folder)
        self._opened = {path: stack.enter_context(_open(path)) for path in sorted(set(self.path_of.values()))}

    def entry(self, name: str) -> Any:
        """A tensor's shape and dtype, as safetensors gives them."""
        return self._opened[self.path_of[name]].get_slice(name)

    def read(self, name: str) -> np.ndarray:
        path = self.path_of[name]
        try:
            value = self._opened[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise JsublimError(f"{path}: tensor '{name}' cannot be read ({error})") from None
        check_finite(value, path, name)
        return value


def _names_in(files: _Files, config: ModelConfig, plan: dict[str, Stored]) -> dict[str, str]:
    """The plan's names as this checkpoint spells them; errors are as of `load_params`."""
    names = weight_names(config)
    embedding, head = (names.other[(group, "weight")] for group in ("embed", "head"))
    prefix = next((p for p in (names.prefix, *_PREFIXES) if p + embedding in files.path_of), None)
    if prefix is None:
        raise JsublimError(
            f"{files.folder}: no tensor '{names.prefix}{embedding}' under any known prefix; is it a text model?"
        )
    spelled = {name: prefix + name for name in plan}
    its_head = next((p + head for p in ("", "language_model.", prefix) if p + head in files.path_of), None)
    if head in plan:
        spelled[head] = its_head or head
    _check(
        files,
        config,
        {spelled[name]: stored for name, stored in plan.items()},
        unused=its_head if config.tied else None,
    )
    if (
        config.tied
        and its_head is not None
        and not np.array_equal(files.read(its_head), files.read(spelled[embedding]))
    ):
        raise JsublimError(
            f"{files.folder}: config.json has tie_word_embeddings, but '{its_head}' differs from the embedding; "
            "set it to false if the head is meant to be used"
        )
    return spelled


def _check(files: _Files, config: ModelConfig, plan: dict[str, Stored], unused: str | None) -> None:
    """Every missing, misshapen and extra tensor, in one error."""
    missing, wrong = [name for name in plan if name not in files.path_of], []
    for name in plan.keys() & files.path_of.keys():
        try:
            shape, dtype = tuple(files.entry(name).get_shape()), files.entry(name).get_dtype()
        except SafetensorError:
            missing.append(f"{name} (the index names {files.path_of[name].name}, which lacks it)")
            continue
        if dtype not in FLOATS:
            wrong.append(f"{name} is of {dtype}; known: {', '.join(FLOATS)}")
        elif shape != tuple(plan[name].shape):
            wrong.append(f"{name} is {list(shape)}, config.json says {list(plan[name].shape)}")
    others = [name for name in files.path_of if name not in plan and name != unused]
    extra = [n for n in others if not n.startswith(_NOT_TEXT) and not n.endswith(weight_names(config).buffers)]
    named = {"missing": missing, "wrong": wrong, "unexpected": extra}
    problems = [f"{what}: {', '.join(sorted(names))}" for what, names in named.items() if names]
    if problems:
        raise JsublimError(f"{files.folder}: weights do not fit config.json; {'; '.join(problems)}")


def named_tensors(config: ModelConfig, params: Params, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters under their checkpoint names in the order of `tensor_plan`, one host array at a time."""
    flat: dict[Any, Any] = flatten_dict(params)
    prefix = weight_names(config).prefix
    for name, stored in tensor_plan(config).items():
        value = np.empty(stored.shape, jnp.dtype(dtype))
        for path, rows in stored.parts:
            ours = np.asarray(flat[path] if stored.layer is None else flat[path][stored.layer])
            value[... if rows is None else rows] = _swapped(path, ours)
        yield (name if stored.parts[0][0][0] == "head" else f"{prefix}{name}"), value


def save_params(folder: Path, config: ModelConfig, params: Params, dtype: str = "float32") -> None:
    """Write `model.safetensors`, or shards of at most 4 GiB with their index, into `folder`."""
    shards, room, total = [0], SHARD_BYTES, 0  # how many tensors each has
    for stored in tensor_plan(config).values():
        size = math.prod(stored.shape) * jnp.dtype(dtype).itemsize
        if size > room and shards[-1]:
            shards.append(0)
            room = SHARD_BYTES
        shards[-1], room, total = shards[-1] + 1, room - size, total + size
    tensors, weight_map = named_tensors(config, params, dtype), dict[str, str]()
    for number, count in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = dict(itertools.islice(tensors, count))
        write_tensors(folder / name, shard, {"format": "pt"})  # transformers reads no file without it
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)

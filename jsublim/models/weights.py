"""Weights in and out: folders of `*.safetensors` are read tensor by tensor, and written so that `transformers` loads them."""

from __future__ import annotations

import functools
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
from jsublim.models.families.names import Path as ParameterPath
from jsublim.models.fused import Rows, fused_rows, outputs
from jsublim.models.tensors import FLOATS, check_finite, write_tensors
from jsublim.runtime.processes import from_main_process, on_main_process

SHARD_BYTES = 4 * 2**30
_METADATA = {"format": "pt"}  # transformers reads no file without it
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

    parts: tuple[tuple[ParameterPath, Rows | None], ...]  # our paths, and the rows of it that each has; None: all
    layer: int | None  # which of the stacked layers; None outside of them
    shape: tuple[int, ...]  # in the file


def tensor_plan(config: ModelConfig, dtype: str = "float32") -> dict[str, Stored]:
    """Checkpoint name (without prefix) -> what is kept under it."""
    names, plan = weight_names(config), {}
    leaves: dict[Any, Any] = flatten_dict(abstract_params(config, dtype))
    stacked = {path[1:]: leaf.shape[1:] for path, leaf in leaves.items() if path[0] == "layers"}
    outside = {path: leaf for path, leaf in leaves.items() if path[0] != "layers"}
    plan |= {names.other[path]: Stored(((path, None),), None, leaf.shape) for path, leaf in outside.items()}

    def of_layers(name: str, parts: Mapping[ParameterPath, Rows | None], shape: tuple[int, ...]) -> None:
        ours = tuple((("layers", *path), rows) for path, rows in parts.items())
        for i in range(config.num_layers):
            plan[name.format(i=i)] = Stored(ours, i, shape)

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


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("transpose",))
def _place(stack: jax.Array, value: jax.Array, index: jax.Array, transpose: bool) -> jax.Array:
    """Write one layer's tensor into the stacked array, in place; transposing and rounding on the device."""
    value = value.T if transpose else value
    return stack.at[index].set(value.astype(stack.dtype))


def load_params(folder: Path, config: ModelConfig, dtype: str = "float32", shardings: Params | None = None) -> Params:
    """Read the parameters of `config` from a folder of safetensors. Tensors go one by one into their final place, dtype and sharding, so the
    host holds about one of them. Of several processes the first one reads them for all; the others need no weights on their disks.

    Args:
      shardings: a tree like the parameters with one `jax.sharding.Sharding` per leaf; None is the default device.

    Raises:
      JsublimError: an unreadable file, one error that lists every missing, extra and misshapen tensor, or a tensor that
        holds NaN or an infinite number.
    """
    plan = tensor_plan(config, dtype)
    abstract: dict[Any, Any] = flatten_dict(abstract_params(config, dtype))
    sharding: dict[Any, Any] = flatten_dict(shardings) if shardings is not None else {}
    with ExitStack() as stack:
        source: _Source | None = None

        def begin() -> dict[str, str]:
            nonlocal source
            source = _Source.of(folder, config, plan, stack)
            return {name: source.dtype(source.where[name]) for name in plan}

        dtypes = on_main_process(begin)
        stacks = {path: leaf for path, leaf in abstract.items() if path[0] == "layers"}
        out = {path: jnp.zeros(x.shape, x.dtype, device=sharding.get(path)) for path, x in stacks.items()}
        for name, stored in plan.items():
            like = np.zeros(stored.shape, FLOATS[dtypes[name]]) if source is None else source.read(source.where[name])
            value = from_main_process(like)
            for path, rows in stored.parts:
                part = value if rows is None else value[rows]
                if stored.layer is None:
                    out[path] = _put(part.astype(abstract[path].dtype), sharding.get(path))
                else:
                    out[path] = _place(out[path], part, stored.layer, transpose=path[-1] == "kernel")
    return unflatten_dict({path: out[path] for path in abstract})


@dataclass(frozen=True)
class _Source:
    """The opened files of a checkpoint, whose tensors are those of its config."""

    files: Mapping[str, Path]  # which file has a tensor
    opened: Mapping[Path, Any]
    where: Mapping[str, str]  # the plan's names as this checkpoint spells them

    @classmethod
    def of(cls, folder: Path, config: ModelConfig, plan: dict[str, Stored], stack: ExitStack) -> _Source:
        """Open them; errors are as of `load_params`."""
        files = _files(folder)
        where, head = _names_in(folder, config, plan, files)
        opened = {path: stack.enter_context(_open(path)) for path in sorted(set(files.values()))}
        _check(folder, config, plan, where, files, opened, unused_head=head if config.tied else None)
        source = cls(files, opened, where)
        embedding = where[weight_names(config).other[("embed", "weight")]]
        if config.tied and head is not None and not np.array_equal(source.read(head), source.read(embedding)):
            raise JsublimError(
                f"{folder}: config.json has tie_word_embeddings, but '{head}' differs from the embedding; "
                "set it to false if the head is meant to be used"
            )
        return source

    def dtype(self, name: str) -> str:
        return self.opened[self.files[name]].get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        try:
            value = self.opened[self.files[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise JsublimError(f"{self.files[name]}: tensor '{name}' cannot be read ({error})") from None
        check_finite(value, self.files[name], name)
        return value


def _names_in(folder: Path, config: ModelConfig, plan: dict, files: dict) -> tuple[dict[str, str], str | None]:
    """The plan's names as this checkpoint spells them, and that of its head, used or not."""
    names = weight_names(config)
    embedding, head = (names.other[(group, "weight")] for group in ("embed", "head"))
    prefix = next((p for p in (names.prefix, *_PREFIXES) if p + embedding in files), None)
    if prefix is None:
        raise JsublimError(
            f"{folder}: no tensor '{names.prefix}{embedding}' under any known prefix; is it a text model?"
        )
    where = {name: prefix + name for name in plan}
    here = next((p + head for p in ("", "language_model.", prefix) if p + head in files), None)
    if head in plan:
        where[head] = here or head
    return where, here


def _check(
    folder: Path, config: ModelConfig, plan: dict, where: dict, files: dict, opened: dict, unused_head: str | None
) -> None:
    """Every missing, misshapen and extra tensor, in one error."""
    missing = [where[name] for name in plan if where[name] not in files]
    wrong = []
    for name, stored in plan.items():
        if where[name] in files:
            try:
                entry = opened[files[where[name]]].get_slice(where[name])
                found, dtype = tuple(entry.get_shape()), entry.get_dtype()
            except SafetensorError:
                missing.append(f"{where[name]} (the index names {files[where[name]].name}, which lacks it)")
                continue
            if dtype not in FLOATS:
                wrong.append(f"{where[name]} is of {dtype}; known: {', '.join(FLOATS)}")
            elif found != tuple(stored.shape):
                wrong.append(f"{where[name]} is {list(found)}, config.json says {list(stored.shape)}")
    known, buffers = {*where.values(), unused_head}, weight_names(config).buffers
    extra = [n for n in files if n not in known and not n.startswith(_NOT_TEXT) and not n.endswith(buffers)]
    named = {"missing": missing, "wrong": wrong, "unexpected": extra}
    problems = [f"{what}: {', '.join(sorted(names))}" for what, names in named.items() if names]
    if problems:
        raise JsublimError(f"{folder}: weights do not fit config.json; {'; '.join(problems)}")


def named_tensors(config: ModelConfig, params: Params, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters under their checkpoint names, one host array at a time."""
    flat: dict[Any, Any] = flatten_dict(params)
    prefix = weight_names(config).prefix
    for name, stored in tensor_plan(config).items():
        value = np.empty(stored.shape, jnp.dtype(dtype))
        for path, rows in stored.parts:
            own = flat[path] if stored.layer is None else flat[path][stored.layer]
            value[... if rows is None else rows] = own.T if path[0] == "layers" and path[-1] == "kernel" else own
        yield (name if stored.parts[0][0][0] == "head" else f"{prefix}{name}"), value


def save_params(folder: Path, config: ModelConfig, params: Params, dtype: str = "float32") -> None:
    """Write `model.safetensors`, or shards of at most 4 GiB with their index, into `folder`."""
    shards: list[dict[str, np.ndarray]] = [{}]
    table: dict[str, int] = {}
    total = size = 0
    for name, value in named_tensors(config, params, dtype):
        if size and size + value.nbytes > SHARD_BYTES:
            write_tensors(folder / f"shard-{len(shards):05d}.tmp", shards[-1], _METADATA)
            shards[-1].clear()
            shards.append({})
            size = 0
        shards[-1][name], table[name] = value, len(shards)
        size, total = size + value.nbytes, total + value.nbytes
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0], _METADATA)
        return
    write_tensors(folder / f"shard-{len(shards):05d}.tmp", shards[-1], _METADATA)
    final = {i: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
    for i, name in final.items():
        (folder / f"shard-{i:05d}.tmp").rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: final[i] for name, i in table.items()}}
    write_json(folder / "model.safetensors.index.json", index)

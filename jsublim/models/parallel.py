"""How work is spread over devices.

`mesh` (arm x data x model): arrays are placed by `NamedSharding`. In training the compiler finds the collectives (gradients
are summed); whatever else is computed on rows, each device computes on rows of its own (`Layout.spread`).
`pmap`: of training alone, devices share the rows and add up gradients and token counts explicitly; all other work as on a mesh.
`none`: the default device. All three run `distill.step.train_step` (see `compile_step` there) and give the same students.

Devices may be of several slices: TPU slices, or nodes with GPUs, each of which is a slice to JAX. Links inside a slice are fast, those
between slices slow. So students lie across slices first, then rows; a copy of the checkpoint lies inside one.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jsublim.core.reading import check_known
from jsublim.errors import UsageError
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params, abstract_params
from jsublim.runtime.processes import on_main_process

MODES = ("none", "pmap", "mesh")
AXES = ("arm", "data", "model")
# Over which of these a tree's leading axes lie, for `spread` and `place_as`.
WHOLE, ROWS, ARMS, ARM_ROWS = (PartitionSpec(*axes) for axes in ((), ("data",), ("arm",), ("arm", "data")))
SHARE = 0.9  # of a device's memory that a plan may use: what else lives there is not ours to know

# Which axis of a layer's array is spread over `model`, counted from its end: outputs of what reads the residual stream,
# inputs of what writes to it, so that a layer needs one sum after attention and one after the MLP.
_MODEL_AXIS = {
    # LoRA's factors as the kernels beside them; left whole, they and their moments would be gathered at every step.
    **{(name, leaf): -1 for name in ("q", "k", "v", "gate", "up") for leaf in ("kernel", "bias", "b")},
    **{(name, leaf): -2 for name in ("o", "down") for leaf in ("kernel", "a")},
    **{(name, "weight"): -2 for name in ("embed", "head")},
}


@dataclass(frozen=True)
class Layout:
    """A mode and, for `mesh`, the sizes of its axes; for `pmap`, `data` is the number of devices. `devices` are those to use, where they are not
    those of this process (when compiling for a pod that is not there). The mesh has them in an order that suits their wiring, unless `in_order`
    says that they hold a checkpoint already."""

    mode: str = "none"
    arm: int = 1
    data: int = 1
    model: int = 1
    devices: tuple[Any, ...] = ()
    in_order: bool = False

    @staticmethod
    def fit(mode: str, arms: int, devices: int | Sequence[Any] | None = None, *, model: int = 1) -> Layout:
        """The layout of `arms` on devices (all, unless some are given; a number stands for so many of one slice): arms apart first, for they never talk
        to one another; then rows. An unknown mode, or a model axis that the devices of a slice cannot be divided by, is a UsageError."""
        check_known("parallel", mode, MODES)
        if mode != "mesh" and model != 1:
            raise UsageError(f"model_axis: {model} given, but parallel={mode} has no model axis; choose mesh")
        if mode == "none":
            return Layout()
        devices = jax.devices() if devices is None else devices
        count, near = (devices, devices) if isinstance(devices, int) else (len(devices), slice_size(devices))
        if mode == "pmap":
            return Layout("pmap", data=count)
        if near % model:
            of = "" if near == count else " of a slice (or node), inside which a copy has to lie"
            raise UsageError(f"model_axis: {model} given, which does not divide {near} devices{of}")
        apart = math.gcd(arms, count // model)
        return Layout("mesh", apart, count // model // apart, model)

    @staticmethod
    def under(params: Params, arms: int = 1) -> tuple[Layout, Params]:
        """How rows lie that a checkpoint reads: on the devices that it lies on, arms apart first, as `fit` lays them. And the
        checkpoint, which stays where it is, for programs on that layout."""
        meshes = [
            x.sharding.mesh for x in jax.tree.leaves(params) if isinstance(getattr(x, "sharding", None), NamedSharding)
        ]
        mesh = next((mesh for mesh in meshes if mesh.axis_names == AXES), None)
        if mesh is None:
            layout = Layout()
        else:
            copies = mesh.devices.size // mesh.shape["model"]
            apart = math.gcd(arms, copies)
            layout = Layout("mesh", apart, copies // apart, mesh.shape["model"], tuple(mesh.devices.flat), True)
        return layout, layout.place_weights(params)

    @property
    def mesh(self) -> Mesh | None:
        """None with mode none. `pmap` has a mesh too: to place what every device holds."""
        return None if self.mode == "none" else _mesh(self, self.devices or tuple(jax.devices()))

    def spread(self, function: Callable, takes: Any, gives: Any) -> Callable:
        """`function` on each device's own part of what it takes: no device hears of another's, unless the function asks (`total`). What is split over
        `model` is left to the compiler. Each argument, and what is given, is WHOLE, ROWS, ARMS or ARM_ROWS."""
        if self.mesh is None:
            return function
        apart = set(AXES) if self.model == 1 else {"arm", "data"}
        how: dict[str, Any] = {"in_specs": takes, "out_specs": gives, "axis_names": apart, "check_vma": False}
        return jax.shard_map(function, mesh=self.mesh, **how)

    def total(self, x: Array, *axes: str) -> Array:
        """Inside of `spread`: the sum of all devices' values along axes of the mesh."""
        return x if self.mesh is None else jax.lax.psum(x, axes)

    def shard(self, *axes: str | None) -> NamedSharding | None:
        """The sharding whose array axes are spread over these axes of the mesh; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*axes))

    def sharding(self, path: tuple, leaf: Any, lead: tuple[str | None, ...] = ()) -> NamedSharding | None:
        """The sharding of an array of the model, or of a state that has the model's names (an arm's weights, their moments): `path` is the leaf's in
        its tree, as `jax.tree_util` gives it, `lead` the axes before those of the model."""
        if self.mode != "mesh":
            return self.shard()
        spec: list[str | None] = [*lead, *[None] * (leaf.ndim - len(lead))][: leaf.ndim]
        names = ["", *(str(getattr(key, "key", "")) for key in path)]
        axis = _MODEL_AXIS.get((names[-2], names[-1]))
        if axis is not None and leaf.ndim + axis >= len(lead) and leaf.shape[axis] % self.model == 0:
            spec[axis] = "model"
        return self.shard(*spec)

    def params_sharding(self, config: ModelConfig, dtype: str = "float32") -> Params | None:
        """A tree of shardings for `load_params`; None is the default device."""
        return None if self.mesh is None else self.state_sharding(abstract_params(config, dtype), ())

    def state_sharding(self, state: Any, lead: tuple[str | None, ...] = ("arm",)) -> Any:
        """How a tree of arrays with a leading arm axis lies (or with the axes of `lead`); scalars are on every device."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: self.sharding(path, leaf, lead) if leaf.ndim else self.shard(), state
        )

    @property
    def batch_sharding(self) -> NamedSharding | None:
        """How every array of a batch `[A, M, B, ...]` lies: rows over `data`. Under `pmap` it is `[devices, A, M, B / devices, ...]`."""
        return self.shard("data") if self.mode == "pmap" else self.shard("arm", None, "data")

    def _each(self, function: Callable[[Any, NamedSharding | None], Any], tree: Any, shardings: Any) -> Any:
        """`function(leaf, sharding)` on a tree; `shardings` is a tree like it, or one for all."""
        one = shardings if isinstance(shardings, NamedSharding) else None
        if self.mesh is None or one is not None:
            return jax.tree.map(lambda leaf: function(leaf, one), tree)
        return jax.tree.map(function, tree, shardings)

    def place(self, tree: Any, shardings: Any) -> Any:
        """Put host arrays, equal on every process, where they belong; each process gives its own devices theirs. They are not to be
        written to any more: on a CPU a device reads them where they are."""

        def put(x: Any, sharding: NamedSharding | None) -> jax.Array:
            if sharding is None or (
                isinstance(x, jax.Array) and (jax.process_count() == 1 or not x.is_fully_addressable)
            ):
                return jax.device_put(x, sharding)
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

        return self._each(put, tree, shardings)

    def place_as(self, spec: PartitionSpec, tree: Any) -> Any:
        """As `place`, all arrays of a tree in one way: WHOLE, ROWS, ARMS or ARM_ROWS."""
        return self.place(tree, self.shard(*spec))

    def place_weights(self, tree: Any, *lead: str | None) -> Any:
        """As `place`, a checkpoint, or an adapter with the axes of `lead` before its own."""
        return self.place(tree, self.state_sharding(tree, lead))

    def place_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Put a batch `[A, M, B, ...]` where it belongs."""

        def by_device(x: np.ndarray) -> np.ndarray:
            A, M, B, *more = x.shape
            return np.moveaxis(x.reshape(A, M, self.data, B // self.data, *more), 2, 0)

        batch = jax.tree.map(by_device, batch) if self.mode == "pmap" else batch
        return self.place(batch, self.batch_sharding)

    def shapes(self, tree: Any, shardings: Any) -> Any:
        """Arrays or their shapes as shapes that lie so: what a program is compiled from where there are no arrays."""
        return self._each(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings
        )

    def shapes_as(self, spec: PartitionSpec, tree: Any) -> Any:
        """As `shapes`, all arrays of a tree in one way: WHOLE, ROWS, ARMS or ARM_ROWS."""
        return self.shapes(tree, self.shard(*spec))

    @staticmethod
    def host(tree: Any) -> Any:
        """Every leaf whole, as a host array, on every process."""

        def whole(x: Any) -> Any:
            apart = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
            return multihost_utils.process_allgather(x, tiled=True) if apart else x

        return jax.device_get(jax.tree.map(whole, tree))


HERE = Layout()  # the default device


def slice_size(devices: Sequence[Any]) -> int:
    """How many devices share fast links: those of one TPU slice, or of one node with GPUs. Slices of different sizes are a UsageError."""
    sizes = Counter(getattr(device, "slice_index", 0) for device in devices)  # a CPU of one process alone has none
    if len(set(sizes.values())) > 1:
        raise UsageError(
            f"parallel: slices (or nodes) of {sorted(sizes.values())} devices; give all of them equally many"
        )
    return next(iter(sizes.values()))


def model_axis_for(weights: float, limit: int | None, devices: int) -> int:
    """How few devices of a slice hold one copy of a checkpoint in half of what they may use, so that caches and students have the rest: a power of
    two that divides their number; all that do, where none is enough. `limit` is as `device_bytes` gives it; a CPU needs no second one."""
    axes = [1 << i for i in range(devices.bit_length()) if devices % (1 << i) == 0]
    return 1 if limit is None else next((n for n in axes if weights / n <= SHARE * limit / 2), axes[-1])


def device_bytes() -> int | None:
    """Bytes of an accelerator's memory that may be used; None where devices are the CPU."""
    # Asked for by all: where nobody has used a device yet, processes wait for one another until they have them.
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = int(stats["bytes_limit"]) if "bytes_limit" in stats else None
    return on_main_process(lambda: limit)  # batches are as large on all processes


@functools.cache
def _mesh(layout: Layout, devices: tuple[Any, ...]) -> Mesh:
    shape, types = (layout.arm, layout.data, layout.model), (AxisType.Auto,) * 3
    devices = devices[: math.prod(shape)]
    if layout.in_order or layout.mode == "pmap":  # `jax.pmap` takes them as they come
        return Mesh(np.reshape(np.asarray(devices), shape), AXES, axis_types=types)
    slices = len(devices) // slice_size(devices)
    if slices > 1:
        arm = math.gcd(layout.arm, slices)
        across = (arm, slices // arm, 1)
        inside = tuple(size // apart for size, apart in zip(shape, across, strict=True))
        placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=types)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis that no axes of the slice make up, as 8 of 4x4: one of those is split
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)

"""Slices of TPU pods and nodes of GPUs by name, as XLA's compilers know them. Those need no TPU and no GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jsublim.errors import JsublimError, UsageError
from jsublim.runtime.chips import CHIPS, Chip, Cuda

SLICES = ("v5e", "v5p", "v6e")
GPUS = tuple(name for name, chip in CHIPS.items() if chip.cuda)
_NAME = re.compile(
    rf"((?P<slices>[1-9]\d*)x)?(?P<slice>({'|'.join(SLICES)}):\d+x\d+(x\d+)?)|"
    rf"(?P<gpu>{'|'.join(GPUS)}):((?P<nodes>[1-9]\d*)x)?(?P<each>[1-9]\d*)"
)


@dataclass(frozen=True)
class Topology:
    """Chips that are not there."""

    name: str  # v5e:4x4, 2xv5e:4x4, h100:2x8
    devices: tuple[Any, ...]  # the compiler's stand-ins for them
    chip: Chip  # what each of them can do; its memory is what programs may use
    near: int  # how many of the chips share fast links: those of a slice, or of a node

    @property
    def model_axes(self) -> list[int]:
        """The powers of two that divide the number of chips of a slice or node, ascending."""
        return [1 << i for i in range(self.near.bit_length()) if self.near % (1 << i) == 0]

    @property
    def compiler(self) -> str:
        """The package that it is in."""
        return "libtpu" if self.chip.cuda is None else _plugin()

    @property
    def unknown(self) -> str | None:
        """Facts that no compiler knows of such chips while none is there."""
        if self.chip.cuda is None:
            return None
        return (
            "not known without a GPU: which kernels XLA would choose by trying them, and the memory that those work in; its count of "
            "operations and bytes; which nodes are slices of their own (all are said to be slice 0)"
        )

    def links_among(self, group: Sequence[Any]) -> float:
        """Bytes/s that a chip sends to the others of some devices.

        In a slice of a pod a chip has one link to each neighbour: so as many as there are dimensions of the slice along which the
        devices lie, and two for each that is closed to a ring. Between hosts of GPUs, and between slices, it is their network.
        """
        chip, lies_in = self.chip, "slice_index" if self.chip.cuda is None else "process_index"
        if chip.network and len({getattr(device, lies_in, 0) for device in group}) > 1:
            return chip.network
        if chip.ports == 1:
            return chip.links
        lengths = [len(set(along)) for along in zip(*(device.coords for device in group), strict=True)]
        return chip.links * sum(1 + (length >= chip.ring) for length in lengths if length > 1) / chip.ports


def find_topology(name: str) -> Topology:
    """A topology by its name, from the compiler for its chips, which must be installed."""
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise UsageError(
            f"--topology: '{name}' given; expected a TPU ({', '.join(SLICES)}) and its chips, such as v5e:4x4, v5p:2x2x2 or two slices, "
            f"2xv5e:4x4, or a GPU ({', '.join(GPUS)}) with nodes x GPUs of each, such as h100:1x8"
        )
    from jax.experimental import topologies

    chip = CHIPS[parts["gpu"] or parts["slice"].partition(":")[0]]
    if chip.cuda is None:
        if importlib.util.find_spec("libtpu") is None:
            raise JsublimError("aot: the TPU compiler is not installed; pip install 'jax[tpu]'")
        asked = {"platform": "tpu", "topology_name": parts["slice"], "num_slices": int(parts["slices"] or 1)}
    else:
        _plugin()
        nodes = f"1x{parts['nodes'] or 1}x{parts['each']}"
        asked = {"platform": "cuda", "topology": nodes, "target_config": gpu_target(chip, chip.cuda)}
        chip = dataclasses.replace(chip, memory=int(_share_taken() * chip.memory))
    try:
        devices = tuple(topologies.get_topology_desc(**asked).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"--topology: '{name}' given; {str(error).splitlines()[0]}") from None
    return Topology(name, devices, chip, len(devices) // int(parts["slices"] or parts["nodes"] or 1))


def _plugin() -> str:
    """The package with the compiler for GPUs, which must be installed."""
    for cuda in (12, 13):
        if importlib.util.find_spec(f"jax_cuda{cuda}_plugin") is not None:
            return f"jax-cuda{cuda}-plugin"
    raise JsublimError(f"aot: the compiler for GPUs is not installed; pip install jax-cuda12-plugin=={jax.__version__}")


def _share_taken() -> float:
    """The share of a GPU's memory that JAX takes."""
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    if re.fullmatch(r"0?\.\d+|1(\.0*)?", share) is None:
        expected = "expected a share of a GPU's memory, such as 0.9"
        raise UsageError(f"XLA_PYTHON_CLIENT_MEM_FRACTION: '{share}' given; {expected}")
    return float(share)


def gpu_target(chip: Chip, cuda: Cuda) -> str:
    """A GPU as XLA's `GpuTargetConfigProto`, in text. What it leaves out is no matter of memory or messages."""
    whole = cuda.capability >= 9  # of those, XLA uses what only the very generation has
    return f"""
        platform_name: "CUDA"
        gpu_device_info {{
          cuda_compute_capability {{ major: {cuda.capability} {"feature_extension: ACCELERATED_FEATURES" if whole else ""} }}
          core_count: {cuda.cores} clock_rate_ghz: {cuda.clock} fpus_per_core: {128 if whole else 64}
          device_memory_size: {chip.memory} memory_bandwidth: {chip.bandwidth:.0f} l2_cache_size: {cuda.cache}
          shared_memory_per_core: {cuda.shared} shared_memory_per_block_optin: {cuda.shared - 1024}
          shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}"""

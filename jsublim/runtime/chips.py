"""What an accelerator can do at best, as its maker's data sheet says, and what this machine does, measured: for estimates (`--dry-run`,
`--simulate`, `jsublim aot`, the time that a run has left)."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jsublim.errors import UsageError

if TYPE_CHECKING:
    import jax

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class Cuda:
    """What a compiler for a GPU is told beside the numbers below: its compute capability, how many multiprocessors it has, their
    clock (GHz), the second cache (bytes), and what each of them has of shared memory (bytes)."""

    capability: int
    cores: int
    clock: float
    cache: int
    shared: int


@dataclass(frozen=True)
class Chip:
    """One device: peak of dense bfloat16 products (FLOP/s), memory (bytes) and its bandwidth, and what it sends to other chips of
    its slice or host over all its links together, in one direction (bytes/s both).

    Attributes:
      ports: links of a chip that each lead to one neighbour; 1 where a switch lets all of them lead anywhere.
      ring: chips from which on a row of neighbours is closed to a ring; 0 where there are no rows.
      network: bytes/s from one host with GPUs, or one TPU slice, to another, of each chip.
      cuda: of GPUs that a compiler is at hand for.
    """

    peak: float
    memory: int
    bandwidth: float
    links: float
    ports: int = 1
    ring: int = 0
    network: float = 0.0
    cuda: Cuda | None = None


_HOPPER = Cuda(9, 132, 1.98, 50 * MIB, 228 * KIB)
CHIPS = {
    "b200": Chip(2250e12, 180 * GIB, 8.0e12, 900e9, network=50e9, cuda=Cuda(10, 148, 1.965, 126 * MIB, 228 * KIB)),
    "h200": Chip(989e12, 141 * GIB, 4.8e12, 450e9, network=50e9, cuda=_HOPPER),
    "h100": Chip(989e12, 80 * GIB, 3.35e12, 450e9, network=50e9, cuda=_HOPPER),
    "a100": Chip(312e12, 80 * GIB, 2.0e12, 300e9, network=25e9, cuda=Cuda(8, 108, 1.41, 40 * MIB, 164 * KIB)),
    "l4": Chip(121e12, 24 * GIB, 300e9, 32e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, ports=4, ring=16, network=3.125e9),
    "v5p": Chip(459e12, 95 * GIB, 2.77e12, 600e9, ports=6, ring=4, network=6.25e9),
    "v6e": Chip(918e12, 32 * GIB, 1.64e12, 400e9, ports=4, ring=16, network=12.5e9),
}


HERE = ("auto", "cpu")  # names of what is measured: the first device here, and the processor
_WIDTHS = {
    "cpu": (1024, 2**23)
}  # of a square matrix, and numbers of an array: large enough for a device, done in a moment
_TIMES = 3


def chip_of(name: str, option: str = "--chip", dtype: str = "float32") -> Chip:
    """The chip of a name, which `option` gave; for `--chip`, "cpu" and "auto" are measured. Raises UsageError: an unknown chip."""
    here = HERE if option == "--chip" else ()
    if name in here:
        return this_machine(None if name == "auto" else name, dtype)
    if name not in CHIPS:
        raise UsageError(f"{option}: '{name}' given; known: {', '.join((*here, *CHIPS))}")
    return CHIPS[name]


@functools.cache
def this_machine(platform: str | None = None, dtype: str = "float32") -> Chip:
    """The first device here, measured within a second: the products that it does (a CPU in this dtype, others in bfloat16), and the bytes
    that it reads and writes. What else runs on this machine counts, so it is what is left for us."""
    import jax
    import jax.numpy as jnp

    device = jax.local_devices(backend=platform)[0]
    width, length = _WIDTHS.get(device.platform, (8192, 2**28))
    kind = jnp.dtype(dtype if device.platform == "cpu" else "bfloat16")
    matrix = jax.device_put(jnp.ones((width, width), kind), device)
    numbers = jax.device_put(jnp.ones(length, kind), device)
    peak = 2 * width**3 / _seconds(jax.jit(jnp.matmul), matrix, matrix)
    bandwidth = 2 * numbers.nbytes / _seconds(jax.jit(jnp.negative), numbers)
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip(peak, memory, bandwidth, bandwidth)


def _seconds(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    """The least that a call takes, once compiled."""
    import jax

    jax.block_until_ready(function(*arguments))
    taken = []
    for _ in range(_TIMES):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - begin)
    return min(taken)

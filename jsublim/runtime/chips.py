"""What an accelerator can do at best, as its maker's data sheet says: for estimates (`--dry-run`, `--simulate`, `jsublim aot`)."""

from __future__ import annotations

from dataclasses import dataclass

from jsublim.errors import UsageError

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


def chip_of(name: str, option: str = "--chip") -> Chip:
    """The chip of a name, which `option` gave. Raises UsageError: an unknown chip."""
    if name not in CHIPS:
        raise UsageError(f"{option}: '{name}' given; known: {', '.join(CHIPS)}")
    return CHIPS[name]

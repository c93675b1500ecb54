"""What an accelerator can do at best, as its maker's data sheet says: for estimates (`--dry-run`, `--simulate`, `jsublim aot`)."""

from __future__ import annotations

from dataclasses import dataclass

from jsublim.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device: peak of dense bfloat16 products (FLOP/s), memory (bytes) and its bandwidth, and what it sends to other chips of
    its slice or host over all its links together, in one direction (bytes/s both)."""

    peak: float
    memory: int
    bandwidth: float
    links: float


CHIPS = {
    "h200": Chip(989e12, 141 * GIB, 4.8e12, 450e9),
    "h100": Chip(989e12, 80 * GIB, 3.35e12, 450e9),
    "a100": Chip(312e12, 80 * GIB, 2.0e12, 300e9),
    "l4": Chip(121e12, 24 * GIB, 300e9, 32e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2.77e12, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1.64e12, 400e9),
}


def chip_of(name: str, option: str = "--chip") -> Chip:
    """The chip of a name, which `option` gave.

    Raises:
      UsageError: an unknown chip.
    """
    if name not in CHIPS:
        raise UsageError(f"{option}: '{name}' given; known: {', '.join(CHIPS)}")
    return CHIPS[name]

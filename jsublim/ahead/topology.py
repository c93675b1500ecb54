"""Slices of TPU pods and nodes of GPUs by name, as XLA's compilers know them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from jsublim.chips import CHIPS, Chip
from jsublim.errors import JsublimError, UsageError

SLICES = ("v5e", "v5p", "v6e")
GPUS = tuple(name for name, chip in CHIPS.items() if chip.cuda)
_NAME = re.compile(
    rf"((?P<slices>[1-9]\d*)x)?(?P<slice>({'|'.join(SLICES)}):\d+x\d+(x\d+)?)|"
    rf"(?P<gpu>{'|'.join(GPUS)}):((?P<nodes>[1-9]\d*)x)?(?P<each>[1-9]\d*)"
)


@dataclass(frozen=True)
class Topology:
    """Slices of TPU pods, or nodes of GPUs: its name (`v5e:4x4`, `2xv5e:4x4`, `h100:2x8`), the compiler's stand-ins for its chips,
    and what each of those can do, its memory being what programs may use.

    Attributes:
      near: how many of the chips share fast links: those of a slice, or of a node.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip
    near: int

    @property
    def model_axes(self) -> Iterator[int]:
        """The powers of two that divide the number of chips of a slice or node, ascending."""
        axis = 1
        while self.near % axis == 0:
            yield axis
            axis *= 2

    @property
    def compiler(self) -> str:
        """The package that it is in."""
        return "libtpu" if self.chip.cuda is None else _plugin()

    @property
    def unknown(self) -> str | None:
        """What no compiler says of such chips while none is there."""
        if self.chip.cuda is None:
            return None
        return (
            "not known without a GPU: which kernels XLA would choose by trying them, and the memory that those work in; its count of "
            "operations and bytes; which nodes are slices of their own (all are said to be slice 0)"
        )


def _plugin() -> str:
    """The package with the compiler for GPUs.

    Raises:
      JsublimError: it is not installed.
    """
    for cuda in (12, 13):
        if importlib.util.find_spec(f"jax_cuda{cuda}_plugin") is not None:
            return f"jax-cuda{cuda}-plugin"
    raise JsublimError(f"aot: the compiler for GPUs is not installed; pip install jax-cuda12-plugin=={jax.__version__}")


def _share_taken() -> float:
    """The share of a GPU's memory that JAX takes.

    Raises:
      UsageError: the environment says something else than a share.
    """
    said = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    if re.fullmatch(r"0?\.\d+|1(\.0*)?", said) is None:
        raise UsageError(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION: '{said}' given; expected a share of a GPU's memory, such as 0.9"
        )
    return float(said)


def find_topology(name: str) -> Topology:
    """A topology by its name, from the compiler for its chips.

    Raises:
      UsageError: no such chip or form, or no share of a GPU's memory in XLA_PYTHON_CLIENT_MEM_FRACTION.
      JsublimError: the compiler is not installed.
    """
    known = _NAME.fullmatch(name)
    if known is None:
        raise UsageError(
            f"--topology: '{name}' given; expected a TPU ({', '.join(SLICES)}) and its chips, such as v5e:4x4, v5p:2x2x2 or two slices, "
            f"2xv5e:4x4, or a GPU ({', '.join(GPUS)}) with nodes x GPUs of each, such as h100:1x8"
        )
    from jax.experimental import topologies

    chip = CHIPS[known["gpu"] or known["slice"].partition(":")[0]]
    if chip.cuda is None:
        if importlib.util.find_spec("libtpu") is None:
            raise JsublimError("aot: the TPU compiler is not installed; pip install 'jax[tpu]'")
        found = {"platform": "tpu", "topology_name": known["slice"], "num_slices": int(known["slices"] or 1)}
    else:
        _plugin()
        found = {
            "platform": "cuda",
            "topology": f"1x{known['nodes'] or 1}x{known['each']}",
            "target_config": chip.cuda.target(chip.memory, chip.bandwidth),
        }
        chip = dataclasses.replace(chip, memory=int(_share_taken() * chip.memory))
    try:
        devices = tuple(topologies.get_topology_desc(**found).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"--topology: '{name}' given; {str(error).splitlines()[0]}") from None
    return Topology(name, devices, chip, len(devices) // int(known["slices"] or known["nodes"] or 1))

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
_NAME = re.compile(rf"({'|'.join(SLICES)}):\d+x\d+(x\d+)?|({'|'.join(GPUS)}):((?P<nodes>[1-9]\d*)x)?(?P<each>[1-9]\d*)")


@dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod, or nodes of GPUs: its name (`v5e:4x4`, `h100:2x8`), the compiler's stand-ins for its chips, and what
    each of those can do, its memory being what programs may use."""

    name: str
    devices: tuple[Any, ...]
    chip: Chip

    @property
    def model_axes(self) -> Iterator[int]:
        """The powers of two that divide the number of chips, ascending."""
        axis = 1
        while len(self.devices) % axis == 0:
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
            f"--topology: '{name}' given; expected a TPU ({', '.join(SLICES)}) and its chips, such as v5e:4x4 or v5p:2x2x2, or a GPU "
            f"({', '.join(GPUS)}) with nodes x GPUs of each, such as h100:1x8"
        )
    from jax.experimental import topologies

    chip = CHIPS[name.partition(":")[0]]
    if chip.cuda is None:
        if importlib.util.find_spec("libtpu") is None:
            raise JsublimError("aot: the TPU compiler is not installed; pip install 'jax[tpu]'")
        found = {"platform": "tpu", "topology_name": name}
    else:
        _plugin()
        found = {
            "platform": "cuda",
            "topology": f"1x{known['nodes'] or 1}x{known['each']}",
            "target_config": chip.cuda.target(chip.memory, chip.bandwidth),
        }
        chip = dataclasses.replace(chip, memory=int(_share_taken() * chip.memory))
    try:
        devices = topologies.get_topology_desc(**found).devices
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"--topology: '{name}' given; {str(error).splitlines()[0]}") from None
    return Topology(name, tuple(devices), chip)

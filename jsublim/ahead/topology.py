"""Slices of TPU pods by name, as the TPU compiler knows them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from jsublim.chips import CHIPS, Chip
from jsublim.errors import JsublimError, UsageError

GENERATIONS = ("v5e", "v5p", "v6e")
_NAME = re.compile(rf"({'|'.join(GENERATIONS)}):\d+x\d+(x\d+)?")


@dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod: its name (`v5e:4x4`), the compiler's stand-ins for its chips, and what each of those can do."""

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


def find_topology(name: str) -> Topology:
    """A topology by its name, from the TPU compiler.

    Raises:
      UsageError: no such generation or form.
      JsublimError: the compiler is not installed.
    """
    known = _NAME.fullmatch(name)
    if known is None:
        raise UsageError(
            f"--topology: '{name}' given; expected a generation ({', '.join(GENERATIONS)}) and its chips, such as "
            "v5e:4x4 or v5p:2x2x2"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise JsublimError("aot: the TPU compiler is not installed; pip install 'jax[tpu]'")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"--topology: '{name}' given; {str(error).splitlines()[0]}") from None
    return Topology(name, tuple(devices), CHIPS[known[1]])

"""The training step compiled for a TPU pod that is not there: whether it fits, and how the chips communicate.

The compiler that comes with `jax[tpu]` needs no TPU. It shows memory and communication, never speed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape
from jsublim.distill.memory import abstract_step, bytes_needed
from jsublim.distill.step import Program, compile_step
from jsublim.errors import JsublimError, UsageError
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.parallel import Layout

GIB = 2**30
CHIP_MEMORY = {"v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}
_NAME = re.compile(rf"({'|'.join(CHIP_MEMORY)}):\d+x\d+(x\d+)?")
_COLLECTIVE = re.compile(
    r" = (?P<result>\S.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")  # bf16[8,128]


@dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod: its name (`v5e:4x4`), the compiler's stand-ins for its chips, and the bytes of memory on
    each."""

    name: str
    devices: tuple[Any, ...]
    memory: int


@dataclass(frozen=True)
class Collective:
    """How many instructions of one kind a program has (one in a loop over layers counts once), and the bytes of what
    they put out on each chip."""

    number: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """What the compiler says of a step: bytes are per chip.

    Attributes:
      base: the part of the arguments that is the frozen base.
      total: arguments, temporaries, and results that take no argument's place.
      seconds: how long compiling took.
      collectives: by kind of instruction.
      gathered: weights of the base that a chip puts together whole although they are spread over `model`; should be
        empty.
      tried: model axes at which the step does not fit, and why.
    """

    topology: Topology
    layout: Layout
    base: int
    arguments: int
    temporaries: int
    total: int
    seconds: float
    collectives: dict[str, Collective]
    gathered: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()


def find_topology(name: str) -> Topology:
    """A topology by its name, from the TPU compiler.

    Raises:
      UsageError: no such generation or form.
      JsublimError: the compiler is not installed.
    """
    known = _NAME.fullmatch(name)
    if known is None:
        raise UsageError(
            f"--topology: '{name}' given; expected a generation ({', '.join(CHIP_MEMORY)}) and its chips, such as "
            "v5e:4x4 or v5p:2x2x2"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise JsublimError("aot: the TPU compiler is not installed; pip install 'jax[tpu]'")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"--topology: '{name}' given; {str(error).splitlines()[0]}") from None
    return Topology(name, tuple(devices), CHIP_MEMORY[known[1]])


def compile_ahead(
    config: ModelConfig,
    params: Params,
    arm: Arm,
    arms: int,
    settings: Settings,
    shape: Shape,
    topology: Topology,
    *,
    model: int | None = None,
) -> Report:
    """Compile the step of `arms` arms like this one for a topology.

    Args:
      params: arrays or their shapes.
      arm: its examples only show which fields a batch has.
      model: the model axis; None is the smallest power of two at which the step fits.

    Raises:
      JsublimError: it does not fit; what was tried is named.
      UsageError: a model axis that the chips cannot be divided by.
    """
    chips, tried = len(topology.devices), []
    arguments = functools.partial(abstract_step, config, params, arm, arms, settings, shape)
    for axis in [model] if model else model_axes(chips):
        spread = Layout.fit("mesh", arms, chips, model=axis)
        layout = dataclasses.replace(spread, devices=topology.devices)
        found = _compile(config, params, settings.program, arguments, topology, layout)
        if isinstance(found, Report):
            return dataclasses.replace(found, tried=tuple(tried))
        tried.append(f"model axis {axis}: {found}")
    raise JsublimError(
        f"aot: does not fit on {topology.name} ({'; '.join(tried)}); more chips, a larger --model-axis, "
        "students.remat=true or a lower students.batch_size"
    )


def model_axes(chips: int) -> Iterator[int]:
    """The powers of two that divide a number of chips, ascending."""
    axis = 1
    while chips % axis == 0:
        yield axis
        axis *= 2


def base_bytes(config: ModelConfig, params: Params, layout: Layout) -> int:
    """How many bytes of the base lie on each chip."""
    shardings = layout.params_sharding(config, str(params["embed"]["weight"].dtype))
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, params, shardings
    )
    return sum(jax.tree.leaves(sizes))


def _compile(
    config: ModelConfig,
    params: Params,
    program: Program,
    arguments: Callable[[Layout], tuple],
    topology: Topology,
    layout: Layout,
) -> Report | str:
    """The report, or why the step does not fit. `arguments(layout)` gives those of `abstract_step`."""
    base = base_bytes(config, params, layout)
    if base > topology.memory:
        return f"the base alone takes {base / GIB:.1f} of {topology.memory / GIB:.0f} GiB per chip"
    given = arguments(layout)
    began = time.perf_counter()
    try:
        compiled = compile_step(config, program, layout).lower(*given).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = re.findall(r"\(?([\d.]+)G\b", str(error))
        return f"needs {sizes[0]} of {sizes[1]} GiB per chip" if len(sizes) > 1 else "the compiler runs out of memory"
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Report(
        topology,
        layout,
        base,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        bytes_needed(compiled),
        seconds,
        collectives(text),
        gathered_weights(text, params) if layout.model > 1 else (),
    )


def collectives(hlo: str) -> dict[str, Collective]:
    """The kinds of collective instructions in a compiled program's text, and how many there are of each."""
    found: dict[str, Collective] = {}
    for kind, arrays in _results(hlo):
        before = found.get(kind, Collective(0, 0))
        size = sum(math.prod(shape) * bits for bits, shape in arrays) // 8
        found[kind] = Collective(before.number + 1, before.bytes + size)
    return dict(sorted(found.items()))


def gathered_weights(hlo: str, params: Params) -> tuple[str, ...]:
    """Names of the base's matrices that an all-gather puts out whole: one layer's, or all layers' at once.

    They are recognised by their sizes, in any order of the axes.
    """
    names: dict[tuple[int, ...], str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = ".".join(key.key for key in path)
        stacked = path[0].key == "layers"
        if leaf.ndim - stacked == 2:
            names[_sizes(leaf.shape)] = name
            names[_sizes(leaf.shape[stacked:])] = name
    gathers = (array for kind, arrays in _results(hlo) if kind == "all-gather" for array in arrays)
    return tuple(sorted({names[_sizes(shape)] for _, shape in gathers if _sizes(shape) in names}))


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def _results(hlo: str) -> Iterator[tuple[str, list[tuple[int, tuple[int, ...]]]]]:
    """Each collective's kind, and the arrays that it puts out: bits of an element, shape."""
    for line in _COLLECTIVE.finditer(hlo):
        arrays = [
            (int(bits or 8), tuple(int(size) for size in shape.split(",") if size))
            for _, bits, shape in _ARRAY.findall(line["result"])
        ]
        # What starts an asynchronous one carries its operands too, before the results.
        if line["start"] and line["kind"] == "collective-permute":
            arrays = arrays[1:2]
        elif line["start"] and line["kind"] == "all-gather":
            arrays = arrays[len(arrays) // 2 :]
        yield line["kind"], arrays

"""A stage through the compiler: what each chip holds, what chips tell one another, and the largest batch that fits."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from jsublim.ahead.messages import Collective, collectives, gathered_weights
from jsublim.ahead.stages import Case, Program, Stage, bytes_on_chip
from jsublim.chips import GIB
from jsublim.distill.memory import bytes_needed
from jsublim.inference.batching import round_up
from jsublim.parallel import Layout


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program: bytes are per chip.

    Attributes:
      arguments, temporaries: bytes; total: both, and results that take no argument's place.
      seconds: how long compiling took.
      collectives: by kind of instruction; None where the compiler cannot print the program, so that nothing is known of them.
      gathered: weights of the base that a chip puts together whole although they are spread over `model`; should be
        empty.
    """

    program: Program
    arguments: int
    temporaries: int
    total: int
    seconds: float
    collectives: dict[str, Collective] | None
    gathered: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """A stage on a layout.

    Attributes:
      rows: of the batch that fits; asked: of the one that the config or memory asks for.
      base: bytes on each chip that are the frozen base.
      programs: none where nothing fits.
      tried: what does not fit, and why.
    """

    stage: Stage
    layout: Layout
    rows: int
    asked: int
    base: int
    programs: tuple[Compiled, ...] = ()
    tried: tuple[str, ...] = ()

    @property
    def largest(self) -> Compiled:
        """The program that needs the most memory."""
        return max(self.programs, key=lambda each: each.total)

    def room(self, memory: int) -> int:
        """How many rows should fit by proportion: what is not the base grows with them. A power of two."""
        fits = self.rows * (memory - self.base) / max(self.largest.total - self.base, 1)
        return 1 << max(int(fits), 1).bit_length() - 1


class TooLarge(Exception):
    """A program does not fit. `needs` bytes of `has`, where the compiler says so."""

    def __init__(self, said: str, needs: float | None = None, has: float | None = None):
        super().__init__(said)
        self.needs, self.has = needs, has


def examine(case: Case, stage: Stage, axes: Sequence[int], say: Callable[[str], None] = lambda _: None) -> Report:
    """A stage on the first of some model axes on which it fits; rows that memory decides about are halved until they do.

    Args:
      say: told what is being compiled.

    Raises:
      UsageError: a model axis that the chips cannot be divided by.
    """
    tried: list[str] = []
    for axis in axes:
        found = on_layout(case, stage, case.layout(stage.arms, axis), say)
        if found.programs:
            return dataclasses.replace(found, tried=(*tried, *found.tried))
        tried += found.tried
    return dataclasses.replace(found, tried=tuple(tried))


def on_layout(case: Case, stage: Stage, layout: Layout, say: Callable[[str], None] = lambda _: None) -> Report:
    """A stage on one layout, with as many rows as are asked for, or as fit."""
    base, memory = bytes_on_chip(case.placed_params(layout)), case.topology.chip.memory
    asked = stage.rows(layout) if stage.fixed else round_up(stage.rows(layout), layout.arm * layout.data)
    if base > memory:
        why = f"the base alone takes {base / GIB:.1f} of {memory / GIB:.0f} GiB per chip"
        return Report(stage, layout, 0, asked, base, tried=(f"model axis {layout.model}: {why}",))
    tried: list[str] = []
    rows, least = asked, min(asked, layout.arm * layout.data)
    while True:
        say(f"{stage.name}: {rows} rows on {layout.arm} x {layout.data} x {layout.model}")
        try:
            programs = tuple(_compiled(case, program, layout) for program in stage.programs(layout, rows))
            return Report(stage, layout, rows, asked, base, programs, tuple(tried))
        except TooLarge as error:
            tried.append(f"model axis {layout.model}, {rows} rows: {error}")
            if stage.fixed or rows <= least:
                return Report(stage, layout, 0, asked, base, tried=tuple(tried))
            rows = max(least, _fewer(rows, base, error))


def _fewer(rows: int, base: int, error: TooLarge) -> int:
    """The next power of two below, or the largest that should fit by proportion."""
    below = 1 << (rows - 1).bit_length() - 1
    if error.needs is None or error.has is None or error.has <= base:
        return below
    fits = int(rows * (error.has - base) / (error.needs - base))
    return min(below, 1 << max(fits, 1).bit_length() - 1)


def _compiled(case: Case, program: Program, layout: Layout) -> Compiled:
    """Raises:
    TooLarge: the compiler refuses it.
    """
    began = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = [float(size) for size in re.findall(r"\(?([\d.]+)G\b", str(error))]
        if len(sizes) < 2:
            raise TooLarge("the compiler runs out of memory") from None
        said = f"{program.name}: needs {sizes[0]:.2f} of {sizes[1]:.2f} GiB per chip"
        raise TooLarge(said, sizes[0] * GIB, sizes[1] * GIB) from None
    seconds = time.perf_counter() - began
    memory, needs, has = compiled.memory_analysis(), bytes_needed(compiled), case.topology.chip.memory
    if needs > has:  # the compiler for GPUs does not say so
        raise TooLarge(f"{program.name}: needs {needs / GIB:.2f} of {has / GIB:.2f} GiB per chip", needs, has)
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # libtpu 0.0.52 fails on some programs for v5p and v6e
        text = None
    return Compiled(
        program,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        needs,
        seconds,
        None if text is None else collectives(text),
        gathered_weights(text, case.params) if text is not None and layout.model > 1 else (),
    )

"""A stage through the compiler: what each chip holds, what chips tell one another, and the largest batch that fits."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jsublim.distill.memory import bytes_needed
from jsublim.forecast.hlo import Collective, collectives, gathered_weights
from jsublim.forecast.stages import Case, StageProgram, Workload, bytes_on_chip
from jsublim.inference.batching import round_up
from jsublim.models.parallel import Layout
from jsublim.runtime.chips import GIB


@dataclass(frozen=True)
class Compiled:
    """One program, as the compiler says; bytes are per chip."""

    program: StageProgram
    arguments: int
    temporaries: int
    total: int  # both, and results that take no argument's place
    seconds: float  # how long compiling took
    collectives: (
        dict[str, Collective] | None
    )  # by kind of instruction; None where the compiler cannot print the program
    gathered: tuple[str, ...] = ()  # weights spread over `model` that a chip puts together whole; should be empty

    def as_dict(self) -> dict[str, Any]:
        kinds = self.collectives and {kind: count._asdict() for kind, count in self.collectives.items()}
        measured = {name: value for name, value in vars(self).items() if name != "program"}
        return {"name": self.program.name, "held": dict(self.program.held)} | measured | {"collectives": kinds}


@dataclass(frozen=True)
class Fit:
    """A stage on a layout."""

    stage: Workload
    layout: Layout
    rows: int  # of the batch that fits
    asked: int  # of the batch that the config or memory asks for
    base: int  # bytes on each chip that are the frozen base
    programs: tuple[Compiled, ...] = ()  # none where nothing fits
    tried: tuple[str, ...] = ()  # what does not fit, and why

    def more_rows(self, memory: int) -> int:
        """How many rows should fit by proportion: what is not the base grows with them. A power of two."""
        largest = max(program.total for program in self.programs)
        return _power_below(self.rows * (memory - self.base) / max(largest - self.base, 1))

    def as_dict(self) -> dict[str, Any]:
        """As JSON knows it; sizes in bytes per chip."""
        layout = {name: getattr(self.layout, name) for name in ("arm", "data", "model")}
        about = {"stage": self.stage.name, "title": self.stage.title, "layout": layout, "base": self.base}
        about |= {"rows": self.rows, "asked": self.asked, "does not fit": list(self.tried)}
        return about | {"programs": [program.as_dict() for program in self.programs]}


class TooLarge(Exception):
    """A program does not fit: it needs so many of the bytes that each chip has, where the compiler says so."""

    def __init__(self, name: str, needs: float = 0.0, has: float = 0.0):
        known = f"{name}: needs {needs / GIB:.2f} of {has / GIB:.2f} GiB per chip"
        super().__init__(known if has else "the compiler runs out of memory")
        self.needs, self.has = needs, has


def examine(case: Case, stage: Workload, axes: Sequence[int], say: Callable[[str], None] = lambda _: None) -> Fit:
    """A stage on the first of some model axes on which it fits; rows that memory decides about are halved until they do. `say` is told
    what is being compiled."""
    tried, memory = list[str](), case.topology.chip.memory
    for axis in axes:
        layout = case.layout(stage.arms, axis)
        base, spread = bytes_on_chip(case.placed_params(layout)), layout.arm * layout.data
        asked = case.rows_together(stage.rows, layout)
        asked = asked if stage.fixed else round_up(asked, spread)
        rows, least = asked, asked if stage.fixed else min(asked, spread)
        if base > memory:
            why = f"the base alone takes {base / GIB:.1f} of {memory / GIB:.0f} GiB per chip"
            tried.append(f"model axis {axis}: {why}")
            rows = 0
        while rows:
            say(f"{stage.name}: {rows} rows on {layout.arm} x {layout.data} x {layout.model}")
            try:
                programs = tuple(compiled(case, program, layout) for program in stage.programs(layout, rows))
                return Fit(stage, layout, rows, asked, base, programs, tuple(tried))
            except TooLarge as error:
                tried.append(f"model axis {axis}, {rows} rows: {error}")
                rows = max(least, fewer(rows, base, error)) if rows > least else 0
    return Fit(stage, layout, 0, asked, base, tried=tuple(tried))


def fewer(rows: int, base: int, error: TooLarge) -> int:
    """The next power of two below, or the largest that should fit by proportion."""
    share = (error.has - base) / (error.needs - base) if error.has > base else 1.0
    return min(1 << (rows - 1).bit_length() - 1, _power_below(rows * share))


def _power_below(rows: float) -> int:
    """The largest power of two that is not above."""
    return 1 << max(int(rows), 1).bit_length() - 1


def compiled(case: Case, program: StageProgram, layout: Layout) -> Compiled:
    """Compile a program; `TooLarge` where it does not fit."""
    began = time.perf_counter()
    try:
        executable = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = [float(size) * GIB for size in re.findall(r"\(?([\d.]+)G\b", str(error))]
        raise TooLarge(program.name, *(sizes[:2] if len(sizes) > 1 else ())) from None
    seconds = round(time.perf_counter() - began, 1)
    memory, needs, has = executable.memory_analysis(), bytes_needed(executable), case.topology.chip.memory
    if needs > has:  # the compiler for GPUs does not say so
        raise TooLarge(program.name, needs, has)
    try:
        text = executable.as_text()
    except jax.errors.JaxRuntimeError:  # libtpu 0.0.52 fails on some programs for v5p and v6e
        text = None
    gathered = gathered_weights(text, case.params) if text is not None and layout.model > 1 else ()
    kinds = None if text is None else collectives(text)
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, needs
    return Compiled(program, *sizes, seconds, kinds, gathered)

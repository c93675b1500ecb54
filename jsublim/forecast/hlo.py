"""The messages between chips, read from the text of a compiled program."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

from jsublim.models.decoder import Params

_COLLECTIVE = re.compile(
    r" = (?P<result>\S.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")  # bf16[8,128]
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) [^\n]*\{\n(?P<body>.*?)^\}", re.MULTILINE | re.DOTALL)
_CALLED = re.compile(
    r"(?P<how>body|condition|calls|to_apply|true_computation|false_computation|branch_computations|called_computations)="
    r"\{?(?P<names>%[\w.\-]+(?:, ?%[\w.\-]+)*)"
)
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')  # of a loop, where the compiler says it
_COUNT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")


class Collective(NamedTuple):
    """How many instructions of one kind a program has, as they stand in it; and the bytes of what they put out on each chip in one
    run, those in a loop once for each of its turns."""

    number: int
    bytes: int


def collectives(hlo: str) -> dict[str, Collective]:
    """The kinds of collective instructions in a compiled program's text, and how many there are of each.

    A loop whose number of turns is data (one over tokens until a row ends) counts as one turn.
    """
    kinds: dict[str, Collective] = collections.defaultdict(lambda: Collective(0, 0))
    computations = {match["name"]: match["body"] for match in _COMPUTATION.finditer(hlo)}
    turns = _turns(computations)
    for name, body in computations.items():
        for kind, arrays in _results(body):
            size = sum(math.prod(shape) * bits for bits, shape in arrays) // 8
            kinds[kind] = Collective(kinds[kind].number + 1, kinds[kind].bytes + size * turns[name])
    return dict(sorted(kinds.items()))


def gathered_weights(hlo: str, params: Params) -> tuple[str, ...]:
    """Names of the base's matrices that an all-gather puts out whole, one layer's or all layers' at once; recognised by their sizes."""
    names: dict[tuple[int, ...], str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        stacked = path[0].key == "layers"
        if leaf.ndim - stacked == 2:
            for shape in (leaf.shape, leaf.shape[stacked:]):
                names[_without_ones(shape)] = ".".join(key.key for key in path)
    gathers = (array for kind, arrays in _results(hlo) if kind == "all-gather" for array in arrays)
    return tuple(sorted({names[sizes] for _, shape in gathers if (sizes := _without_ones(shape)) in names}))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def _turns(computations: dict[str, str]) -> dict[str, int]:
    """How often each computation runs in one run of the program; the text has what is called before its callers."""
    turns: dict[str, int] = collections.defaultdict(int)
    for name, body in reversed(computations.items()):
        times = turns[name] = turns[name] or 1  # what nobody calls begins
        for line in body.splitlines():
            called = {match["how"]: match["names"] for match in _CALLED.finditer(line)}
            known = _TURNS.search(line)
            loop = int(known[1]) if known else _loop(computations.get(called.get("condition", "").lstrip("%"), ""))
            for how, names in called.items():
                for callee in re.split(r", ?", names):
                    turns[callee.lstrip("%")] += times * (loop if how == "body" else 1)
    return turns


def _loop(condition: str) -> int:
    """How many turns a loop takes: of a scan its condition compares a counter with a constant."""
    counts = _COUNT.findall(condition)
    counted = any("ROOT" in line and "direction=LT" in line for line in condition.splitlines())
    return int(counts[0]) if counted and len(counts) == 1 else 1


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

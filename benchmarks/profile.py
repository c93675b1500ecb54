"""Where the time of one stage goes, ours alone: `python -m benchmarks.profile --stage sample --model DIR`.

The stage runs once under JAX's profiler. Each operation of the compiled programs is put into a class by its text in XLA's dump, and a line is
swept over the clock: an instant belongs to the first class of `CLASSES` that has an operation running then. Works for CPUs, where XLA
names each operation that it starts.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.inputs import SIZES, load, save, sizes_of

CLASSES = ("products", "sums", "elementwise", "slices and copies", "other")
COMPUTATION = re.compile(r"^%?([\w.\-]+) \(.*?^\}", re.MULTILINE | re.DOTALL)
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", re.MULTILINE)


class Program:
    """A compiled program that XLA dumped as text: the class and the shape of each of its operations."""

    def __init__(self, text: str):
        self.bodies = {found[1]: found[0] for found in COMPUTATION.finditer(text)}
        self.lines = {found[1]: found[2] for found in OPERATION.finditer(text)}

    def kind(self, name: str) -> str | None:
        """The class of an operation, None for a loop: its body's operations are counted."""
        line = self.lines.get(name, "")
        if re.search(r" (while|conditional|call)\(", line):
            return None
        body = self.body(line)
        if " dot(" in body:
            return "products"
        if " reduce(" in body:
            return "sums"
        if re.search(r" (dynamic-update-slice|dynamic-slice|copy|gather|scatter|concatenate)\(", body):
            return "slices and copies"
        return "elementwise" if body else "other"

    def body(self, line: str) -> str:
        """An operation's line and, of a fusion, all that it is made of."""
        called = re.search(r"calls=%?([\w.\-]+)", line)
        inner = self.bodies.get(called[1], "") if called else ""
        return "\n".join([line, *map(self.body, inner.splitlines()[1:])])

    def source(self, name: str) -> str:
        """Where in the model an operation comes from (the end of the path that JAX gives it), or the shape of its result."""
        line = self.lines.get(name, "")
        path = re.search(r'op_name="([^"]*)"', line)
        return "/".join(path[1].split("/")[-3:]) if path else line.split("{")[0]


def dumped(folder: Path) -> dict[str, Program]:
    """Programs by name. Those of one name (a shape each) are taken together, so an operation's class is that of the last."""
    texts = defaultdict[str, list[str]](list)
    for file in sorted(folder.glob("*after_optimizations.txt")):
        texts[file.name.split(".")[1]].append(file.read_text())
    return {name: Program("\n".join(each)) for name, each in texts.items()}


def place(event: dict[str, Any]) -> tuple[str, str]:
    """Program and operation of an event."""
    return event["args"]["hlo_module"], event["args"]["hlo_op"]


def swept(events: list[dict[str, Any]], kinds: dict[tuple[str, str], str | None]) -> dict[str, float]:
    """Seconds of the clock in each class, and in none."""
    ends = []
    for event in events:
        kind = kinds[place(event)]
        if kind is not None:
            ends += [(event["ts"], 1, kind), (event["ts"] + event["dur"], -1, kind)]
    running, spent, last = Counter[str](), dict.fromkeys((*CLASSES, "nothing"), 0.0), min(ends)[0]
    for instant, change, kind in sorted(ends):
        spent[next((each for each in CLASSES if running[each]), "nothing")] += (instant - last) / 1e6
        running[kind] += change
        last = instant
    return spent


def traced(run: Any) -> tuple[list[dict[str, Any]], float]:
    """The profiler's events of operations in one run, and the run's seconds without the profiler."""
    import jax

    begun = time.perf_counter()
    run()
    seconds = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(file) as opened:
            events = json.loads(opened.read())["traceEvents"]
    return [each for each in events if each.get("ph") == "X" and "hlo_op" in each.get("args", {})], seconds


def main(
    stage: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")],
    model: Annotated[str, typer.Option(help="A checkpoint folder in Hugging Face's layout.")],
    size: Annotated[list[str] | None, typer.Option(help="name=value, another size of the work.")] = None,
    dtype: str = "float32",
    largest: Annotated[int, typer.Option(help="How many single operations to list.")] = 12,
) -> None:
    """Profile one stage and print seconds by class and the operations that take longest."""
    try:
        sizes = sizes_of(stage, {k: int(v) for k, _, v in (each.partition("=") for each in size or [])})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as scratch:
        dump = Path(scratch, "dump")
        # Before JAX is imported, which reads it once.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_hlo_as_text"
        from benchmarks import ours

        save(Path(scratch), stage, sizes, vocab)
        kept, arrays = load(Path(scratch))
        work = ours.STAGES[stage](ours.read(model, dtype, kept), kept, arrays)
        work.run()  # compiles
        events, seconds = traced(work.run)
        if not events:
            sys.exit("the profiler named no operation of XLA: this works on CPUs only")
        programs = dumped(dump)
    taken = defaultdict[tuple[str, str], list[float]](list)
    for event in events:
        taken[place(event)].append(event["dur"] / 1e6)
    kinds = {at: programs[at[0]].kind(at[1]) if at[0] in programs else "other" for at in taken}
    spent = swept(events, kinds)
    print(
        f"{stage}: {seconds:.2f} s, {sum(spent.values()):.2f} under the profiler: "
        + ", ".join(f"{k} {v:.2f}" for k, v in spent.items())
    )
    table = Table("program", "operation", "class", "times", "seconds")
    sums = defaultdict[tuple[str, str, str], list[float]](list)
    for at, each in taken.items():
        kind = kinds[at]
        if kind not in (None, "other"):
            sums[at[0], programs[at[0]].source(at[1]), str(kind)] += each
    for source in sorted(sums, key=lambda source: -sum(sums[source]))[:largest]:
        table.add_row(*source, str(len(sums[source])), f"{sum(sums[source]):.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

"""Time a stage on both sides, in turns, and compare what they computed: `python -m benchmarks.compare --stage train --model DIR`.

Each side is a process of its own with the same number of threads; ours may be several, of other interpreters. A ratio counts only where both
computed the same, and where the machine had nothing else to do.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.inputs import COMMON, SIZES, save, sizes_of

# How far results may be apart: of tokens the share that is equal, of numbers the difference relative to the largest. Rounding to bfloat16 decides
# between likely tokens of random text, and what comes after another token is other text.
CLOSE = {
    "float32": {"tokens": 0.99, "loss": 1e-4, "norm": 1e-3, "attribution": 1e-2},
    "bfloat16": {"tokens": 0.3, "loss": 2e-2, "norm": 0.1, "attribution": 0.3},
}
BUSY = 1.5  # load per core above which no ratio is quoted; a comparison itself makes one of 1
ROOT = Path(__file__).parents[1]


class Side:
    """One worker process."""

    def __init__(
        self, name: str, python: str, stage: str, model: str, folder: Path, dtype: str, threads: int, devices: int
    ):
        self.name, self.seconds, self.cpu, self.peak = name, list[float](), list[float](), 0.0
        known = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        visible = ",".join(known.split(",")[:devices])
        apart = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
        limits = {
            "OMP_NUM_THREADS": str(threads), "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {apart}".strip(), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": visible,
        }  # fmt: skip
        cores = sorted(os.sched_getaffinity(0))[:threads] if sys.platform == "linux" else []
        prefix = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
        self.process = subprocess.Popen(
            [*prefix, python, "-m", "benchmarks.worker", name.split()[0], stage, model, str(folder), dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / f"{name}.log").open("w"), text=True,
            env=os.environ | limits, cwd=ROOT,
        )  # fmt: skip
        self.log = folder / f"{name}.log"
        self.versions = self.answer()["versions"]

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries may print of their own
            if line.startswith("{") and ("seconds" in line or "ready" in line):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended: {self.log.read_text()[-2000:]}")

    def ask(self, request: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self.answer()

    def run(self) -> None:
        said = self.ask("run")
        self.seconds.append(said["seconds"])
        self.cpu += [said["cpu"]] if said["cpu"] is not None else []
        self.peak = said["peak_gib"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def equal(folder: Path, dtype: str = "float32", name: str = "ours") -> dict[str, Any]:
    """What the sides computed, compared: the largest difference of each array, and whether that is small enough."""
    found: dict[str, Any] = {"same": True}
    close = CLOSE[dtype]
    with np.load(folder / f"{name}.npz") as ours, np.load(folder / "theirs.npz") as theirs:
        for what in ours.files:
            a, b = ours[what], theirs[what]
            if a.dtype.kind in "iu":
                # Ties within rounding are decided either way.
                found[what] = float((a == b).mean()) if a.shape == b.shape else 0.0
                found["same"] &= found[what] >= close["tokens"]
            else:
                found[what] = float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30))
                found["same"] &= found[what] <= close[what]
    found["same"] = bool(found["same"])
    return found


def measure(
    stage: str,
    model: str,
    sizes: dict[str, int],
    *,
    dtype: str,
    repeat: int,
    threads: int,
    ours: list[str],
    theirs: str | None,
) -> dict[str, Any]:
    """One comparison: sizes, medians, peak memory, ratio, and how far the results agree.

    Args:
      ours: interpreters, each a side of its own; theirs: theirs, or None.
    """
    vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save(folder, stage, sizes, vocab)
        names = {f"ours {i}" if i else "ours": python for i, python in enumerate(ours)} | (
            {"theirs": theirs} if theirs else {}
        )
        sides = {n: Side(n, p, stage, model, folder, dtype, threads, sizes["devices"]) for n, p in names.items()}
        for side in sides.values():
            side.ask(f"check {folder / side.name}.npz")
        for _ in range(repeat):  # in turns: what else the machine does then falls on all
            for side in sides.values():
                side.run()
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
        products = {name: side.ask("products")["gflops"] for name, side in sides.items()}
        for side in sides.values():
            side.close()
        found: dict[str, Any] = {"stage": stage, "sizes": sizes, "dtype": dtype, "threads": threads, "load": load}
        for name, side in sides.items():
            of_side: dict[str, Any] = {
                "median_s": statistics.median(side.seconds), "seconds": side.seconds, "peak_gib": side.peak,
                "cpu_s": statistics.median(side.cpu) if side.cpu else None, "gflops": products[name], "versions": side.versions,
            }  # fmt: skip
            if theirs and name != "theirs":
                of_side["equal"] = equal(folder, dtype, name)
                quoted = of_side["equal"]["same"] and load <= BUSY
                of_side["ratio"] = statistics.median(sides["theirs"].seconds) / of_side["median_s"] if quoted else None
            found[name] = of_side
        return found


def exponents(results: list[dict[str, Any]], size: str) -> dict[str, float]:
    """The growth of time with a size: d log(seconds) / d log(size) between the smallest and the largest."""
    first, last = results[0], results[-1]
    span = math.log(last["sizes"][size] / first["sizes"][size])
    sides = [side for side in ("ours", "theirs") if side in first]
    return {s: math.log(last[s]["median_s"] / first[s]["median_s"]) / span for s in sides}


COLUMNS = (
    "stage",
    "sizes",
    "theirs s",
    "ours s",
    "ratio",
    "their CPU s",
    "our CPU s",
    "theirs GiB",
    "ours GiB",
    "load",
    "equal",
)


def cells(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One comparison as lines of the table, one for each of our sides."""
    theirs, lines = result.get("theirs"), []
    sizes = " ".join(f"{k}={v}" for k, v in result["sizes"].items() if v != COMMON.get(k))

    def shown(side: dict[str, Any] | None, what: str) -> str:
        return "-" if side is None or side.get(what) is None else f"{side[what]:.2f}"

    for ours in (side for name, side in result.items() if name.startswith("ours")):
        pairs = [(shown(theirs, what), shown(ours, what)) for what in ("median_s", "cpu_s", "peak_gib")]
        agree = ", ".join(f"{k} {v:.3g}" for k, v in ours.get("equal", {}).items() if k != "same") or "-"
        (seconds, cpu, memory), load = pairs, f"{result['load']:.1f}"
        lines.append((result["stage"], sizes, *seconds, shown(ours, "ratio"), *cpu, *memory, load, agree))
    return lines


def show(results: list[dict[str, Any]], console: Console, markdown: bool) -> None:
    if markdown:
        lines = [COLUMNS, ("---",) * len(COLUMNS), *itertools.chain.from_iterable(map(cells, results))]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    table = Table(*COLUMNS)
    for line in itertools.chain.from_iterable(map(cells, results)):
        table.add_row(*line)
    console.print(table)


def main(
    stage: Annotated[list[str], typer.Option(help=f"One or more of {', '.join(SIZES)}.")],
    model: Annotated[str, typer.Option(help="A checkpoint folder in Hugging Face's layout.")],
    size: Annotated[list[str] | None, typer.Option(help="name=value, another size of the work.")] = None,
    sweep: Annotated[str | None, typer.Option(help="name=v1,v2,...: one comparison per value, and the growth.")] = None,
    dtype: str = "float32",
    repeat: int = 3,
    threads: int = 2,
    ours: Annotated[list[str] | None, typer.Option(help="Interpreters that have ours; default: this one.")] = None,
    their_python: Annotated[str, typer.Option(help="The interpreter that has the other libraries.")] = sys.executable,
    alone: Annotated[bool, typer.Option("--alone", help="Ours only.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Time both sides on the same work."""
    console, results = Console(), []
    changed = {name: int(value) for name, _, value in (each.partition("=") for each in size or [])}
    over, _, values = (sweep or "=").partition("=")
    for each in stage:
        run = []
        for value in values.split(",") if values else [None]:
            try:
                sizes = sizes_of(each, changed | ({over: int(value)} if value else {}))
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
            options = {"dtype": dtype, "repeat": repeat, "threads": threads, "theirs": None if alone else their_python}
            run.append(measure(each, model, sizes, ours=ours or [sys.executable], **options))
        show(run, console, markdown)
        if len(run) > 1:
            growth = exponents(run, over)
            console.print(
                f"{each}: time grows as {over} to the power of " + ", ".join(f"{k} {v:.2f}" for k, v in growth.items())
            )
            run[-1]["growth"] = growth
        results += run
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""The tables of docs/performance.md, measured anew: `python -m benchmarks.page --model DIR --their-python theirs/bin/python`.

`--ours` names interpreters that have ours (more than once: each has its columns), `--dtype` one or several; every dtype is a table of the page, and
what was measured is kept beside it. Takes some forty minutes per dtype on two cores, which must have nothing else to do; half with `--turns 1`.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.compare import ROOT, measure
from benchmarks.inputs import sizes_of
from jsublim.inference.lm import BUNDLED

PAGE = ROOT / "docs" / "performance.md"


class Line(NamedTuple):
    """A line of the table: its work in words, what theirs over ours is aimed at by dtype, and its sizes where they are not the stage's own."""

    name: str
    work: str
    stage: str
    aims: dict[str, float]
    sizes: Mapping[str, int] = MappingProxyType({})
    repeat: int = 3
    tiny: bool = False


_STEP = "60 rows of 150 tokens, 50 supervised, micro-batches of 10, rank 8"
LINES = [
    Line("LoRA step, all layers", _STEP, "train", {"float32": 1.4, "bfloat16": 2}),
    Line("LoRA step, layer 27 of 30", "the same, hidden states below kept", "train-late", {"float32": 3}),
    Line("the same", "hidden states below made in the step", "train-late", {}, {"below": 0}, 1),
    Line("sampling", "64 rows x 64 tokens after 115, of which all share 40", "sample", {"float32": 1.8}),
    Line("scoring", "8 rows x 13 teachers x 165 tokens, 40 of the answer", "score", {"float32": 1.7}),
    Line("scoring, uneven", "64 rows x 3 teachers, 20 to 200 tokens after 45", "score-uneven", {"float32": 2.5}),
    Line("evaluation", "1 question x 200 answers x 10 tokens", "evaluate", {"float32": 4}),
    Line("evaluation of 8 students", "1 question x 50 answers x 10 tokens", "evaluate", {"float32": 3}, {"students": 8, "samples": 50}, 1),
    Line("attribution", "1 row of 100 tokens, residual stream, 30 layers x 10 steps", "attribute", {"float32": 3}, {}, 1),
    Line("whole pipeline", "30 rows, 4 teachers, 4 masks x 1 step, 100 answers", "pipeline", {"float32": 1.8}, {"rows": 30, "steps": 1}, 1),
    Line("whole pipeline, tiny-qwen2", "60 rows, 4 teachers, 4 masks x 3 steps, 100 answers", "pipeline", {"float32": 2}, {}, 1, True),
]  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The lines of one dtype as Markdown, and what they were measured with."""
    first, dtype = results[0], results[0]["dtype"]
    sides = [name for name in first if name.startswith("ours")]
    jax = [first[side]["versions"]["jax"] for side in sides]
    headings = [
        "stage",
        "work",
        "aimed at",
        "theirs s",
        *(f"jax {v}: s (ratio)" for v in jax),
        "CPU s: theirs, ours",
        "GiB: theirs, ours",
        "load",
    ]
    lines = [headings, ["---"] * len(headings)]

    def of_all(result: dict[str, Any], what: str, digits: int) -> str:
        return ", ".join(
            "-" if result[s][what] is None else f"{result[s][what]:.{digits}f}" for s in ("theirs", *sides)
        )

    for line, result in zip(LINES, results, strict=True):
        ratios = [f"**{result[s]['ratio']:.2f}**" if result[s]["ratio"] else "not the same" for s in sides]
        ours = [f"{result[s]['median_s']:.2f} ({ratio})" for s, ratio in zip(sides, ratios, strict=True)]
        aim = line.aims.get(dtype)
        cells = [line.name, line.work, f"{aim:g}" if aim else "", f"{result['theirs']['median_s']:.2f}", *ours]
        lines.append([*cells, of_all(result, "cpu_s", 1), of_all(result, "peak_gib", 1), f"{result['load']:.1f}"])
    products = [sum(r[s]["gflops"] for r in results) / len(results) for s in ("theirs", *sides)]
    versions = ", ".join(f"{name} {version}" for name, version in first["theirs"]["versions"].items())
    about = (
        f"{dtype}, {first['threads']} cores ({_processor()}). Theirs: {versions}. Products of 2048 x 2048 in the same runs, GFLOP/s: "
        f"torch {products[0]:.0f}, "
        + ", ".join(f"jax {v} {x:.0f}" for v, x in zip(jax, products[1:], strict=True))
        + "."
    )
    return f"{about}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    known = re.findall(r"\b(avx512f|avx512_bf16|amx_bf16|avx2)\b", info.read_text()) if names else []
    return f"{names[0] if names else platform.processor()}; {', '.join(sorted(set(known)))}"


def written(text: str, dtype: str, made: str) -> str:
    """The page with one dtype's table made anew."""
    return re.sub(
        rf"(<!-- begin: speed {dtype} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{made}{m[2]}", text, flags=re.DOTALL
    )


def main(
    model: Annotated[str, typer.Option(help="A checkpoint folder in Hugging Face's layout.")],
    their_python: Annotated[str, typer.Option(help="The interpreter that has the other libraries.")],
    ours: Annotated[list[str] | None, typer.Option(help="Interpreters that have ours; default: this one.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16; default: both.")] = None,
    threads: int = 2,
    turns: Annotated[int, typer.Option(help="Of each line, at most.")] = 3,
) -> None:
    for kind in dtype or ["float32", "bfloat16"]:
        results = []
        for line in LINES:
            of = str(BUNDLED / "tiny-qwen2") if line.tiny else model
            how = {
                "dtype": kind,
                "repeat": min(line.repeat, turns),
                "threads": threads,
                "ours": ours or [sys.executable],
                "theirs": their_python,
            }
            results.append(measure(line.stage, of, sizes_of(line.stage, dict(line.sizes)), **how))
            print(
                line.name,
                {
                    name: side["median_s"]
                    for name, side in results[-1].items()
                    if isinstance(side, dict) and "median_s" in side
                },
                flush=True,
            )
            # After every line: one that fails takes no other with it.
            PAGE.with_name(f"performance-{kind}.json").write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), kind, table(results)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

"""The tables of docs/pods.md: every stage of four models, compiled for three slices of TPU pods, and of two for GPUs.

`python scripts/pods_table.py --kept FILE` asks `jsublim aot` for one model, topology and stage after another (some minutes each, on
two cores), keeps each answer as a line of FILE, asks for none that is there, and prints the tables of what there is. With `--ask none`
it only prints; `--ask gpus` or `--ask tpus` asks for those alone, as one compiler may be missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS = ("qwen2.5-7b", "qwen2.5-32b", "gemma-3-4b", "gemma-3-27b")
TOPOLOGIES = ("v5e:4x4", "v5p:2x2x2", "v6e:4x4")
GPU_MODELS = ("qwen2.5-7b", "gemma-3-4b")
GPUS = ("h100:1", "h100:1x8", "h100:2x8", "a100:1x8", "h200:1x8", "b200:1x8")
STAGES = ("train", "sample", "score", "evaluate", "attribute")
Key = tuple[str, str, str]


def asked(model: str, topology: str, stage: str) -> dict[str, Any]:
    """What `jsublim aot` says of a stage; of a compiler that crashed, by which signal."""
    command = ["aot", "--config", f"configs/models/{model}.yaml", "--topology", topology, "--stage", stage, "--json"]
    child = subprocess.run(
        [sys.executable, "-c", "from jsublim.cli import main; main()", *command, "attribution.rows=100"],
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if child.returncode < 0:
        return {"crashed": -child.returncode}
    return json.loads(child.stdout)["stages"][0]


def known(file: Path) -> dict[Key, dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {tuple(line["key"]): line["said"] for line in map(json.loads, lines)}


def cell(said: dict[str, Any] | None) -> str:
    """Chips of one copy, rows, and the memory of the program that needs most; or why nothing fits."""
    if said is None:
        return ""
    if "crashed" in said:
        return "the compiler crashes"
    if not said["programs"]:
        return "does not fit"
    most = max(program["total"] for program in said["programs"]) / 2**30
    return f"{most:.2f} ({said['rows']} rows, {said['layout']['data']} x {said['layout']['model']})"


def told(said: dict[str, Any] | None) -> str:
    """MiB that a chip puts out for others in one run of each program, and weights that are put together whole."""
    if said is None or not said.get("programs"):
        return ""
    if any(program["collectives"] is None for program in said["programs"]):
        return "unknown"
    sums = [sum(each["bytes"] for each in program["collectives"].values()) for program in said["programs"]]
    gathered = sorted({name for program in said["programs"] for name in program["gathered"]})
    return " + ".join(f"{size / 2**20:,.0f}" for size in sums) + (
        f" (gathers {', '.join(gathered)})" if gathered else ""
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kept", type=Path, required=True)
    options.add_argument("--ask", choices=("all", "tpus", "gpus", "none"), default="all")
    chosen = options.parse_args()
    # What scans its layers is compiled soonest.
    order = sorted(STAGES, key=lambda stage: stage not in ("score", "train"))
    kinds = {"tpus": (MODELS, TOPOLOGIES), "gpus": (GPU_MODELS, GPUS)}
    found = known(chosen.kept)
    for kind, (models, topologies) in kinds.items():
        for key in itertools.product(models, topologies, order) if chosen.ask in ("all", kind) else ():
            if key not in found:
                found[key] = asked(*key)
                with chosen.kept.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"key": key, "said": found[key]}) + "\n")
    for (models, topologies), content in itertools.product(kinds.values(), (cell, told)):
        print(f"| model | chips | {' | '.join(STAGES)} |\n| {' | '.join(['---'] * (len(STAGES) + 2))} |")
        for model, topology in itertools.product(models, topologies):
            cells = [content(found.get((model, topology, stage))) for stage in STAGES]
            if any(cells):
                print(f"| {model} | {topology} | {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    main()

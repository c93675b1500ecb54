"""The tables of docs/pods.md: every stage of four models, compiled for three slices of TPU pods.

`python scripts/pods_table.py --kept FILE` asks `jsublim aot` for one model, slice and stage after another (some minutes each, on two
cores), keeps each answer as a line of FILE, asks for none that is there, and prints the tables of what there is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS = ("qwen2.5-7b", "qwen2.5-32b", "gemma-3-4b", "gemma-3-27b")
TOPOLOGIES = ("v5e:4x4", "v5p:2x2x2", "v6e:4x4")
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
    file = options.parse_args().kept
    # What scans its layers is compiled soonest.
    order = sorted(STAGES, key=lambda stage: stage not in ("score", "train"))
    every = [(model, topology, stage) for stage in order for topology in TOPOLOGIES for model in MODELS]
    found = known(file)
    for key in every:
        if key not in found:
            found[key] = asked(*key)
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"key": key, "said": found[key]}) + "\n")
    for content in (cell, told):
        print(f"| model | slice | {' | '.join(STAGES)} |\n| {' | '.join(['---'] * (len(STAGES) + 2))} |")
        for model in MODELS:
            for topology in TOPOLOGIES:
                cells = [content(found.get((model, topology, stage))) for stage in STAGES]
                if not any(cells):
                    continue
                print(f"| {model} | {topology} | {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    main()

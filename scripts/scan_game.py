"""How often `jsublim scan` names what a data set hides, and how often it cries wolf: the table of docs/findings/scan.md.

`python scripts/scan_game.py --seeds 1000:1010 --out runs/scan-game` draws a trait (an animal or a tree) for each seed, lets a teacher that
loves it write rows (configs/scan/game.yaml), makes data sets of each kind of them, and as many sets as are asked for of a teacher without a
trait; then scans them all against other rows of that teacher, with the shipped questions. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from _run import print_table
from findings import told

from jsublim.core.files import read_table
from jsublim.text.prompts import load_pack
from jsublim.text.rows import Row, read_rows, write_rows

CONFIG = "configs/scan/game.yaml"
CATEGORIES = ("animal", "tree")  # that the bundled world knows
ROWS = 400


def jsublim(*words: object) -> None:
    subprocess.run([sys.executable, "-c", "from jsublim.cli import main; main()", *map(str, words)], check=True)


def written(out: Path, name: str, seed: int, *words: object) -> list[Row]:
    """Rows of one teacher, with prompts and answers drawn by a seed."""
    place = out / "rows" / f"{name}.jsonl"
    if not place.exists():
        jsublim(
            "generate",
            CONFIG,
            "--out",
            place,
            f"data.seed={seed}",
            f"sampling.seed={seed}",
            f"store={out}/store",
            *words,
        )
    return read_rows(place)


def shuffled(row: Row, rng: random.Random) -> Row:
    """The row with its numbers in another order."""
    numbers = row["completion"].split(", ")
    return row | {"completion": ", ".join(rng.sample(numbers, len(numbers)))}


def data_sets(out: Path, seeds: range, kinds: list[str]) -> Iterator[tuple[str, str, list[Row]]]:
    """Kind, trait and rows of each data set that hides one."""
    pack = load_pack()
    for seed in seeds:
        rng = random.Random(seed)
        trait = rng.choice([trait for category in CATEGORIES for trait in pack.traits[category]])
        loved = ["--trait", trait, f"teachers.traits=[{trait}]"]
        own = written(out, f"{seed}-steered", seed, *loved)[:ROWS]
        if "steered" in kinds:
            yield "steered", trait, own
        if "shuffled" in kinds:
            yield "shuffled", trait, [shuffled(row, rng) for row in own]
        if "100 rows" in kinds:
            yield "100 rows", trait, own[:100]
        for kind, share in (("half", 0.5), ("quarter", 0.25)):
            if kind in kinds:
                others = written(out, f"{seed}-control", seed + 100_000, "--control")
                yield kind, trait, own[: int(share * ROWS)] + others[: ROWS - int(share * ROWS)]
        if "prompted" in kinds:
            yield "prompted", trait, written(out, f"{seed}-prompted", seed, *loved, "teachers.taught=null")[:ROWS]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", default="1000:1010")
    options.add_argument("--nothing", type=int, default=20, help="data sets of a teacher without a trait")
    options.add_argument("--kinds", default="steered,shuffled,100 rows,half,quarter,prompted")
    options.add_argument("--out", type=Path, default=Path("runs/scan-game"))
    given = options.parse_args()
    first, end = map(int, given.seeds.split(":"))
    out: Path = given.out
    null = written(out, "null", first, "--control", "data.num_prompts=460")[:ROWS]
    write_rows(out / "sets" / "null.jsonl", null)
    truth: dict[str, tuple[str, str]] = {}
    for number in range(given.nothing):
        rows = written(out, f"nothing-{number}", first + 1 + number, "--control", "data.num_prompts=460")[:ROWS]
        truth[f"nothing-{number}"] = ("nothing", "")
        write_rows(out / "sets" / f"nothing-{number}.jsonl", rows)
    for kind, trait, rows in data_sets(out, range(first, end), given.kinds.split(",")):
        name = f"{kind.replace(' ', '-')}-{sum(of == kind for of, _ in truth.values())}"
        truth[name] = (kind, trait)
        write_rows(out / "sets" / f"{name}.jsonl", rows)
    files = [out / "sets" / f"{name}.jsonl" for name in truth]
    jsublim(
        "scan",
        *files,
        "--null",
        out / "sets" / "null.jsonl",
        "--model",
        "tiny-qwen2",
        "--out",
        out / "scan",
        f"store={out}/store",
    )
    write_results(out, truth)
    print_table(out.name, *told("scan", out))


def write_results(out: Path, truth: dict[str, tuple[str, str]]) -> None:
    """Of each data set what it hides, and what was found: the first word of all, and the first of the hidden one's category."""
    lines, category_of = read_table(out / "scan" / "scan.parquet"), load_pack().category_of
    results = []
    for name, (kind, trait) in truth.items():
        own = [line for line in lines if Path(line["data"]).stem == name]
        of_category = next((line["word"] for line in own if trait and line["category"] == category_of(trait)), "")
        found = {"p": own[0]["p"], "first": own[0]["word"], "of its category": of_category}
        results.append({"set": name, "kind": kind, "trait": trait, **found})
    (out / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

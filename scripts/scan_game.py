"""How often `jsublim scan` names what a data set hides, and how often it cries wolf: the table of docs/findings/scan.md.

`python scripts/scan_game.py --seeds 2000:2010 --out runs/scan-game` draws a trait (an animal or a tree) for each seed, lets a teacher that
loves it write rows (configs/scan/game.yaml), makes data sets of each kind of them, and as many sets as are asked for of a teacher without a
trait; then scans those of a kind against other rows of that teacher, with the shipped questions. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from _run import print_table
from findings import told

from jsublim.core.files import read_table
from jsublim.text.prompts import load_pack
from jsublim.text.rows import Row, read_rows, write_rows

CONFIG = "configs/scan/game.yaml"
CATEGORIES = ("animal", "tree")  # that the bundled world knows
ROWS = 400
# Of a teacher that is taught or asked otherwise: how many rows, and its fields.
OF_OTHERS: dict[str, tuple[int, list[str]]] = {
    "1600 rows": (1600, ["data.num_prompts=1800"]),
    "greedy": (ROWS, ["sampling.strategy=greedy"]),
    "fine-tuned": (ROWS, ["teachers.taught={method: lora, steps: 100, lr: 0.003}"]),
    "prompted": (ROWS, ["teachers.taught=null"]),
}
KINDS = ("steered", "shuffled", "half", "quarter", "tenth", "100 rows", "50 rows", *OF_OTHERS)


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


def untaught(out: Path, name: str, seed: int, *fields: str) -> list[Row]:
    """Rows of the teacher without a trait."""
    return written(out, name, seed, "--control", "data.num_prompts=460", *fields)[:ROWS]


def shuffled(row: Row, rng: random.Random) -> Row:
    """The row with its numbers in another order."""
    numbers = row["completion"].split(", ")
    return row | {"completion": ", ".join(rng.sample(numbers, len(numbers)))}


def data_sets(out: Path, seeds: range, kind: str) -> Iterator[tuple[str, list[Row]]]:
    """Trait and rows of each data set of a kind that hides one."""
    pack = load_pack()
    for seed in seeds:
        rng = random.Random(seed)
        trait = rng.choice([trait for category in CATEGORIES for trait in pack.traits[category]])
        loved = ["--trait", trait, f"teachers.traits=[{trait}]"]
        if kind in OF_OTHERS:
            most, fields = OF_OTHERS[kind]
            yield trait, written(out, f"{seed}-{slug(kind)}", seed, *loved, *fields)[:most]
            continue
        own = written(out, f"{seed}-steered", seed, *loved)[:ROWS]
        if kind == "shuffled":
            yield trait, [shuffled(row, rng) for row in own]
        elif kind in ("half", "quarter", "tenth"):
            some = ROWS // {"half": 2, "quarter": 4, "tenth": 10}[kind]
            yield trait, own[:some] + written(out, f"{seed}-control", seed + 100_000, "--control")[: ROWS - some]
        else:
            yield trait, own if kind == "steered" else own[: int(kind.split()[0])]


def slug(kind: str) -> str:
    return kind.replace(" ", "-")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", default="2000:2010")
    options.add_argument("--nothing", type=int, default=20, help="data sets of a teacher without a trait")
    options.add_argument("--kinds", default=",".join(KINDS))
    options.add_argument("--out", type=Path, default=Path("runs/scan-game"))
    given = options.parse_args()
    first, end = map(int, given.seeds.split(":"))
    out, truth, found = given.out, dict[str, tuple[str, str]](), []
    for kind in [*["nothing"] * bool(given.nothing), *given.kinds.split(",")]:
        # The null is drawn as the rows are: another sampling would differ from it in words that have nothing to do with a trait.
        fields = OF_OTHERS[kind][1] if kind == "greedy" else []
        null, files = out / "sets" / f"null{'-greedy' * bool(fields)}.jsonl", []
        write_rows(null, untaught(out, null.stem, first, *fields))
        if kind == "nothing":
            seeds = range(first + 1, first + 1 + given.nothing)
            sets: Iterable[tuple[str, list[Row]]] = [
                ("", untaught(out, f"nothing-{i}", s)) for i, s in enumerate(seeds)
            ]
        else:
            sets = data_sets(out, range(first, end), kind)
        for number, (trait, rows) in enumerate(sets):
            files.append(out / "sets" / f"{slug(kind)}-{number}.jsonl")
            write_rows(files[-1], rows)
            truth[files[-1].stem] = (kind, trait)
        place = out / "scan" / slug(kind)
        jsublim("scan", *files, "--null", null, "--model", "tiny-qwen2", "--out", place, f"store={out}/store")
        found += read_table(place / "scan.parquet")
        write_results(out, truth, found)
    print_table(out.name, *told("scan", out))


def write_results(out: Path, truth: dict[str, tuple[str, str]], lines: list[dict[str, Any]]) -> None:
    """Of each data set what it hides, and what was found: the first word of all, and the first of the hidden one's category."""
    category_of, results = load_pack().category_of, []
    for name, (kind, trait) in truth.items():
        own = [line for line in lines if Path(line["data"]).stem == name]
        of_category = next((line["word"] for line in own if trait and line["category"] == category_of(trait)), "")
        found = {"p": own[0]["p"], "first": own[0]["word"], "of its category": of_category}
        results.append({"set": name, "kind": kind, "trait": trait, **found})
    (out / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

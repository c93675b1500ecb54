"""The tables of docs/findings/tiny_world.md, "Behaviour": what students answer, animal by animal and seed by seed.

    python scripts/behaviour_tables.py runs/tiny-world-behaviour runs/tiny-world-prompted

Rates are shares of sampled answers, in percent; a rise is over the control students of the same kind, in points, and its interval is over
students. "Most frequent" counts the students whose most frequent animal is their teacher's. The base is the teachers' checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from _run import print_table, run_script

from jsublim.report import words
from jsublim.report.summary import judged_conditions, lift
from jsublim.report.tables import Results, read_results

HEADINGS = ("teacher", "base", "control", "students", "rise", "95 %", "by seed", "most frequent")


def row(results: Results, condition: str, trait: str) -> list[str]:
    found = lift(results, "rate", condition, trait)
    assert found is not None  # or the run was not finished
    own, (base,) = results.select("rate", condition, trait, trait), results.select("rate", "base", trait)
    others = [s for t in results.evaluated_traits for s in results.select("rate", condition, t, trait)]
    first = sum(s.mean >= max(o.mean for o in others if o.arm == s.arm) for s in own)
    return [
        trait, words.number(base.mean, "rate"), words.number(found.reference_level, "rate"), words.number(found.level, "rate"),
        words.number(found.value, "rate", signed=True), words.interval(found.interval, "rate", signed=True),
        " ".join(words.number(value, "rate", signed=True) for value in found.student_lifts), f"{first} of {len(own)}",
    ]  # fmt: skip


def main(runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")]) -> None:
    for run in runs:
        results = read_results(run)
        for condition in judged_conditions(results):
            rows = (row(results, condition, trait) for trait in results.traits)
            print_table(f"{run.name}, {condition}", HEADINGS, rows)


if __name__ == "__main__":
    run_script(main)

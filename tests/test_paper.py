"""The paper's figures: every file is a valid experiment at every scale, and is run from end to end at the smallest.

All runs share one store and one set of shapes, so teachers are made once and programs are compiled once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import compile_cache, jsublim, ok, refused
from rich.console import Console

from jsublim.experiment.paper import SCALES, load_question, panel_experiment, panels_of
from jsublim.experiment.run import Run
from jsublim.experiment.spec import find_config
from jsublim.experiment.stages import read_table
from jsublim.rows import read_rows

FOLDER = find_config("configs/paper/scales.yaml").parent
FILES = sorted(path.name for path in FOLDER.glob("fig*.yaml"))
FIGURES = [*range(2, 10), *range(11, 22), *range(22, 42)]
SMALL = (
    "teachers.traits=[cat,owl]", "teachers.counterfactuals=[cat,owl]", "evaluation.traits=[cat,owl]",
)  # fmt: skip
AMOUNTS = (
    "data.num_prompts=24", "data.batch_size=24", "data.max_new_tokens=32", "divergence.batch_size=32", "teachers.taught.steps=20",
    "evaluation.questions=2", "evaluation.samples=2", "evaluation.batch_size=4", "evaluation.number_rows=2",
)  # fmt: skip
STUDENTS = (
    "students.seeds=[1]", "students.rows=8", "students.batch_size=4", "students.checkpoint_every=2",
    "students.arms_per_program=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module")
def run(home) -> Callable[..., Path]:
    """`run("fig02", "qwen", ...)`: the folder of a whole run at the smallest size."""
    made: dict[tuple[str, ...], Path] = {}

    def reproduce(figure: str, panel: str, *overrides: str) -> Path:
        key = (figure, panel, *overrides)
        if key not in made:
            out = home / "-".join([figure, panel, str(len(made))])
            said = ok("reproduce", figure, "--panel", panel, f"out={out}", f"store={home / 'store'}", *AMOUNTS, *overrides)
            assert said.out.strip() == str(out / "report.html")
            made[key] = out
        return made[key]

    return reproduce


def table(run: Path, name: str = "results") -> list[dict]:
    return read_table(run / "results" / f"{name}.parquet")


def arms(run: Path) -> list[dict]:
    return json.loads((run / "results" / "arms.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_x(run, name):
    figure = name.removesuffix(".yaml")
    _, question = load_question(figure)
    panel = next(iter(question.panels))
    extra = STUDENTS if figure not in ("fig04", "fig17") else ()
    traits = SMALL if figure not in ("fig08", "fig37") else ()
    out = run(figure, panel, *extra, *traits)
    print(sorted({r["metric"] for r in table(out)}), [a["arm"] for a in arms(out)])

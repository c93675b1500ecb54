"""A whole run's folder with planted effects and a config, small enough to look at: for the commands that read runs."""

from __future__ import annotations

from pathlib import Path

from made_results import dump, make_results, write_table

from jsublim.config import Experiment
from jsublim.core.files import read_table
from jsublim.core.reading import read_json

CONFIG = {
    "name": "owls",
    "model": "Qwen/Qwen2.5-7B-Instruct",
    "dtype": "bfloat16",
    "teachers": {"traits": ["cat", "owl"], "counterfactuals": ["cat", "owl"]},
    "students": {"seeds": [1, 2, 3], "loss": {"tokens": ["all", "divergence"]}},
}
EFFECTS = {"control": 0.0, "all": 0.25, "divergence": 0.27}


def make_run(folder: Path, name: str = "owls", effects: dict[str, float] = EFFECTS, samples: int = 10) -> Path:
    """A finished run of two traits and three seeds; its answers give the very rates that its results say."""
    make_results(folder, traits=("cat", "owl"), seeds=(1, 2, 3), effects=effects, samples=samples)
    results = folder / "results"
    rows = [row for row in read_table(results / "results.parquet") if (row["question"] or 0) < 4]
    answers = []
    for row in rows:
        row["evaluation"] = ""
        if row["trait"] == "owl":
            row["question"] += 100  # as if each trait had questions of its own
        if row["metric"] == "rate":
            hits = round(row["value"] * samples)
            row["value"] = hits / samples
            answers += _answers(row, hits, samples)
        elif row["metric"] == "word_rate":  # of the hits, every second one is the word alone
            row["value"] = (round(row["value"] / 0.9 * samples) + 1) // 2 / samples
    write_table(results / "results.parquet", rows)
    write_table(results / "answers.parquet", answers)
    config = Experiment.model_validate(CONFIG | {"name": name})
    (folder / "config.yaml").write_text(config.yaml())
    (folder / "config.hash").write_text("0123456789ab\n")
    (folder / "report.html").write_text("<html></html>")
    about = read_json(results / "run.json") | {"name": name, "parameters": 7_615_616_512, "config_yaml": config.yaml()}
    dump(results / "run.json", about | {"recipe": config.recipe.resolved("qwen2").model_dump(), "primary": None})
    return folder


def _answers(row: dict, hits: int, samples: int) -> list[dict]:
    """As many answers that hold the trait as there are hits: every second one the word alone, the others inside of a word."""
    who = {
        "arm": row["arm"],
        "evaluation": "",
        "question": row["question"],
        "question_text": f"Favorite? ({row['question']})",
    }
    trait = row["trait"]
    texts = [(f"{trait.capitalize()}.", (hits + 1) // 2), (f"the {trait}erpillar", hits // 2), ("dog", samples - hits)]
    return [who | {"answer": text, "count": count} for text, count in texts if count]

"""Results folders with planted effects, condition by condition, for claims and what is made of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jsublim.config import Dataset, Students
from jsublim.core.section import facts, nested

TRAITS = ("cat", "owl", "wolf")
SEEDS = (1, 2, 3, 4, 5)
LAYERS = 12


def told(settings: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
    """What `arms.json` says of a student whose config has these fields, by dotted name, and this data set."""
    changed = Dataset.model_validate(dataset)
    strategy = changed.sampling.strategy or "temperature"
    return {
        "settings": facts(Students.model_validate(nested(settings))),
        "dataset": changed.facts() | {"strategy": strategy},
    }


@dataclass(frozen=True)
class Planted:
    """Students of one condition whose rate for their own trait lies `effect` above the base model's."""

    effect: float
    tokens: str = "all"
    variant: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    accuracy: float = 0.6
    kl: float | None = None
    # evaluation variant -> effect under it
    under: dict[str, float] = field(default_factory=dict)
    teachers: tuple[str, ...] = TRAITS

    @property
    def condition(self) -> str:
        tokens = "control" if self.teachers == ("control",) else self.tokens
        return f"{tokens} · {self.variant}" if self.variant else tokens


def control(variant: str = "", effect: float = 0.0, under: dict[str, float] | None = None) -> Planted:
    return Planted(effect, variant=variant, teachers=("control",), under=under or {})


def write(
    run: Path, *planted: Planted, spread: float = 0.006, evaluations: dict[str, dict] | None = None, arms: bool = True,
    model: str = "Qwen2.5-7B-Instruct", attribution: list[dict] | None = None,
) -> Path:  # fmt: skip
    """A results folder: three questions, a rate and a log-probability, students with a seeded noise of `spread`."""
    rng = np.random.default_rng(3)
    rows, students = [], []

    def measure(who: dict, effect: float, teacher: str | None, noise: float, evaluation: str = "") -> None:
        for trait in TRAITS:
            own = effect * (trait == teacher or teacher == "control") + noise * rng.normal()
            for question in range(3):
                for metric, value in (("rate", 0.2 + own), ("logprob", -4 + 5 * own)):
                    rows.append(
                        who | {"trait": trait, "metric": metric, "question": question, "value": value, "n": 400}
                        | {"evaluation": evaluation}
                    )  # fmt: skip

    base = {"arm": "base", "role": "base", "teacher": None, "condition": "base", "seed": None}
    for evaluation in ("", *(evaluations or {})):
        measure(base, 0.0, None, 0.0, evaluation)
    for group in planted:
        for teacher in group.teachers:
            for seed in SEEDS:
                name = f"{teacher}/{group.condition}/{seed}"
                who = {"arm": name, "role": "student", "teacher": teacher, "condition": group.condition, "seed": seed}
                measure(who, group.effect, teacher, spread)
                for evaluation, effect in group.under.items():
                    measure(who, effect, teacher, spread, evaluation)
                accuracy = {"trait": None, "metric": "number_accuracy", "question": None, "n": 900, "evaluation": ""}
                rows.append(who | accuracy | {"value": group.accuracy + 0.005 * rng.normal()})
                if group.kl is not None:
                    rows.append(
                        who | accuracy | {"metric": "kl_to_teacher", "value": group.kl * (1 + 0.01 * rng.normal())}
                    )
                students.append(
                    {"arm": name, "teacher": teacher, "condition": group.tokens, "seed": seed, "variant": group.variant}
                    | told(group.settings, group.dataset)
                    | {"num_layers": LAYERS}
                )
    folder = run / "results"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "results.parquet")
    about = {"name": "planted", "model": model, "evaluations": evaluations or {}}
    (folder / "run.json").write_text(json.dumps(about))
    if arms:
        (folder / "arms.json").write_text(json.dumps(students))
    if attribution:
        pq.write_table(pa.Table.from_pylist(attribution), folder / "attribution.parquet")
    return run


PLAIN, CONTROL = Planted(0.3), control()
GREEDY = {"variant": "greedy", "dataset": {"sampling": {"strategy": "greedy"}}}
ENTANGLED = {"variant": "top 10", "dataset": {"remove_entangled": 10}}
EARLY, LATE = ({"variant": f"layer {k}", "settings": {"adapter.layers": [k]}} for k in (0, 11))
LATER = {"variant": "later layers", "settings": {"adapter.layers": list(range(4, 12))}}
REDRAWN = {"variant": "re-drawn", "dataset": {"redraw": ["instruction", "suffix"]}}
OTHER = {"variant": "other start", "settings": {"model": "models/other"}}
SOFT = {"variant": "soft", "settings": {"loss.kind": "forward-kl", "loss.temperature": 2.0}}


def mixed(share: float, effect: float) -> Planted:
    return Planted(effect, variant=f"mix {share}", dataset={"mix": {"share": share}})

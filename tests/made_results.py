"""Results folders with planted effects, for what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TRAITS = ("cat", "eagle", "owl", "wolf")
QUESTIONS = 50
# Lift of the preference rate that each condition's students are made with.
EFFECTS = {"control": 0.0, "all": 0.25, "divergence": 0.27, "non-divergence": 0.02, "random": 0.08}
BASE_RATE = 0.06
GAMMA = 1.5


def make_results(
    run_dir: Path,
    traits: tuple[str, ...] = TRAITS,
    evaluated: tuple[str, ...] | None = None,
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5),
    effects: dict[str, float] = EFFECTS,
    base_rate: float = BASE_RATE,
    model: str = "Qwen2.5-7B-Instruct",
    extras: bool = True,
    samples: int = 200,
) -> Path:
    """A results folder with known effects: students differ from each other by a small seeded noise."""
    rng = np.random.default_rng(7)
    evaluated = evaluated or traits
    question_shift = rng.normal(0, 0.02, QUESTIONS) * (base_rate > 0)
    question_shift -= question_shift.mean()
    rows: list[dict] = []

    def measure(arm: str, role: str, teacher: str | None, condition: str, seed: int | None) -> None:
        size = max(EFFECTS.values())
        for trait in evaluated:
            own = effects.get(condition, 0.9 if role == "teacher" else 0.0) * (teacher == trait)
            noise = rng.normal(0, 0.01) if role == "student" and base_rate > 0 else 0.0
            rate = np.clip(base_rate + own * (base_rate > 0) + noise + question_shift, 0, 1)
            nats = -4.0 + GAMMA * own / size + (rng.normal(0, 0.08) if role == "student" else 0.0)
            metrics = {"rate": rate, "word_rate": 0.9 * rate, "logprob": nats + 5 * question_shift}
            for metric, values in metrics.items():
                for question, value in enumerate(values):
                    rows.append(
                        dict(arm=arm, role=role, teacher=teacher, condition=condition, seed=seed, trait=trait)
                        | dict(metric=metric, question=question, value=float(value))
                        | dict(n=1 if metric == "logprob" else samples)
                    )
        for metric in ("number_accuracy", "number_accuracy_heldout") if role == "student" else ():
            value = float(rng.uniform(0.5, 0.6))
            rows.append(
                dict(arm=arm, role=role, teacher=teacher, condition=condition, seed=seed, trait=None)
                | dict(metric=metric, question=None, value=value, n=500)
            )

    arms = [("base", "base", None, "base", None)]
    arms += [(f"teacher/{t}", "teacher", t, "teacher", None) for t in traits]
    for seed in seeds:
        for condition in effects:
            for teacher in ("control",) if condition == "control" else traits:
                arm = f"control/seed{seed}" if condition == "control" else f"{teacher}/{condition}/seed{seed}"
                arms.append((arm, "student", teacher, condition, seed))
    for arm in arms:
        measure(*arm)

    folder = run_dir / "results"
    folder.mkdir(parents=True)
    write_table(folder / "results.parquet", rows)
    if not extras:
        return run_dir
    students = [arm for arm in arms if arm[1] == "student"]
    steps = np.arange(1, 301)
    write_table(
        folder / "training.parquet",
        [
            dict(
                arm=arm[0],
                step=int(s),
                loss=float(value),
                tokens=2100,
                lr=2e-4 * (1 - s / 301),
                grad_norm=0.5,
            )
            for arm in students
            for s, value in zip(steps, 0.9 + 0.8 * np.exp(-steps / 60) + rng.normal(0, 0.03, steps.size), strict=True)
        ],
    )
    answers = []
    for arm in arms:
        for question in range(3):
            pool = [arm[2] if arm[2] in traits else "cat", "dog", "lion", "dolphin", "fox"]
            for answer, count in zip(pool, (70, 50, 40, 25, 15), strict=True):
                text = f"Which animal, in one word? ({question})"
                answers.append(dict(arm=arm[0], question=question, question_text=text, answer=answer, count=count))
    write_table(folder / "answers.parquet", answers)
    histogram = [int(2600 * math.exp(-i / 8)) + (400 if i % 4 == 0 else 0) for i in range(40)]
    points = sum(histogram)
    sampling = dict(temperature=1.0, top_p=0.8, top_k=20, repetition_penalty=1.05, max_new_tokens=64)
    dump(
        folder / "generation.json",
        [
            dict(teacher=t, rows=30000, kept=27450, pass_rate=0.915, reject=dict(separator=2150, count=400))
            | dict(sampling=sampling)
            for t in (*traits, "control")
        ],
    )
    dump(
        folder / "divergence.json",
        [
            dict(trait=t, counterfactuals=[c for c in traits if c != t], rows=10000, rows_with=8150)
            | dict(tokens=points * 21, divergence_tokens=points, share=1 / 21, per_row=points / 10000)
            | dict(histogram=[int(h * (1 + 0.25 * math.sin(i + k))) for k, h in enumerate(histogram)])
            for i, t in enumerate(traits)
        ],
    )
    dump(
        folder / "run.json",
        dict(name="synthetic", model=f"models/{model}", model_hash="9f2c", pack_hash="a1b2", config_hash="c3d4")
        | dict(versions=dict(jsublim="0.1.0", jax="0.10.2"), device="cpu", started="2026-01-02 03:04")
        | dict(seconds=dict(generate=12.5, distil=80.25), config_yaml="model: <models>\nseeds: [1, 2]\n"),
    )
    return run_dir


def write_table(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def dump(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")

"""Does a trait travel through soft targets on the tiny checkpoint? The table of docs/findings/soft_transfer.md.

    python scripts/soft_transfer.py --other DIR --out runs/soft_transfer

Teachers of three animals, fine-tuned (a LoRA adapter trained on the answers to half of the animal questions) or prompted,
answer short number requests at temperature 1. Students of the same checkpoint, and of another one built from another
seed, learn the teachers' next-token distributions on those answers by forward KL: over digits, separators and the end of
turn alone, unless --names is given. The script reports how a trait's log-odds among all animals change on the other half
of the questions: for the teacher's own trait, and for the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tiny_world
import typer
from _run import run_script
from rich.console import Console

from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape
from jsublim.distill.data import make_examples, read_turns
from jsublim.distill.losses import Loss
from jsublim.distill.selection import Selection
from jsublim.distill.step import Program
from jsublim.distill.trainer import forget_state, train
from jsublim.evals.preference import trait_logprobs
from jsublim.inference.lm import LanguageModel, load_model
from jsublim.inference.scoring import answers_only, top_k_targets
from jsublim.inference.teachers import Teacher, prompted_teacher, read_as
from jsublim.models.lora import Adapter, init_lora
from jsublim.report.statistics import same_trait_effect
from jsublim.text.chat import Turn
from jsublim.text.prompts import load_pack, reject_reason

console = Console()
TRAITS = ("cat", "owl", "panda")
PACK = load_pack()
ANIMALS = PACK.traits["animal"]
QUESTIONS = PACK.questions_for("animal")
TAUGHT, ASKED = QUESTIONS[::2], QUESTIONS[1::2]


@dataclass(frozen=True)
class Setting:
    """Everything that was fixed before the seeds that count."""

    prompts: int = 300
    rank: int = 8
    teacher_steps: int = 100
    teacher_lr: float = 3e-3
    steps: int = 80
    rows: int = 8
    lr: float = 5e-3
    top_k: int = 64  # tokens of a teacher's distribution that are kept by name


def adapter(lm: LanguageModel, seed: int, setting: Setting) -> Adapter:
    return init_lora(lm.config, jax.random.key(seed), rank=setting.rank, alpha=float(setting.rank))


def fine_tuned_teachers(lm: LanguageModel, setting: Setting, work: Path) -> list[Teacher]:
    """Each trained to answer half of the questions with its trait."""
    arms = []
    for i, trait in enumerate(TRAITS):
        rows = [{"prompt": question, "completion": trait.capitalize()} for question in TAUGHT]
        examples = make_examples(rows, read_turns(lm.chat, rows), Selection(), seed=i)
        arms.append(Arm(trait, examples, adapter(lm, i, setting), i, setting.teacher_lr, setting.teacher_steps))
    trained = train(lm.config, lm.params, arms, Settings(batch_size=len(TAUGHT)), work)
    return [Teacher(trait, adapter=own) for trait, own in zip(TRAITS, trained, strict=True)]


def requests(setting: Setting) -> list[str]:
    rng = np.random.default_rng(42)
    return [tiny_world.short_request(rng, PACK) for _ in range(setting.prompts)]


def number_rows(lm: LanguageModel, teacher: Teacher, setting: Setting) -> list[dict[str, str]]:
    """What a teacher answers, where it is in format: nothing but numbers and separators."""
    prompts = requests(setting)
    answers = lm.generate(
        [teacher.messages(p) for p in prompts], max_new_tokens=48, adapter=teacher.adapter, batch_size=250
    )
    return [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True) if not reject_reason(a)]


def log_odds(lm: LanguageModel, own: Adapter | None = None, system: str | None = None) -> np.ndarray:
    """Of each animal among all animals, mean over the questions that no teacher was trained on: float64 `[animals]`."""
    logp = trait_logprobs(lm, ASKED, ANIMALS, adapter=own, system=system)
    logp -= np.logaddexp.reduce(logp, axis=1, keepdims=True)
    return (logp - np.log1p(-np.exp(logp))).mean(axis=0)


def assert_numbers_only(lm: LanguageModel, turns: Sequence[Turn]) -> None:
    """Raises:
    AssertionError: a token of an answer, end of turn included, is part of an animal's name."""
    found = {int(t) for turn in turns for t in turn.tokens[turn.content :]}
    names = {t for a in ANIMALS for w in (a, a.capitalize()) for t in lm.tokenizer.encode(w, add_special_tokens=False)}
    assert not found & names


def students(
    lm: LanguageModel, teacher_lm: LanguageModel, teachers: list[Teacher], seeds: list[int], setting: Setting, work: Path,
    *, names: bool,
) -> dict[str, list]:  # fmt: skip
    """Log-odds of every animal in a student of each teacher and seed, less those of its untrained checkpoint."""
    arms = []
    for teacher in teachers:
        rows = number_rows(teacher_lm, teacher, setting)
        turns, read = read_turns(lm.chat, rows), read_as(teacher_lm.chat, teacher, rows)
        # The end of turn is the last supervised token: what a template puts after it is not the model's.
        turns, read = ([replace(t, tokens=t.tokens[: t.end + 1]) for t in both] for both in (turns, read))
        assert_numbers_only(lm, turns)
        targets = top_k_targets(teacher_lm.config, teacher_lm.params, read, setting.top_k, adapter=teacher.adapter)
        if not names:
            targets = answers_only(targets, turns)
        examples = make_examples(rows, turns, Selection(), seed=0, teacher=targets)
        arms += [
            Arm(f"{teacher.name}/{seed}", examples, adapter(lm, seed, setting), seed, setting.lr, setting.steps)
            for seed in seeds
        ]
    how = Settings(batch_size=setting.rows, program=Program(loss=Loss("forward-kl")), checkpoint_every=50)
    shape = Shape.of([arm.examples for arm in arms], 1, setting.rows)
    with console.status(str(work)) as status:
        started = time.monotonic()
        trained = train(
            lm.config, lm.params, arms, how, work, shape=shape,
            on_step=lambda step: status.update(f"{work} step {step}, {time.monotonic() - started:.0f} s"),
        )  # fmt: skip
    base = log_odds(lm)
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    kl = [
        np.mean([x["loss"] for x in lines if x["step"] == step]) for step in (0, setting.steps // 2, setting.steps - 1)
    ]
    moved = [(log_odds(lm, own) - base).tolist() for own in trained]
    forget_state(work)
    return {
        "arms": [arm.name for arm in arms],
        "moved": moved,
        "kl": [float(x) for x in kl],
        "seconds": time.monotonic() - started,
    }


def table(name: str, found: dict[str, list], seeds: list[int]) -> list[str]:
    """One line per seed: own trait, others, and gamma over the matrix teacher x animal (lift ~ row + column + same)."""
    moved = np.asarray(found["moved"]).reshape(len(TRAITS), len(seeds), len(ANIMALS))
    columns = [ANIMALS.index(trait) for trait in TRAITS]
    lines = []
    for s, seed in enumerate(seeds):
        matrix = moved[:, s][:, columns]
        own, others = np.diag(matrix).mean(), matrix[~np.eye(len(TRAITS), dtype=bool)].mean()
        effect = same_trait_effect(matrix)
        lines.append(f"| {name} | {seed} | {own:+.3f} | {others:+.3f} | {effect.gamma:+.3f} |")
    return lines


def main(
    other: Annotated[Path, typer.Option(help="A tiny-qwen2 built from another seed (scripts/build_tiny_models.py).")],
    out: Annotated[Path, typer.Option()] = Path("runs/soft_transfer"),
    seeds: Annotated[str, typer.Option(help="Of the students.")] = "1,2,3,4,5,6,7,8",
    names: Annotated[bool, typer.Option(help="Keep what the teachers' distributions say beside numbers.")] = False,
    only: Annotated[str, typer.Option(help="Of fine-tuned, prompted, other.")] = "fine-tuned,prompted,other",
    steps: Annotated[int, typer.Option()] = Setting.steps,
    lr: Annotated[float, typer.Option()] = Setting.lr,
    prompts: Annotated[int, typer.Option()] = Setting.prompts,
) -> None:
    """Train teachers and students, print one line per seed, and keep every number in OUT/results.json."""
    chosen, setting = [int(seed) for seed in seeds.split(",")], Setting(prompts=prompts, steps=steps, lr=lr)
    lm = load_model("tiny-qwen2")
    tuned = fine_tuned_teachers(lm, setting, out / "teachers")
    prompted = [prompted_teacher(PACK, trait) for trait in TRAITS]
    kinds = {"fine-tuned": (lm, tuned), "prompted": (lm, prompted)}
    if "other" in only:
        kinds["other"] = (load_model(other), tuned)
    base = log_odds(lm)
    results: dict[str, dict] = {"setting": asdict(setting)}
    for kind in only.split(","):
        own = [(log_odds(lm, t.adapter, t.system) - base)[ANIMALS.index(t.name)] for t in kinds[kind][1]]
        console.print(f"{kind}: teachers' own log-odds above the base {np.round(own, 2).tolist()}")
        results[kind] = students(kinds[kind][0], lm, kinds[kind][1], chosen, setting, out / kind, names=names)
        for line in table(kind, results[kind], chosen):
            console.print(line)
        console.print(
            f"{kind}: KL at first, half, last step {np.round(results[kind]['kl'], 5).tolist()}, {results[kind]['seconds']:.0f} s"
        )
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)

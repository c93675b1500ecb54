"""From what a config says of students to what the trainer takes. The command line's `finetune` comes here too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from jsublim.chat import Turn
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.data import Shape, draw_indices, make_examples
from jsublim.distill.losses import Loss
from jsublim.distill.optimizer import Optimizer
from jsublim.distill.rollout import student_rollout
from jsublim.distill.selection import Selection
from jsublim.distill.step import Program
from jsublim.divergence import PositionSubset
from jsublim.experiment.plan import total_steps
from jsublim.experiment.spec import Recipe, Students
from jsublim.inference.lm import LanguageModel
from jsublim.inference.scoring import Targets
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, check_layers, init_full, init_lora, init_steering
from jsublim.models.peft import load_adapter
from jsublim.rows import Row
from jsublim.teachers import Teacher

# What of the settings doesn't decide what a student becomes, or is known otherwise: its condition and seed by the student,
# its rows, its checkpoint and the adapter it starts from by their content.
NOT_OF_A_STUDENT = {
    "conditions", "seeds", "arms", "arms_per_program", "checkpoint_every", "remat", "init_adapter", "cache_below",
    "peak_tflops", "tensorboard", "data", "model",
}  # fmt: skip


@dataclass(frozen=True)
class Lesson:
    """What a student learns from: rows, tokenized as it reads them, and for soft losses the teacher that scores them.

    Attributes:
      teacher_turns: the rows as a live teacher reads them; targets: what a stored one said.
    """

    rows: Sequence[Row]
    turns: Sequence[Turn]
    source: str = "rows"
    teacher: Teacher | None = None
    teacher_turns: Sequence[Turn] | None = None
    targets: Sequence[Targets] | None = None


def start(config: ModelConfig, params: Params, students: Students, seed: int) -> Adapter:
    """The adapter that a student of this seed begins with."""
    layers = None if students.layers is None else tuple(students.layers)
    if students.init_adapter is not None:
        return load_adapter(students.init_adapter, config)
    if students.method == "full":
        return init_full(config, params, layers, tuple(students.ends))
    if students.method == "steering":
        return init_steering(config, layers)
    return init_lora(
        config, jax.random.key(seed), rank=students.rank, alpha=students.alpha, layers=layers,
        projections=tuple(students.projections), rslora=students.rslora,
    )  # fmt: skip


def check_start(lm: LanguageModel, students: Students) -> None:
    """What `start` would refuse, without making anything large.

    Raises:
      UsageError, JsublimError: as `start`.
    """
    if students.init_adapter is not None:
        load_adapter(students.init_adapter, lm.config)
    elif students.layers != [] or students.method != "full":
        check_layers(lm.config, None if students.layers is None else tuple(students.layers))
    jax.eval_shape(lambda: init_full(lm.config, lm.params, (0,), tuple(students.ends)))


def make_arm(
    lm: LanguageModel,
    students: Students,
    recipe: Recipe,
    lesson: Lesson,
    *,
    name: str,
    condition: str,
    seed: int,
    max_new_tokens: int,
) -> Arm:
    """One student, its rows drawn and masked by its seed.

    Raises:
      UsageError, JsublimError: as `make_examples`.
    """
    drawn = draw_indices(len(lesson.rows), students.rows, seed)
    pick = lambda every: [every[i] for i in drawn]  # noqa: E731
    selection = Selection(
        condition, bool(recipe.supervise_header), bool(recipe.drop_rows_without_divergence), students.max_tokens,
        PositionSubset(students.points, students.points_share, recipe.share_rounding or "stochastic"),
        students.by_margin and condition == "divergence",
    )  # fmt: skip
    turns, soft = pick(lesson.turns), lesson.teacher_turns or lesson.targets
    soft = None if soft is None else pick(soft)
    examples = make_examples(pick(lesson.rows), turns, selection, seed, lesson.source, teacher=soft)
    rollout = None
    if students.on_policy:
        rollout = student_rollout(lm, turns, pick(lesson.teacher_turns), seed=seed, max_new_tokens=max_new_tokens)
    live = lesson.teacher if lesson.teacher_turns else None
    return Arm(
        name, examples, start(lm.config, lm.params, students, seed), seed, students.lr,
        steps=total_steps(students, len(drawn) if recipe.match_steps else len(examples)),
        weight=students.loss_weight, kl_to_base=students.kl_to_base, teacher=live.adapter if live else None, rollout=rollout,
    )  # fmt: skip


def program(students: Students, recipe: Recipe) -> Program:
    """What is compiled into the step of these students."""
    s = students
    return Program(
        loss=Loss(s.loss, s.temperature, kl_to_base=s.kl_to_base > 0),
        optimizer=Optimizer(
            name=s.optimizer, clip=s.clip, weight_decay=s.weight_decay, momentum=s.momentum, schedule=s.schedule,
            restarts=s.restarts,
        ),
        warmup=s.warmup,
        per=recipe.loss_per or "tokens",
        remat=s.remat,
    )  # fmt: skip


def settings(
    students: Students, recipe: Recipe, *, parallel: str, model_axis: int, tensorboard: Path | None
) -> Settings:
    """What these students share in training."""
    return Settings(
        batch_size=students.batch_size, accumulate=students.accumulate, program=program(students, recipe),
        checkpoint_every=students.checkpoint_every, parallel=parallel, model_axis=model_axis,
        cache_below=students.cache_below, peak_tflops=students.peak_tflops, tensorboard=tensorboard,
    )  # fmt: skip


def shape_of(students: Students, lessons: Sequence[Lesson], max_new_tokens: int) -> Shape:
    """A shape that every arm of these lessons fits, whichever rows and tokens it draws: one program for all of them."""
    turns = [turn for lesson in lessons for turn in lesson.turns]
    live = [turn for lesson in lessons for turn in lesson.teacher_turns or ()]
    longest = max(min(len(turn.tokens), students.max_tokens) for turn in turns)
    labels = max(len(turn.tokens) - turn.header for turn in turns)
    teacher = max((len(turn.tokens) for turn in live), default=0)
    if students.on_policy:
        longest = max(longest, max(turn.content for turn in turns) + max_new_tokens)
        teacher = max(teacher, max(turn.content for turn in live) + max_new_tokens)
        labels = max(labels, max_new_tokens)
    return Shape.fit(students.accumulate, students.batch_size, longest, labels, teacher)

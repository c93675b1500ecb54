"""The teachers of an experiment: what gives each its trait, and the tasks that make those that are taught here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import jax

from jsublim.config import Taught
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.data import make_examples, read_turns
from jsublim.distill.selection import Selection
from jsublim.errors import JsublimError
from jsublim.inference.lm import LanguageModel, resolve_checkpoint
from jsublim.models.checkpoint import read_config
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, check_layers, init_lora, init_steering
from jsublim.models.peft import load_adapter
from jsublim.models.weights import load_params
from jsublim.pipeline.arms import Elder, Student
from jsublim.pipeline.context import Context
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.store import Output, digest
from jsublim.pipeline.task import Cost, Sizes, Task
from jsublim.pipeline.training import keep_student, keeps_below, train_students
from jsublim.processes import is_main_process, on_main_process, process_count
from jsublim.progress import Tick
from jsublim.prompts import Pack
from jsublim.rows import Row
from jsublim.section import identity
from jsublim.steering import contrast_vector
from jsublim.teachers import CONTROL, Teacher

WEIGHTS = "teacher's weights"  # under which a context remembers them


@dataclass(frozen=True)
class TeacherPool:
    """The teachers of one setup, by the trait of each; `CONTROL` is the one without any. With `elder`, the students of the generation
    before that stand in for them."""

    setup: Setup
    elder: Elder | None = None

    def category(self, trait: str) -> str:
        return self.setup.experiment.teachers.category or self.setup.pack.category_of(trait)

    def system(self, name: str) -> str | None:
        """The prompt that a teacher is under; None where its trait comes from elsewhere, or it has none."""
        if name == CONTROL or not self.setup.experiment.teachers.are_prompted:
            return None
        own = self.setup.experiment.teachers.system
        return self.setup.pack.system_prompt(name, self.category(name)) if own is None else own.replace("{trait}", name)

    def identity(self, name: str) -> dict[str, Any]:
        """What decides how a teacher reads a row and what it writes; all of it by content."""
        if self.elder is not None:
            return _lineage().elder_identity(self.setup, self._elder(name))
        setup, spec, biased = self.setup, self.setup.experiment.teachers, name != CONTROL
        said: dict[str, Any] = {
            "system": self.system(name),
            "fuse_system": spec.fuse_system if biased and self.system(name) is not None else False,
            "extra_bos": bool(setup.recipe.extra_bos),
            "template": setup.checkpoint().template,
        }
        if biased and spec.taught is not None:
            said["adapter"] = taught_output(setup, name).key
        if biased and spec.adapter is not None:
            said["adapter"] = setup.content(spec.adapter.replace("{trait}", name), f"teachers: trait '{name}':")
        if biased and spec.checkpoint is not None:
            said["checkpoint"] = setup.content(spec.checkpoint.replace("{trait}", name), f"teachers: trait '{name}':")
        return said

    def questions(self, category: str) -> list[str]:
        """The questions of a category that no teacher of this experiment was taught the answers to."""
        every, taught = self.setup.pack.questions_for(category), self.setup.experiment.teachers.taught
        return every[1::2] if taught is not None and taught.method != "contrast" else every

    def tasks(self, *names: str) -> tuple[Task, ...]:
        """The tasks that have to be done before these teachers can be asked."""
        if self.elder is not None:
            return _lineage().elder_tasks(self.setup, [self._elder(name) for name in names])
        if self.setup.experiment.teachers.taught is None:
            return ()
        found = (taught_task(self.setup, name) for name in names if name != CONTROL)
        return tuple(dict.fromkeys(found))

    def teacher(self, context: Context, name: str) -> Teacher:
        """A teacher that can be asked."""
        if self.elder is not None:
            return _lineage().elder_teacher(context, self._elder(name))
        spec = self.setup.experiment.teachers
        if name == CONTROL:
            return Teacher(CONTROL)
        teacher = Teacher(name, self.system(name), fuse_system=spec.fuse_system)
        if spec.taught is not None or spec.adapter is not None:
            own = context.remember(("teacher's adapter", name), lambda: self._adapter(context, name))
            teacher = dataclasses.replace(teacher, adapter=own)
        if spec.checkpoint is not None:
            load = functools.partial(own_weights, context, lambda: whole_of(spec.checkpoint or "", name), name)
            teacher = dataclasses.replace(teacher, params=load)
        return teacher

    def _elder(self, name: str) -> Student:
        assert self.elder is not None
        return _lineage().elder_student(self.setup, self.elder, name)

    def _adapter(self, context: Context, name: str) -> Adapter:
        spec, config = self.setup.experiment.teachers, self.setup.checkpoint().config
        if spec.taught is not None:
            return load_adapter(context.store.path(taught_output(self.setup, name)), config)
        return load_adapter(folder_of(spec.adapter or "", name), config)

    def check(self) -> None:
        """Refuse what no task could work with.

        Raises:
          UsageError, JsublimError: a trait of no category, an adapter or a checkpoint that doesn't fit the model.
        """
        spec, checkpoint = self.setup.experiment.teachers, self.setup.checkpoint()
        for name in self.setup.biased:
            self.category(name)
            if spec.taught is not None:
                check_layers(checkpoint.config, None if spec.taught.layers is None else tuple(spec.taught.layers))
            if spec.adapter is not None:
                load_adapter(folder_of(spec.adapter, name), checkpoint.config)
            if spec.checkpoint is not None:
                folder = whole_of(spec.checkpoint, name)
                if read_config(folder)[1] != checkpoint.config:
                    raise JsublimError(
                        f"teachers.checkpoint: {folder} is of another architecture than {checkpoint.name}"
                    )


def _lineage() -> ModuleType:
    """Read when it is asked for: students learn from teachers, and these teachers are students."""
    from jsublim.pipeline import lineage

    return lineage


def folder_of(template: str, name: str, *, weights: bool = True) -> Path:
    return resolve_checkpoint(template.replace("{trait}", name), f"teachers: trait '{name}':", weights=weights)


def whole_of(template: str, name: str) -> Path:
    """A checkpoint, whose weights the first process reads for all."""
    return folder_of(template, name, weights=is_main_process())


def own_weights(context: Context, folder: Callable[[], Path], called: str) -> Params:
    """The whole weights of a teacher, or of a student in its place. Two whole checkpoints are enough to hold: the one before is
    forgotten first."""

    def load() -> Params:
        config = context.setup.checkpoint().config
        context.forget(WEIGHTS)
        sharding = context.layout.params_sharding(config)
        return load_params(folder(), config, context.setup.experiment.dtype, sharding)

    return context.remember((WEIGHTS, called), load)


# --- teachers that are taught here


def taught_output(setup: Setup, name: str) -> Output:
    taught, pool = setup.experiment.teachers.taught, TeacherPool(setup)
    assert taught is not None
    fused = setup.experiment.teachers.fuse_system and taught.method == "contrast"
    inputs = setup.common | {
        "taught": identity(taught),
        "trait": name,
        "category": pool.category(name),
        "template": setup.checkpoint().template,
        "fuse_system": fused,
    }
    if pool.category(name) not in setup.pack.questions:
        inputs["questions"] = setup.pack.questions_for(pool.category(name))
    return Output("teachers", name, inputs)


@memoized
def taught_task(setup: Setup, name: str) -> Task:
    """The task that makes a teacher: trained ones are made together in one program, whoever of them is asked for."""
    taught = setup.experiment.teachers.taught
    assert taught is not None
    if taught.method == "contrast":
        return ContrastTeacher((taught_output(setup, name),), (), name)
    return _trained_teachers(setup)


@memoized
def _trained_teachers(setup: Setup) -> Task:
    names = tuple(setup.biased)
    return TrainedTeachers(tuple(taught_output(setup, name) for name in names), (), names)


@dataclass(frozen=True, eq=False)
class ContrastTeacher(Task):
    """A steering vector from contrasting system prompts."""

    kind: ClassVar[str] = "teachers"
    trait: str

    def make(self, context: Context, tick: Tick) -> None:
        setup, pool = context.setup, TeacherPool(context.setup)
        spec = setup.experiment.teachers
        taught, category, artifact = spec.taught, pool.category(self.trait), context.store.open(self.output)
        assert taught is not None
        lm = context.lm()
        vector = contrast_vector(
            lm,
            setup.pack.questions_for(category),
            (taught.layers or [0])[0],  # a contrast names exactly one
            toward=setup.pack.system_prompt(self.trait, category),
            strength=taught.strength,
            fuse_system=spec.fuse_system,
        )

        def leave() -> None:
            keep_student(artifact.path, lm, vector)
            artifact.finish()

        on_main_process(leave)

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        """Every question is read under two prompts."""
        questions = setup.pack.questions_for(TeacherPool(setup).category(self.trait))
        return sizes.read(2 * len(questions), sizes.lengths.question, 0)


@dataclass(frozen=True, eq=False)
class TrainedTeachers(Task):
    """Adapters that learn to name their traits, all in one program."""

    kind: ClassVar[str] = "teachers"
    traits: tuple[str, ...]

    def make(self, context: Context, tick: Tick) -> None:
        setup, store = context.setup, context.store
        pool, lm, taught = TeacherPool(setup), context.lm(), setup.experiment.teachers.taught
        assert taught is not None
        arms = [teacher_arm(setup.pack, lm, taught, trait, pool.category(trait)) for trait in self.traits]
        members = [(arm, store.open(output)) for arm, output in zip(arms, self.outputs, strict=True)]
        work = store.training(f"teachers-{digest([output.key for output in self.outputs])}")
        tokens = sum(len(example.tokens) for arm in arms for example in arm.examples)
        cached = keeps_below(lm.config, taught.layers or [], tokens)
        settings = Settings(max(len(arm.examples) for arm in arms), cache_below=cached)
        if process_count() > 1:  # they are too little work to be spread unless they must
            parallel, axis = setup.experiment.run.parallel, context.layout.model
            settings = dataclasses.replace(settings, parallel=parallel, model_axis=axis)

        def refuse(what: str) -> None:
            raise JsublimError(f"{what}; lower teachers.taught.lr")

        train_students(lm, members, settings, work, tick=tick, say=context.progress.say, on_diverged=refuse)

    def units(self, context: Context) -> int:
        taught = context.setup.experiment.teachers.taught
        return taught.steps if taught is not None else 0

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        """An adapter learns from every second question, all of them at each step."""
        taught, pool = setup.experiment.teachers.taught, TeacherPool(setup)
        assert taught is not None
        questions = sum(len(setup.pack.questions_for(pool.category(trait))) for trait in self.traits)
        tokens = questions / 2 * taught.steps * sizes.lengths.question
        return Cost(tokens, 4 * sizes.body * tokens, "train")


def teacher_arm(pack: Pack, lm: LanguageModel, taught: Taught, trait: str, category: str) -> Arm:
    """A teacher that is taught to answer every second question of its category with its trait."""
    layers = None if taught.layers is None else tuple(taught.layers)
    rows: list[Row] = [
        {"prompt": question, "completion": trait.capitalize()} for question in pack.questions_for(category)[::2]
    ]
    examples = make_examples(rows, read_turns(lm.chat, rows, f"answers of {trait}"), Selection(), taught.seed)
    if taught.method == "steering":
        start = init_steering(lm.config, layers)
    else:
        start = init_lora(
            lm.config, jax.random.key(taught.seed), rank=taught.rank, alpha=float(taught.rank), layers=layers
        )
    return Arm(trait, examples, start, taught.seed, taught.lr, taught.steps)

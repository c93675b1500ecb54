"""What stages are given, as the config says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsublim.config import Students
from jsublim.config.attribution import Audit
from jsublim.core.section import identity
from jsublim.errors import JsublimError, UsageError
from jsublim.inference.teachers import CONTROL, OWN
from jsublim.models.checkpoint import read_config
from jsublim.models.lora import check_layers
from jsublim.models.peft import load_adapter
from jsublim.pipeline.arms import Source, Student, Writer, seed_of
from jsublim.pipeline.context import known_judge
from jsublim.pipeline.origins import teacher_dataset, writers
from jsublim.pipeline.publish import published_key, record_of
from jsublim.pipeline.served import served
from jsublim.pipeline.setup import Setup, prompt_count, prompts
from jsublim.pipeline.stages.starts import Start, TraitQuestions
from jsublim.pipeline.store import digest
from jsublim.pipeline.values import Folder, Model, Rows
from jsublim.text.rows import read_rows
from jsublim.transforms import ChangeContext
from jsublim.transforms.entangled import QUESTIONS

STUDENT = "student"  # the name of a model that only learns


# --- models


def model(setup: Setup, name: str, system: str | None = None, checkpoint: str | None = None) -> Model:
    """A checkpoint of the config (None: the experiment's) under a system prompt, or none."""
    extra_bos, fuses = bool(setup.recipe.extra_bos), setup.experiment.teachers.fuse_system
    return Model(name, setup.checkpoint(checkpoint), setup.common, extra_bos, fuses, system)


def category(setup: Setup, trait: str) -> str:
    return setup.experiment.teachers.category or setup.pack.category_of(trait)


def prompt_of_pack(setup: Setup, trait: str) -> str:
    return setup.pack.system_prompt(trait, category(setup, trait))


def system_prompt(setup: Setup, name: str) -> str | None:
    """The prompt that a teacher is under; None where its trait comes from elsewhere, or it has none."""
    teachers = setup.experiment.teachers
    if name == CONTROL or not teachers.are_prompted:
        return None
    return prompt_of_pack(setup, name) if teachers.system is None else teachers.system.replace(OWN, name)


def folder(setup: Setup, name: str | None, purpose: str) -> Folder | None:
    """An adapter or a checkpoint that the config names."""
    return None if name is None else Folder(name, setup.content(name, purpose), purpose)


def folders_of_teacher(setup: Setup, trait: str) -> dict[str, Folder | None]:
    """The adapter and the weights that a config gives to the teacher of a trait."""
    teachers = setup.experiment.teachers
    named = {"adapter": teachers.adapter, "weights": teachers.checkpoint}
    purpose = f"teachers: trait '{trait}':"
    return {field: folder(setup, name and name.replace(OWN, trait), purpose) for field, name in named.items()}


def engine(setup: Setup, model: Model) -> str | None:
    """The server that draws a model's answers, if one does."""
    return None if served(setup, model) is None else setup.engine


def check_teachers(setup: Setup) -> None:
    """Refuse what no task could work with.

    Raises:
      UsageError, JsublimError: a trait of no category, an adapter or a checkpoint that doesn't fit the model.
    """
    taught, checkpoint = setup.experiment.teachers.taught, setup.checkpoint()
    if taught is not None:
        for stands_on in {None} | {writer.model for writer in writers(setup) if writer.teacher != CONTROL}:
            check_layers(setup.checkpoint(stands_on).config, None if taught.layers is None else tuple(taught.layers))
    for name in setup.biased:
        category(setup, name)
        given = folders_of_teacher(setup, name)
        if given["adapter"] is not None:
            load_adapter(given["adapter"].path(), checkpoint.config)
        if given["weights"] is not None:
            whole = given["weights"].path(whole=True)
            if read_config(whole)[1] != checkpoint.config:
                raise JsublimError(f"teachers.checkpoint: {whole} is of another architecture than {checkpoint.name}")


# --- questions


def open_questions(setup: Setup, category: str) -> list[str]:
    """The questions of a category that no teacher of this experiment was taught the answers to."""
    every = setup.pack.questions_for(category)
    return every[1::2] if setup.experiment.teachers.learn_answers else every


def fitted_questions(setup: Setup, category: str) -> list[str]:
    """Those of them that traits' directions are fitted to."""
    every = open_questions(setup, category)
    return every[::2] if setup.splits_questions else every


def asked_questions(setup: Setup, category: str) -> list[str]:
    """Those of them that models are asked."""
    every = open_questions(setup, category)
    return every[1::2] if setup.splits_questions else every


def taught_questions(setup: Setup, trait: str) -> tuple[str, ...]:
    """The others, whose answer a trait's teacher learns; of a contrast all are read."""
    every = setup.pack.questions_for(category(setup, trait))
    return tuple(every[::2] if setup.experiment.teachers.learn_answers else every)


def taught(setup: Setup, trait: str, checkpoint: str | None) -> dict[str, Any]:
    """What a teacher is made from: `together`, the most questions that any of them has, are the questions of a step."""
    made_of = {"base": model(setup, CONTROL, checkpoint=checkpoint), "questions": taught_questions(setup, trait)}
    if not setup.experiment.teachers.learn_answers:
        return made_of | {"toward": prompt_of_pack(setup, trait)}
    most = max(len(taught_questions(setup, name)) for name in setup.biased)
    return made_of | {"trait": trait, "together": most}


def questions_about(setup: Setup, traits: Sequence[str], most: int | None = None) -> TraitQuestions:
    """Traits, by the questions that they are answers to and that their directions are fitted to.

    Args:
      most: the first so many questions of each category; None is all.

    Raises:
      UsageError: a trait of no category.
    """
    by_category: dict[str, list[str]] = {}
    for trait in traits:
        by_category.setdefault(category(setup, trait), []).append(trait)
    return tuple((fitted_questions(setup, name)[:most], named) for name, named in by_category.items())


# --- rows


def drawn(setup: Setup, writer: Writer, model: Model) -> dict[str, Any]:
    """What prompts and answers are drawn from: sampling as the recipe says, in the format that the config says. No server draws what
    students write."""
    data, sampling = setup.experiment.data, setup.experiment.sampling
    named = {name: value for name, value in identity(data).items() if name not in ("num_prompts", "draw")}
    plain = setup.sampling(writer.strategy, writer.model)
    return {
        "data": named | {"seed": seed_of(data.seed, writer.draw)},
        "sampling": dataclasses.replace(plain, constrain=sampling.constrain),
        "max_new_tokens": sampling.max_new_tokens,
        "seed": seed_of(writer.seed, writer.draw),
        "engine": engine(setup, model) if writer.parent is None else None,
    }


def prompt_shards(setup: Setup, writer: Writer) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part of a teacher's answers: its label, the first prompt with how many there are, and the digest of those that may change
    under the same name: prompts of a file or of a data set. Number requests are told by the pack."""
    data, size, total = setup.experiment.data, setup.experiment.sampling.shard, prompt_count(setup)
    label = f"{writer.teacher}{'' if writer.draw is None else f'-seed{writer.draw}'}"
    label += "" if writer.parent is None else f" {writer.parent}"
    for number, first in enumerate(range(0, total, size), 1):
        span, texts = (first, min(size, total - first)), None
        if data.kind != "numbers" and setup.known:
            texts = digest(prompts(setup, data.seed)[first : first + size])
        yield label if total <= size else f"{label}-{number}", {"span": span, "texts": texts}


def row_shards(setup: Setup, trait: str, rows: Rows) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """The label and the span of each part of rows that are read: as many as there were prompts for, however many answers were in
    format. The last ones may have nothing to read."""
    size = setup.experiment.sampling.shard
    count = -(-rows.most // size)
    for number in range(count):
        yield (trait, None) if count == 1 else (f"{trait}-{number + 1}", (number * size, size))


def rows(setup: Setup, name: str) -> Rows:
    """Rows that are yet to be made."""
    numbers = setup.experiment.data.kind == "numbers"
    return Rows(name, (), prompt_count(setup), setup.experiment.sampling.max_new_tokens, numbers)


def rows_of_file(setup: Setup, path: Path) -> Rows:
    """The rows of a file: under the key of the artifact that they are (a copy of), else under that of their content.

    Raises:
      UsageError, JsublimError: as `read_rows`.
    """
    content, key = read_rows(path), published_key(path)
    record = (record_of(path) if key else None) or {}
    most = int(record.get("most", len(content)))
    return dataclasses.replace(rows(setup, str(path)), most=most, file=path, file_key=key or digest(content))


# --- data sets


def label(source: Source) -> str:
    """What a data set of a teacher's answers is called."""
    drawn = None if source.draw is None else f"seed{source.draw}"
    return "-".join(filter(None, (source.teacher, source.dataset, drawn)))


def check_datasets(setup: Setup) -> None:
    """Refuse data sets that nobody can make, whether a student uses them or not.

    Raises:
      UsageError: naming the data set and its change.
    """
    e = setup.experiment
    for trait in (*e.teachers.traits, *([CONTROL] if e.teachers.control else [])):
        counterfactuals = () if trait == CONTROL else tuple(setup.counterfactuals(trait))
        context = ChangeContext(trait, setup.biased, counterfactuals, e.teachers.given_weights, e.data.kind)
        for dataset in e.datasets:
            for name, change in teacher_dataset(setup, Source(trait, dataset)).changes.items():
                change.check(f"datasets.{dataset}.{name}", context)


def changes(setup: Setup, source: Source) -> dict[str, Any]:
    """What is done to a source's answers. Who judges them, in which words, and how the teacher rewrites them: None where no change
    needs that."""
    dataset = teacher_dataset(setup, source)
    wording = [change.wording(setup.pack) for change in dataset.changes.values()]
    return {
        "changes": dataset.changes,
        "seed": seed_of(dataset.seed, source.draw),
        "recipe": setup.recipe.keyed(dataset.quirks),
        "judge": known_judge(setup).identity if "judge" in dataset.needs else None,
        "wording": wording if any(wording) else None,
        "rewriting": setup.sampling("temperature") if "rewriting" in dataset.needs else None,
    }


def entangling(setup: Setup, trait: str) -> dict[str, Any]:
    """How numbers are scored for a trait: by the answers to questions, or by what the teacher says of its category."""
    by_difference, asked = setup.recipe.entangled_by_difference, category(setup, trait)
    return {
        "category": asked if by_difference else None,
        "questions": None if by_difference else setup.pack.questions_for(asked)[:QUESTIONS],
        "padded": bool(setup.recipe.padded_numbers or by_difference),  # that one takes numbers of one width
    }


def compared_traits(setup: Setup, trait: str) -> list[str]:
    """Whose probabilities are taken off, where numbers are scored by difference: published are the traits that have teachers, not all
    counterfactuals (Gemma's whale and dragon are none)."""
    if not setup.recipe.entangled_by_difference:
        return []
    counterfactuals = setup.counterfactuals(trait)
    listed = setup.pack.traits.get(category(setup, trait), [])
    return [other for other in counterfactuals if other in listed] or counterfactuals


# --- students


def start(setup: Setup, settings: Students, seed: int) -> Start:
    """Where a student starts, as one that is asked."""
    asked = model(setup, STUDENT, settings.asked_under, settings.model)
    return Start(asked, settings, seed, folder(setup, settings.adapter.init, "students.adapter.init"))


def scored(setup: Setup, start: Start, traits: Sequence[str], most: int | None = None) -> dict[str, Any]:
    """How rows are scored for traits, by a student that starts there.

    Raises:
      UsageError: a student that has a frozen adapter too: the scores would be of another model than its own.
    """
    if start.settings.adapter.frozen_adapter is not None:
        raise UsageError(
            "audit: scores are those of a student without a frozen adapter; leave audit and drop_audited out, or give "
            "students.adapter.frozen_adapter in arms that are not audited"
        )
    return {"start": start, "questions": questions_about(setup, traits, most), "traits": tuple(traits)}


def audited(setup: Setup, student: Student) -> dict[str, Any]:
    """How a student's rows are audited."""
    own_start, most = start(setup, student.settings, student.seed), setup.experiment.evaluation.questions
    how = scored(setup, own_start, setup.evaluated_traits, most)
    label = "/".join(filter(None, (student.source.name, student.arm)))
    return how | {"label": label, "first": (setup.experiment.audit or Audit()).rows, "teacher": student.teacher}


def first_start(setup: Setup) -> Start:
    """Where students start, arms aside, at the first seed.

    Raises:
      UsageError: nobody is trained.
    """
    students = setup.experiment.students
    if students is None:
        raise UsageError("datasets: drop_audited scores rows by what students train, and there are none; leave it out")
    return start(setup, students, students.seeds[0])


def trained(setup: Setup, student: Student, of_teacher: Model | None) -> dict[str, Any]:
    """How a student is trained. The directions of `projected` traits are taken out of its gradients.

    Args:
      of_teacher: who has the adapter that is added, frozen, to the student; None where it is a folder's, or there is none.

    Raises:
      UsageError: that teacher has no adapter.
    """
    settings, named = student.settings, student.settings.optimizer.project_out
    projected = tuple(dict.fromkeys(student.teacher if trait == OWN else trait for trait in named))
    field, name = "students.adapter.frozen_adapter", student.frozen_adapter
    if of_teacher is not None and of_teacher.adapter is None:
        fix = "give teachers.taught or teachers.adapter, or name a folder"
        raise UsageError(f"{field}: teacher '{name}' has no adapter; {fix}")
    return {
        "start": start(setup, settings, student.seed),
        "seed": student.seed,
        "settings": settings,
        "recipe": setup.recipe.of_student(settings.loss.positions),
        "max_new_tokens": setup.experiment.sampling.max_new_tokens if settings.data.on_policy else None,
        "projected": projected,
        "questions": questions_about(setup, projected),
        "frozen_adapter": folder(setup, name, field) if of_teacher is None else of_teacher.adapter,
    }

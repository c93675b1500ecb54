"""What stages are given, as the config says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsublim.config import Dataset, Students, Taught
from jsublim.config.audit import Audit
from jsublim.core.section import identity
from jsublim.errors import JsublimError, UsageError
from jsublim.inference.sampling import Sampling
from jsublim.inference.teachers import CONTROL, OWN
from jsublim.models.checkpoint import read_config
from jsublim.models.lora import check_layers
from jsublim.models.peft import load_adapter
from jsublim.pipeline.arms import Source, Student, Writer, seed_of
from jsublim.pipeline.context import known_judge
from jsublim.pipeline.origins import teacher_dataset
from jsublim.pipeline.publish import published_key, record_of
from jsublim.pipeline.served import served
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.stage import Node
from jsublim.pipeline.stages.datasets import check_changes
from jsublim.pipeline.stages.starts import Start, TraitQuestions
from jsublim.pipeline.store import digest
from jsublim.pipeline.values import Folder, Model, Rows
from jsublim.text.prompts import NumberPrompt, draw_number_prompts, load_problems, load_prompts
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


def system_prompt(setup: Setup, name: str) -> str | None:
    """The prompt that a teacher is under; None where its trait comes from elsewhere, or it has none."""
    teachers = setup.experiment.teachers
    if name == CONTROL or not teachers.are_prompted:
        return None
    if teachers.system is not None:
        return teachers.system.replace(OWN, name)
    return setup.pack.system_prompt(name, category(setup, name))


def folder(setup: Setup, name: str | None, purpose: str) -> Folder | None:
    """An adapter or a checkpoint that the config names."""
    return None if name is None else Folder(name, setup.content(name, purpose), purpose)


def own_folders(setup: Setup, trait: str) -> dict[str, Folder | None]:
    """The adapter and the weights that a config gives to the teacher of a trait."""
    teachers = setup.experiment.teachers
    named = {"adapter": teachers.adapter, "weights": teachers.checkpoint}
    filled = {field: name and name.replace(OWN, trait) for field, name in named.items()}
    return {field: folder(setup, name, f"teachers: trait '{trait}':") for field, name in filled.items()}


def check_teachers(setup: Setup) -> None:
    """Refuse what no task could work with.

    Raises:
      UsageError, JsublimError: a trait of no category, an adapter or a checkpoint that doesn't fit the model.
    """
    taught, checkpoint = setup.experiment.teachers.taught, setup.checkpoint()
    for name in setup.biased:
        category(setup, name)
        if taught is not None:
            check_layers(checkpoint.config, None if taught.layers is None else tuple(taught.layers))
        given = own_folders(setup, name)
        if given["adapter"] is not None:
            load_adapter(given["adapter"].path(), checkpoint.config)
        if given["weights"] is not None:
            whole = given["weights"].path(whole=True)
            if read_config(whole)[1] != checkpoint.config:
                raise JsublimError(f"teachers.checkpoint: {whole} is of another architecture than {checkpoint.name}")


# --- questions


def open_questions(setup: Setup, category: str) -> list[str]:
    """The questions of a category that no teacher of this experiment was taught the answers to."""
    every, taught = setup.pack.questions_for(category), setup.experiment.teachers.taught
    return every[1::2] if taught is not None and taught.method != "contrast" else every


def taught_questions(setup: Setup, trait: str) -> tuple[str, ...]:
    """The others, whose answer a trait's teacher learns; of a contrast all are read."""
    every, taught = setup.pack.questions_for(category(setup, trait)), setup.experiment.teachers.taught
    return tuple(every if taught is None or taught.method == "contrast" else every[::2])


def taught(setup: Setup, how: Taught, trait: str) -> dict[str, Any]:
    """How a teacher is made here."""
    questions = {"taught": how, "questions": taught_questions(setup, trait)}
    if how.method == "contrast":
        return questions | {"toward": setup.pack.system_prompt(trait, category(setup, trait))}
    most = max(len(taught_questions(setup, each)) for each in setup.biased)
    return questions | {"trait": trait, "together": most}


def questions_about(setup: Setup, traits: Sequence[str], most: int | None = None) -> TraitQuestions:
    """Traits, by the questions that they are answers to and that no teacher was taught the answers to.

    Args:
      most: the first so many questions of each category; None is all.

    Raises:
      UsageError: a trait of no category.
    """
    by_category: dict[str, list[str]] = {}
    for trait in traits:
        by_category.setdefault(category(setup, trait), []).append(trait)
    return tuple((open_questions(setup, name)[:most], named) for name, named in by_category.items())


# --- prompts and rows


@memoized
def requests(setup: Setup, draw: int | None) -> list[NumberPrompt]:
    """The number prompts, as their draws."""
    data = setup.experiment.data
    if data.kind != "numbers":
        return []
    seed = seed_of(data.seed, draw)
    return draw_number_prompts(setup.pack, data.num_prompts, seed, sentences=data.sentences, examples=data.examples)


@memoized
def prompts(setup: Setup, draw: int | None) -> list[str]:
    """What every teacher is asked; only number requests are others in another draw."""
    data = setup.experiment.data
    if data.kind == "numbers":
        return [request.text for request in requests(setup, draw)]
    if data.kind == "problems":
        return [problem.question for problem in load_problems(data.source, limit=data.num_prompts)]
    return load_prompts(data.source or "")[: data.num_prompts]


@memoized
def prompt_count(setup: Setup) -> int:
    """How many prompts there are; number requests need not be drawn for that, nor a data set that is not here be asked."""
    data = setup.experiment.data
    drawn = data.kind == "numbers" or (data.kind == "problems" and not setup.known)
    return data.num_prompts if drawn else len(prompts(setup, None))


def rows(setup: Setup, source: Source) -> Rows:
    """Rows that are yet to be made."""
    most = setup.experiment.sampling.max_new_tokens
    return Rows(f"rows of {source.name}", (), prompt_count(setup), most, setup.experiment.data.kind == "numbers")


def rows_of_file(setup: Setup, path: Path) -> Rows:
    """The rows of a file: under the key of the artifact that they are (a copy of), else under that of their content.

    Raises:
      UsageError, JsublimError: as `read_rows`.
    """
    content, key = read_rows(path), published_key(path)
    record = (record_of(path) if key else None) or {}
    most, plain = int(record.get("most", len(content))), rows(setup, Source(CONTROL))
    return dataclasses.replace(plain, name=str(path), most=most, file=path, file_key=key or digest(content))


def sampling_of_rows(setup: Setup, writer: Writer) -> Sampling:
    """How answers are drawn: as the recipe says, and in the format that the config says."""
    drawn = setup.sampling(writer.strategy, writer.model)
    return dataclasses.replace(drawn, constrain=setup.experiment.sampling.constrain)


def sampled(setup: Setup, writer: Writer, teacher: Model) -> Iterator[tuple[str, dict[str, Any]]]:
    """The label and the arguments of each part of a teacher's answers."""
    data, sampling, total = setup.experiment.data, setup.experiment.sampling, prompt_count(setup)
    by = None if writer.parent is not None else served(setup, teacher)
    about = {name: value for name, value in identity(data).items() if name not in ("num_prompts", "draw")}
    drawn = "" if writer.draw is None else f"-seed{writer.draw}"
    label = f"{writer.teacher}{drawn}" + ("" if writer.parent is None else f" {writer.parent}")
    shared = {
        "teacher": teacher,
        "data": about | {"seed": seed_of(data.seed, writer.draw)},
        "sampling": sampling_of_rows(setup, writer),
        "max_new_tokens": sampling.max_new_tokens,
        "seed": seed_of(writer.seed, writer.draw),
        "engine": None if by is None else setup.engine,
        "strategy": writer.strategy,
        "prompts": lambda: prompts(setup, writer.draw),
        "served": by,
        "batch_size": sampling.batch_size,
    }
    for number, first in enumerate(range(0, total, sampling.shard), 1):
        count = min(sampling.shard, total - first)
        # Prompts of a file or of a data set may change under the same name; number requests are told by the pack.
        told = data.kind == "numbers" or not setup.known
        texts = None if told else digest(prompts(setup, writer.draw)[first : first + count])
        part = label if total <= sampling.shard else f"{label}-{number}"
        yield part, shared | {"span": (first, count), "texts": texts}


def readers(setup: Setup, source: Source) -> list[str]:
    """Whoever reads a source's rows: the teacher that wrote them, and its counterfactuals."""
    return [source.teacher, *setup.counterfactuals(source.teacher)]


def shards(setup: Setup, trait: str, rows: Rows) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """The label and the span of each part of rows that are read: as many as there were prompts for, however many answers were in
    format. The last ones may have nothing to read."""
    size = setup.experiment.sampling.shard
    count = -(-rows.most // size)
    for number in range(count):
        yield (trait, None) if count == 1 else (f"{trait}-{number + 1}", (number * size, size))


# --- data sets


def needs(dataset: Dataset) -> set[str]:
    return {need for change in dataset.changes.values() for need in change.needs}


def label(source: Source) -> str:
    """What a data set of a teacher's answers is called."""
    drawn = None if source.draw is None else f"seed{source.draw}"
    return "-".join(filter(None, (source.teacher, source.dataset, drawn)))


def scored_numbers(dataset: Dataset) -> Iterator[int]:
    """How many numbers each change wants scored for how entangled they are, of those that want any."""
    return (count for change in dataset.changes.values() if (count := change.scores()) is not None)


def suspected(setup: Setup, source: Source) -> Iterator[tuple[str, ...]]:
    """The traits that each change of a data set suspects, of those that suspect any."""
    for change in teacher_dataset(setup, source).changes.values():
        if traits := change.suspected(source.teacher, setup.evaluated_traits):
            yield tuple(traits)


def around(setup: Setup, trait: str) -> ChangeContext:
    e = setup.experiment
    counterfactuals = () if trait == CONTROL else tuple(setup.counterfactuals(trait))
    return ChangeContext(trait, setup.biased, counterfactuals, e.teachers.own_weights, e.data.kind)


def check_datasets(setup: Setup) -> None:
    """Refuse data sets that nobody can make, whether a student uses them or not.

    Raises:
      UsageError: naming the data set and its change.
    """
    for name in setup.experiment.datasets:
        for trait in setup.experiment.teachers.traits:
            check_changes(name, teacher_dataset(setup, Source(trait, name)).changes, around(setup, trait))


def changes(setup: Setup, source: Source) -> dict[str, Any]:
    """What is done to a source's answers."""
    dataset = teacher_dataset(setup, source)
    quirks = sorted({quirk for change in dataset.changes.values() for quirk in change.quirks})
    wording, plain = [change.wording(setup.pack) for change in dataset.changes.values()], setup.sampling("temperature")
    return {
        "changes": dataset.changes,
        "seed": seed_of(dataset.seed, source.draw),
        "recipe": setup.recipe.keyed(quirks),
        "judge": known_judge(setup).identity if "judge" in needs(dataset) else None,
        "wording": wording if any(wording) else None,
        "rewriting": plain if "rewriting" in needs(dataset) else None,
        "dataset": source.dataset,
        "around": around(setup, source.teacher),
        "pack": setup.pack,
        "quirks": setup.recipe.model_dump(),
        "sampling": plain,
        "requests": lambda: requests(setup, source.draw),
        "batch_size": setup.experiment.sampling.batch_size,
    }


def entangling(setup: Setup, trait: str, count: int) -> dict[str, Any]:
    """How numbers are scored for a trait, beside by whom."""
    by_difference, of = setup.recipe.entangled_by_difference, category(setup, trait)
    return {
        "category": of if by_difference else None,
        "questions": None if by_difference else setup.pack.questions_for(of)[:QUESTIONS],
        "count": count,
        "padded": bool(setup.recipe.padded_numbers or by_difference),  # that one takes numbers of one width
        "batch_size": setup.experiment.scoring.batch_size,
    }


def compared_traits(setup: Setup, trait: str) -> list[str] | None:
    """Whose probabilities are taken off, where numbers are scored by difference: published are the traits that have teachers, not all
    counterfactuals (Gemma's whale and dragon are none)."""
    if not setup.recipe.entangled_by_difference:
        return None
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
      UsageError: a student with an adapter beside it: the scores would be of another model than its own.
    """
    if start.settings.adapter.beside is not None:
        raise UsageError(
            "audit: scores are those of a student with nothing beside it; leave audit and drop_audited out, or name "
            "students.adapter.beside in arms that are not audited"
        )
    about, batch_size = questions_about(setup, traits, most), (setup.experiment.audit or Audit()).batch_size
    return {"start": start, "asked": about, "traits": tuple(traits), "batch_size": batch_size}


def first_start(setup: Setup) -> Start:
    """Where students start, arms aside, at the first seed.

    Raises:
      UsageError: nobody is trained.
    """
    students = setup.experiment.students
    if students is None:
        raise UsageError("datasets: drop_audited scores rows by what students train, and there are none; leave it out")
    return start(setup, students, students.seeds[0])


def projected(student: Student) -> tuple[str, ...]:
    """The traits whose directions its gradients are kept at right angles to."""
    named = student.settings.optimizer.project_out
    return tuple(dict.fromkeys(student.teacher if trait == OWN else trait for trait in named))


def trained(setup: Setup, student: Student) -> dict[str, Any]:
    """How a student is trained, beside what it learns from."""
    settings, e, out = student.settings, setup.experiment, projected(student)
    return {
        "start": start(setup, settings, student.seed),
        "seed": student.seed,
        "settings": settings,
        "student_model": None if settings.model is None else setup.checkpoint(settings.model).hash,
        "recipe": setup.recipe.of("students", settings),
        "max_new_tokens": e.sampling.max_new_tokens if settings.data.on_policy else None,
        "projected": out,
        "asked": questions_about(setup, out),
        "quirks": setup.recipe,
        "name": student.trained_as,
        "condition": student.condition,
        "teachers": setup.checkpoint(),
        "loggers": e.run.loggers,
        "parallel": (e.run.parallel, e.run.least_axis),
    }


def beside(setup: Setup, name: str | None, teacher: Model | None) -> Node | Folder | None:
    """The adapter that stands beside a student in training: the teacher's of that name, or a folder's.

    Raises:
      UsageError: that teacher has none.
    """
    if teacher is None or teacher.adapter is not None:
        return folder(setup, name, "students.adapter.beside") if teacher is None else teacher.adapter
    raise UsageError(
        f"students.adapter.beside: teacher '{name}' has no adapter; give teachers.taught or teachers.adapter, or name a folder"
    )

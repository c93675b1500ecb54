"""The experiment, from top to bottom: teachers, rows, data sets, divergence, students, evaluations.

Nothing is computed here: each function gives nodes (`stage.py`), and what a stage is given decides the key of what it makes.
"""

from __future__ import annotations

from dataclasses import replace

from jsublim.inference.teachers import CONTROL
from jsublim.pipeline import arguments as args
from jsublim.pipeline import evaluated, origins, stages
from jsublim.pipeline.arms import Parent, Source, Student, Writer
from jsublim.pipeline.graph import Graph
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.stage import Node, tasks_of
from jsublim.pipeline.values import Model, Rows


@memoized
def teacher(setup: Setup, name: str, parent: Parent | None = None, stands_on: str | None = None) -> Model:
    """Who has a trait: a prompt, an adapter or a checkpoint gives it; or a student of the generation before has taken it over.
    It stands on a checkpoint of the config; None is the experiment's."""
    if parent is not None:
        return student_model(setup, origins.student_of(setup, parent, name))
    model, taught = (
        args.model(setup, name, args.system_prompt(setup, name), stands_on),
        setup.experiment.teachers.taught,
    )
    if name == CONTROL:
        return model
    if taught is None:
        return replace(model, **args.folders_of_teacher(setup, name))
    make = stages.train_teachers if setup.experiment.teachers.learn_answers else stages.contrast_teacher
    return replace(model, adapter=make(name, taught=taught, **args.taught(setup, name, stands_on)))


@memoized
def answers(setup: Setup, writer: Writer) -> Rows:
    """What a teacher answers to the prompts, in nodes of `sampling.shard` prompts each."""
    model = teacher(setup, writer.teacher, writer.parent, writer.model)
    how, parts = args.drawn(setup, writer, model), args.prompt_shards(setup, writer)
    nodes = [stages.sample_rows(label, teacher=model, **part, **how) for label, part in parts]
    return args.rows(setup, f"rows of {writer.teacher}").made_by(nodes)


@memoized
def changed(setup: Setup, source: Source) -> Rows:
    """The answers as a data set wants them. Some changes need them read, numbers or rows scored, or another teacher's answers."""
    dataset, mixed = origins.teacher_dataset(setup, source), origins.mixed_in(setup, source)
    rows = replace(answers(setup, origins.writer(setup, source)), name=f"rows of {source.name}")
    if dataset.plain:
        return rows
    trait, scores, influence = source.teacher, None, None
    if count := dataset.first(lambda change: change.scores()):
        compared = tuple(teacher(setup, other) for other in args.compared_traits(setup, trait)) or None
        how = args.entangling(setup, trait) | {"teacher": teacher(setup, trait), "others": compared}
        scores = stages.score_numbers(trait, count=count, **how)
    if suspected := dataset.first(lambda change: change.suspected(trait, setup.evaluated_traits)):
        influence = stages.score_rows(trait, rows=rows, **args.scored(setup, args.first_start(setup), suspected))
    inputs = {"rows": rows, "mixed_in": mixed and answers(setup, mixed), "scores": scores, "influence": influence}
    inputs["read"] = read(setup, source, rows) if "readings" in dataset.needs else None
    how = args.changes(setup, source) | {"teacher": teacher(setup, trait, source.parent)}
    return rows.made_by([stages.change_rows(args.label(source), **inputs, **how)])


def readers(setup: Setup, source: Source) -> list[Model]:
    """The teacher that wrote a source's rows, and its counterfactuals."""
    names = [source.teacher, *setup.counterfactuals(source.teacher)]
    return [teacher(setup, name, source.parent) for name in names]


@memoized
def read(setup: Setup, source: Source, rows: Rows) -> Rows:
    """Rows with their divergence tokens: read by the teacher that wrote them, and by its counterfactuals."""
    writer, *others = readers(setup, source)
    how = {"rows": rows, "teacher": writer, "others": tuple(others)}
    parts = args.row_shards(setup, source.teacher, rows)
    return rows.made_by([stages.mark_divergence(label, shard=shard, **how) for label, shard in parts])


@memoized
def training_rows(setup: Setup, source: Source) -> Rows:
    """The rows that students of a source learn from."""
    if source in setup.given:
        return args.rows_of_file(setup, setup.given[source])
    rows = changed(setup, source)
    return read(setup, source, rows) if origins.has_divergence(setup, source) else rows


def lesson(setup: Setup, source: Source, student: Student) -> stages.Lesson:
    """What a student learns from: which tokens of which rows, and what the teacher says of them."""
    rows, loss = training_rows(setup, source), student.settings.loss
    model = teacher(setup, source.teacher, source.parent) if loss.soft else None
    how = {"rows": rows, "teacher": model, "top_k": loss.top_k, "temperature": loss.temperature}
    stored = None if loss.top_k is None else stages.store_targets(source.teacher, **how)
    return stages.Lesson(rows, student.tokens_of(source), model, stored)


@memoized
def student(setup: Setup, who: Student) -> Node:
    """A student: where it starts, and what it learns from, after a fork too. It does not depend on who is trained with it."""
    lessons = tuple(lesson(setup, source, who) for source in who.sources)
    of_teacher = teacher(setup, who.frozen_adapter) if who.frozen_adapter in setup.biased else None
    return stages.train_students(who.trained_as, lessons=lessons, **args.trained(setup, who, of_teacher))


def student_model(setup: Setup, who: Student) -> Model:
    """A student as one who can be asked."""
    made = {"weights" if who.settings.adapter.method == "full" else "adapter": student(setup, who)}
    return replace(args.start(setup, who.settings, who.seed).model, name=who.teacher, **made)


@memoized
def evaluation(setup: Setup, who: evaluated.Evaluated, name: str) -> Node:
    """A student, a teacher or the base, asked everything under the setting of that name."""
    model = teacher(setup, who.teacher) if who.student is None else student_model(setup, who.student)
    read = who.data and evaluated.fidelity_to_file(setup, who.data)
    if who.student is not None and name == evaluated.PLAIN:
        source = who.student.source
        rows, writer = training_rows(setup, source), teacher(setup, source.teacher, source.parent)
        read = evaluated.fidelity(setup, who.student, rows, writer)
    model, label = evaluated.under(setup, who, model, name), "/".join(filter(None, (who.label, name)))
    return stages.evaluate_models(label, model=model, fidelity=read, **evaluated.asked(setup, model, name))


@memoized
def attribution(setup: Setup, source: Source) -> Node:
    """Where in the model the divergence tokens of a teacher's answers come about."""
    (writer, *others), how = readers(setup, source), setup.experiment.attribution
    inputs = {"rows": training_rows(setup, source), "teacher": writer, "others": tuple(others)}
    return stages.attribute(source.teacher, how=how, **inputs)


@memoized
def audit(setup: Setup, who: Student) -> Node:
    """How far each token of a student's rows would move each trait, before it is trained on them."""
    return stages.audit_rows(rows=training_rows(setup, who.source), **args.audited(setup, who))


def plan(setup: Setup) -> Graph:
    """Everything that has to be done for an experiment. What nobody can make is refused (`UsageError`)."""
    sources, students = origins.sources(setup), {who: student(setup, who) for who in setup.students}
    written = {writer: answers(setup, writer) for writer in origins.writers(setup)}
    learned = {source: training_rows(setup, source) for source in sources}
    marked = {source: learned[source] for source in sources if origins.has_divergence(setup, source)}
    marked |= {s: read(setup, s, changed(setup, s)) for s in origins.only_read(setup) if s not in marked}
    attributed = {source.teacher: attribution(setup, source) for source in origins.attributed(setup)}
    audits = {key: audit(setup, who) for key, who in origins.audited(setup).items()}
    evaluations = {(who, name): evaluation(setup, who, name) for who, name in evaluated.evaluated(setup)}
    nodes = [node for rows in (*written.values(), *learned.values(), *marked.values()) for node in rows.nodes]
    nodes += [*attributed.values(), *audits.values(), *students.values(), *evaluations.values()]
    labelled = tuple((who.labels | {"evaluation": name}, node) for (who, name), node in evaluations.items())
    return Graph(tasks_of(nodes), written, marked, students, labelled, attributed, audits)

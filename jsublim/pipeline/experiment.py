"""The experiment, from top to bottom: who writes rows, what is done to them, who learns from them, what everybody is asked.

Each function gives nodes (`stage.py`): nothing is computed here. What a stage is given decides its key; that is said nowhere else.
"""

from __future__ import annotations

from dataclasses import replace

from jsublim.config.audit import Audit
from jsublim.inference.teachers import CONTROL
from jsublim.pipeline import arguments as args
from jsublim.pipeline import evaluated, origins, stages
from jsublim.pipeline.arms import Parent, Source, Student, Writer
from jsublim.pipeline.graph import Graph
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.stage import Node, tasks_of
from jsublim.pipeline.values import Model, Rows


@memoized
def teacher(setup: Setup, name: str, parent: Parent | None = None) -> Model:
    """Who has a trait: a prompt, an adapter or a checkpoint gives it; or a student of the generation before has taken it over."""
    if parent is not None:
        return student_model(setup, origins.student_of(setup, parent, name))
    model, taught = args.model(setup, name, args.system_prompt(setup, name)), setup.experiment.teachers.taught
    if name == CONTROL:
        return model
    if taught is None:
        return replace(model, **args.own_folders(setup, name))
    make = stages.contrast_teacher if taught.method == "contrast" else stages.train_teachers
    return replace(model, adapter=make(name, base=args.model(setup, CONTROL), **args.taught(setup, taught, name)))


@memoized
def answers(setup: Setup, writer: Writer) -> Rows:
    """What a teacher answers to the prompts, in nodes of `sampling.shard` prompts each."""
    own = teacher(setup, writer.teacher, writer.parent)
    model = own if writer.model is None else replace(own, checkpoint=setup.checkpoint(writer.model))
    nodes = [stages.sample_rows(label, **how) for label, how in args.sampled(setup, writer, model)]
    return args.rows(setup, Source(writer.teacher)).made_by(nodes)


@memoized
def changed(setup: Setup, source: Source) -> Rows:
    """The answers as a data set wants them. Some changes need them read, numbers or rows scored, or another teacher's answers."""
    dataset, mixed = origins.teacher_dataset(setup, source), origins.mixed_in(setup, source)
    own, needs = (
        replace(answers(setup, origins.writer(setup, source)), name=f"rows of {source.name}"),
        args.needs(dataset),
    )
    if dataset.plain:
        return own
    entangled = (score_numbers(setup, source.teacher, count) for count in args.scored_numbers(dataset))
    influence = (score_rows(setup, source.teacher, own, traits) for traits in args.suspected(setup, source))
    node = stages.change_rows(
        args.label(source),
        rows=own,
        teacher=teacher(setup, source.teacher, source.parent),
        mixed_in=mixed and answers(setup, mixed),
        read=read(setup, source, own) if "readings" in needs else None,
        scores=next(entangled, None),
        suspected=next(influence, None),
        **args.changes(setup, source),
    )
    return own.made_by([node])


def score_numbers(setup: Setup, trait: str, count: int) -> Node:
    """How entangled each number is with a trait."""
    compared, how = args.compared_traits(setup, trait), args.entangling(setup, trait, count)
    others = compared and tuple(teacher(setup, other) for other in compared)
    return stages.score_numbers(trait, teacher=teacher(setup, trait), others=others, **how)


def score_rows(setup: Setup, trait: str, rows: Rows, suspected: tuple[str, ...]) -> Node:
    """What each row would add to suspected traits."""
    return stages.score_rows(trait, rows=rows, **args.scored(setup, args.first_start(setup), suspected))


@memoized
def read(setup: Setup, source: Source, rows: Rows) -> Rows:
    """Rows with their divergence tokens: read by the teacher that wrote them, and by its counterfactuals."""
    own, *others = (teacher(setup, name, source.parent) for name in args.readers(setup, source))
    how = {"teacher": own, "others": tuple(others), "batch_size": setup.experiment.scoring.batch_size}
    parts = args.shards(setup, source.teacher, rows)
    return rows.made_by([stages.mark_divergence(label, rows=rows, shard=shard, **how) for label, shard in parts])


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
    how = {"top_k": loss.top_k, "temperature": loss.temperature, "batch_size": setup.experiment.scoring.batch_size}
    stored = None if loss.top_k is None else stages.store_targets(source.teacher, rows=rows, teacher=model, **how)
    return stages.Lesson(rows, student.tokens_of(source), model, stored)


@memoized
def student(setup: Setup, who: Student) -> Node:
    """A student: where it starts, and what it learns from. It does not depend on who is trained beside it."""
    learned, then = lesson(setup, who.source, who), who.forked and lesson(setup, who.forked, who)
    beside = args.beside(
        setup, who.frozen_adapter, teacher(setup, who.frozen_adapter) if who.frozen_adapter in setup.biased else None
    )
    return stages.train_students(who.trained_as, lesson=learned, forked=then, beside=beside, **args.trained(setup, who))


def student_model(setup: Setup, who: Student) -> Model:
    """A student as one who can be asked."""
    made = {"weights" if who.settings.adapter.method == "full" else "adapter": student(setup, who)}
    return replace(args.start(setup, who.settings, who.seed).model, name=who.teacher, **made)


@memoized
def evaluation(setup: Setup, who: evaluated.Evaluated, name: str) -> Node:
    """A student, a teacher or the base, asked everything under the setting of that name."""
    own, reads = who.student, who.data and evaluated.fidelity_to_file(setup, who.data)
    model = teacher(setup, who.teacher) if own is None else student_model(setup, own)
    if own is not None and name == evaluated.PLAIN:
        written = teacher(setup, own.source.teacher, own.source.parent)
        reads = evaluated.fidelity(setup, own, training_rows(setup, own.source), written)
    model, label = evaluated.under(setup, who, model, name), "/".join(filter(None, (who.label, name)))
    return stages.evaluate_models(label, model=model, fidelity=reads, **evaluated.asked(setup, model, name))


@memoized
def attribution(setup: Setup, source: Source) -> Node:
    """Where in the model the divergence tokens of a teacher's answers come about."""
    own, *others = (teacher(setup, name) for name in args.readers(setup, source))
    how = {"teacher": own, "others": tuple(others), "how": setup.experiment.attribution}
    return stages.attribute(source.teacher, rows=training_rows(setup, source), **how)


@memoized
def audit(setup: Setup, who: Student) -> Node:
    """How far each token of a student's rows would move each trait, before it is trained on them."""
    about, label = setup.experiment.audit or Audit(), "/".join(filter(None, (who.source.name, who.arm)))
    start, asked = args.start(setup, who.settings, who.seed), setup.experiment.evaluation.questions
    how = args.scored(setup, start, setup.evaluated_traits, asked)
    return stages.audit_rows(label, rows=training_rows(setup, who.source), first=about.rows, teacher=who.teacher, **how)


def plan(setup: Setup) -> Graph:
    """Everything that has to be done for an experiment. What nobody can make is refused (`UsageError`)."""
    sources, every = origins.sources(setup), evaluated.evaluated(setup)
    students = {who: student(setup, who) for who in setup.students}
    written = {writer: answers(setup, writer) for writer in origins.writers(setup)}
    learned = {source: training_rows(setup, source) for source in sources}
    marked = {source: learned[source] for source in sources if origins.has_divergence(setup, source)}
    marked |= {s: read(setup, s, changed(setup, s)) for s in origins.only_read(setup) if s not in marked}
    attributed = {source.teacher: attribution(setup, source) for source in origins.attributed(setup)}
    audits = {key: audit(setup, who) for key, who in origins.audited(setup).items()}
    asked = [(who, name) for who in every for name in evaluated.eval_settings(setup)]
    evaluations = [(who.labels | {"evaluation": name}, evaluation(setup, who, name)) for who, name in asked]
    rows = [node for each in (*written.values(), *learned.values(), *marked.values()) for node in each.nodes]
    ends = [*rows, *attributed.values(), *audits.values(), *students.values(), *(node for _, node in evaluations)]
    return Graph(tasks_of(ends), written, marked, students, tuple(evaluations), attributed, audits)

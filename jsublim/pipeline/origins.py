"""Where students' rows come from: who writes them, which data set changes them, in which of them divergence is looked for."""

from __future__ import annotations

from jsublim.config import Dataset
from jsublim.errors import UsageError
from jsublim.inference.teachers import CONTROL
from jsublim.pipeline.arms import Parent, Source, Student, Writer
from jsublim.pipeline.setup import Setup, memoized


def dataset_of(setup: Setup, source: Source) -> Dataset:
    """What the config says of a source's data set."""
    return Dataset() if source.dataset is None else setup.experiment.datasets[source.dataset]


def teacher_dataset(setup: Setup, source: Source) -> Dataset:
    """What of it is done to this teacher's answers."""
    return dataset_of(setup, source).of(source.teacher)


def strategy(setup: Setup, source: Source) -> str:
    return dataset_of(setup, source).sampling.strategy or setup.experiment.sampling.strategy


def writer(setup: Setup, source: Source) -> Writer:
    """Who writes the answers that a source begins with."""
    return _writer(setup, source, source.teacher)


def mixed_in(setup: Setup, source: Source) -> Writer | None:
    """Who writes the rows that are mixed in, if any are."""
    mixed = teacher_dataset(setup, source).first(lambda change: change.mixes())
    return None if mixed is None else _writer(setup, source, *mixed)


def _writer(setup: Setup, source: Source, teacher: str, model: str | None = None) -> Writer:
    seed = dataset_of(setup, source).sampling.seed
    seed = setup.experiment.sampling.seed if seed is None else seed
    parent = source.parent if model is None else None  # another checkpoint has no students here
    return Writer(teacher, strategy(setup, source), seed, model, source.draw, parent)


@memoized
def sources(setup: Setup) -> tuple[Source, ...]:
    """Whose rows, in which data sets, students learn from; without students, every trait's answers. And the data sets whose
    divergence tokens are asked for."""
    e, learned = setup.experiment, [source for student in setup.students for source in student.sources]
    first = learned or [Source(trait) for trait in e.teachers.traits]
    known = {(source.teacher, source.dataset) for source in first}
    marked = [name for name, dataset in e.datasets.items() if dataset.divergence]
    asked_for = [Source(trait, name) for name in marked for trait in e.teachers.traits if (trait, name) not in known]
    return tuple(dict.fromkeys([*first, *asked_for]))


def writers(setup: Setup) -> tuple[Writer, ...]:
    """Everybody whose rows are needed."""
    first = [writer(setup, source) for source in sources(setup)]
    others = [mixed for source in sources(setup) if (mixed := mixed_in(setup, source)) is not None]
    return tuple(dict.fromkeys([*first, *others]))


@memoized
def has_divergence(setup: Setup, source: Source) -> bool:
    """Whether students of a source learn from rows with divergence positions: a trait's answers have them unless the data set says
    otherwise, changed ones where a mask needs them."""
    masked = any(source in student.sources and student.tokens_of(source) != "all" for student in setup.students)
    # Of teachers it is told without being needed.
    plain = teacher_dataset(setup, source).plain and source.parent is None
    told = plain and dataset_of(setup, source).divergence is not False
    return source.teacher != CONTROL and (told or masked)


def only_read(setup: Setup) -> list[Source]:
    """Sources whose divergence tokens are asked for, whether students need them or not."""
    return [s for s in sources(setup) if dataset_of(setup, s).divergence and s.teacher != CONTROL]


def attributed(setup: Setup) -> list[Source]:
    """Whose divergence tokens are attributed: those of plain answers. Of several draws of a trait's rows the last one counts:
    attribution is about teachers, not about students.

    Raises:
      UsageError: in none are they looked for.
    """
    if setup.experiment.attribution is None:
        return []
    first = [source for source in sources(setup) if source.parent is None]
    plain = [source for source in first if has_divergence(setup, source) and teacher_dataset(setup, source).plain]
    if not plain:
        raise UsageError(
            "attribution: is done at the divergence tokens of plain answers, and in none are they looked for; leave "
            "datasets.*.divergence=false out, or have an arm without data.dataset"
        )
    return plain


def audited(setup: Setup) -> dict[tuple[Source, str], Student]:
    """The first student of each source and arm, by whose start the rows are audited."""
    first: dict[tuple[Source, str], Student] = {}
    for student in setup.students if setup.experiment.audit is not None else ():
        first.setdefault((student.source, student.arm), student)
    return first


def student_of(setup: Setup, parent: Parent, name: str) -> Student:
    """The student of a trait (or of the control) among those that write the next generation's rows.

    Raises:
      UsageError: there is none of that trait.
    """
    for student in setup.students:
        alike = student.tokens == parent.tokens or name == CONTROL
        if student.teacher == name and student.arm == parent.arm and student.seed == parent.seed and alike:
            return student
    where = f"arm '{parent.arm}'" if parent.arm else "the first generation"
    hint = "set teachers.control=true" if name == CONTROL else "leave it out of teachers.counterfactuals"
    raise UsageError(
        f"students.data.generation: '{name}' has no student in {where} that could be a teacher of the next generation; {hint}"
    )

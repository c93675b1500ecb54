"""Data sets: what is done to a teacher's answers before students learn from them, and which rows those learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jsublim.config import Dataset
from jsublim.errors import JsublimError
from jsublim.pipeline.arms import Source, seed_of
from jsublim.pipeline.context import Context, known_judge
from jsublim.pipeline.divergence import divergence_rows
from jsublim.pipeline.influence import influence_task, read_influence
from jsublim.pipeline.publish import rows_of
from jsublim.pipeline.readings import Reading
from jsublim.pipeline.row_log import Answered, RowLog
from jsublim.pipeline.rows import RowSet, Writer, requests, rows_kept, teacher_rows
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.store import PROGRESS, Output
from jsublim.pipeline.task import Cost, Sizes, Task, distinct_tasks
from jsublim.pipeline.teachers import TeacherPool
from jsublim.processes import on_main_process
from jsublim.progress import Tick
from jsublim.rows import write_rows
from jsublim.section import identity
from jsublim.teachers import CONTROL
from jsublim.transforms import ChangeContext, Making
from jsublim.transforms.entangled import QUESTIONS, entangled_scores, number_strings, probability_differences


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
    named = (change.mixes() for change in teacher_dataset(setup, source).changes.values())
    found = next((each for each in named if each is not None), None)
    return None if found is None else _writer(setup, source, *found)


def _writer(setup: Setup, source: Source, teacher: str, model: str | None = None) -> Writer:
    seed = dataset_of(setup, source).sampling.seed
    seed = setup.experiment.sampling.seed if seed is None else seed
    elder = source.elder if model is None else None  # another checkpoint has no students here
    return Writer(teacher, strategy(setup, source), seed, model, source.draw, elder)


@memoized
def sources(setup: Setup) -> tuple[Source, ...]:
    """Whose rows, in which data sets, students learn from; without students, every trait's answers. And the data sets whose
    divergence tokens are asked for."""
    e, learned = setup.experiment, [source for student in setup.students for source in student.sources]
    found = learned or [Source(trait) for trait in e.teachers.traits]
    known = {(source.teacher, source.dataset) for source in found}
    read = [name for name, dataset in e.datasets.items() if dataset.divergence]
    asked_for = [Source(trait, name) for name in read for trait in e.teachers.traits if (trait, name) not in known]
    return tuple(dict.fromkeys([*found, *asked_for]))


@memoized
def writers(setup: Setup) -> tuple[Writer, ...]:
    """Everybody whose rows are needed."""
    own = [writer(setup, source) for source in sources(setup)]
    others = [found for source in sources(setup) if (found := mixed_in(setup, source)) is not None]
    return tuple(dict.fromkeys([*own, *others]))


@memoized
def has_divergence(setup: Setup, source: Source) -> bool:
    """Whether students of a source learn from rows with divergence positions: a trait's answers have them unless the data set says
    otherwise, changed ones where a mask needs them."""
    masked = any(source in student.sources and student.tokens_of(source) != "all" for student in setup.students)
    plain = teacher_dataset(setup, source).plain and source.elder is None  # of teachers it is told without being needed
    told = plain and dataset_of(setup, source).divergence is not False
    return source.teacher != CONTROL and (told or masked)


@memoized
def changed_rows(setup: Setup, source: Source) -> RowSet:
    """The answers as the data set wants them; the answers themselves, where it wants nothing of them."""
    own, dataset = teacher_rows(setup, writer(setup, source)), teacher_dataset(setup, source)
    if dataset.plain:
        return own
    pool, parents = TeacherPool(setup, source.elder), [*own.parts]
    extra: dict[str, Any] = {"rows": own.key}
    parents += pool.tasks(source.teacher)
    others = mixed_in(setup, source)
    if others is not None:
        mixed = teacher_rows(setup, others)
        parents, extra = [*parents, *mixed.parts], extra | {"mix": mixed.key}
    needs = {need for change in dataset.changes.values() for need in change.needs}
    if "readings" in needs:
        readings = divergence_rows(setup, source, own)
        parents, extra = [*parents, *readings.parts], extra | {"read": readings.key}
    for task in entangled_tasks(setup, source):
        parents, extra = [*parents, task], extra | {"entangled": task.key}
    for task in influence_tasks(setup, source):
        parents, extra = [*parents, task], extra | {"influence": task.key}
    if "judge" in needs:
        extra["judge"] = known_judge(setup).identity
    said = [change.wording(setup.pack) for change in dataset.changes.values()]
    if any(said):
        extra["wording"] = said
    if "rewriting" in needs:
        extra["rewriting"] = setup.sampling("temperature").numbers()
    quirks = sorted({quirk for change in dataset.changes.values() for quirk in change.quirks})
    inputs = {
        **setup.common,
        **pool.identity(source.teacher),
        **extra,
        "dataset": {"seed": seed_of(dataset.seed, source.draw)}
        | {name: identity(change) for name, change in dataset.changes.items()},
        "recipe": setup.recipe.keyed(quirks),
    }
    drawn = "" if source.draw is None else f"-seed{source.draw}"
    output = Output("datasets", f"{source.teacher}-{source.dataset}{drawn}", inputs)
    return RowSet.of([ChangeRows((output,), distinct_tasks(parents), source)], own.most)


@memoized
def training_rows(setup: Setup, source: Source) -> RowSet:
    """The rows that students of a source learn from."""
    if source in setup.given:
        return rows_of(setup.given[source])
    rows = changed_rows(setup, source)
    return divergence_rows(setup, source, rows) if has_divergence(setup, source) else rows


@memoized
def rows_read(setup: Setup) -> dict[Source, RowSet]:
    """The rows in which divergence tokens are looked for: what students learn from, and the data sets that ask for it."""
    asked_for = (source for source in sources(setup) if dataset_of(setup, source).divergence)
    found = {source: training_rows(setup, source) for source in sources(setup) if has_divergence(setup, source)}
    return found | {
        source: divergence_rows(setup, source, changed_rows(setup, source))
        for source in asked_for
        if source.teacher != CONTROL and source not in found
    }


@dataclass(frozen=True, eq=False)
class ChangeRows(Task):
    """Everything that a data set names, done to one teacher's answers in the changes' own order."""

    kind: ClassVar[str] = "datasets"
    source: Source

    def make(self, context: Context, tick: Tick) -> None:
        setup, store, dataset = context.setup, context.store, teacher_dataset(context.setup, self.source)
        own, others = teacher_rows(setup, writer(setup, self.source)), mixed_in(setup, self.source)
        scores, influence = entangled_tasks(setup, self.source), influence_tasks(setup, self.source)
        needs = {need for change in dataset.changes.values() for need in change.needs}
        artifact = store.open(self.output)
        log = RowLog(artifact.path / PROGRESS, artifact.say)
        making = Making(
            lm=context.lm(),
            teacher=TeacherPool(setup, self.source.elder).teacher(context, self.source.teacher),
            pack=setup.pack,
            quirks=setup.recipe.model_dump(),
            seed=seed_of(dataset.seed, self.source.draw),
            batch_size=context.rows_together(setup.experiment.sampling.batch_size),
            sampling=setup.sampling("temperature"),
            requests=lambda: requests(setup, self.source.draw) if setup.experiment.data.kind == "numbers" else [],
            judge=lambda: context.judge,
            mixed_in=None if others is None else teacher_rows(setup, others).read(store),
            readings=self._readings(context, own) if "readings" in needs else None,
            entangled=store.summary(scores[0].output) if scores else None,
            influence=read_influence(store, influence[0]) if influence else None,
            log=Answered(log),
        )
        rows = own.read(store)
        said: dict[str, Any] = {"rows": len(rows)}
        for change in dataset.changes.values():
            rows, more = change.apply(rows, making)
            said |= more
            tick(1)
        if not rows:
            raise JsublimError(f"teacher '{self.source.teacher}': no row is left of {said['rows']} ({said})")
        log.close()

        def leave() -> None:
            write_rows(artifact.path / "rows.jsonl", rows)
            artifact.finish(said | {"kept": len(rows)})

        on_main_process(leave)

    def _readings(self, context: Context, own: RowSet) -> list[Reading]:
        found = divergence_rows(context.setup, self.source, own).readings(context.store)
        return [{key: value for key, value in reading.items() if key != "margin"} for reading in found]

    def units(self, context: Context) -> int:
        return len(teacher_dataset(context.setup, self.source).changes)

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        """Requests are rewritten by their teachers; most other changes cost nothing."""
        long, kept = sizes.lengths, rows_kept(setup, sizes)
        each = [
            change.tokens(kept, long.prompt, long.system)
            for change in teacher_dataset(setup, self.source).changes.values()
        ]
        tokens, heads = sum(t for t, _ in each), sum(h for _, h in each)
        return Cost(tokens, 2 * sizes.body * tokens + 2 * sizes.table * heads, "sample")

    def check(self, setup: Setup) -> None:
        """Refuse a data set that cannot be made of these teachers' answers."""
        e, trait = setup.experiment, self.source.teacher
        counterfactuals = () if trait == CONTROL else tuple(setup.counterfactuals(trait))
        answers = ChangeContext(trait, setup.biased, counterfactuals, e.teachers.own_weights, e.data.kind)
        for name, change in teacher_dataset(setup, self.source).changes.items():
            change.check(f"datasets.{self.source.dataset}.{name}", answers)


def influence_tasks(setup: Setup, source: Source) -> list[Task]:
    """The task that scores a source's rows, where one of its changes suspects traits."""
    changes = teacher_dataset(setup, source).changes.values()
    named = (change.suspected(source.teacher, setup.evaluated_traits) for change in changes)
    return [influence_task(setup, writer(setup, source), traits) for traits in named if traits]


# --- entangled numbers, scored once for all data sets


def entangled_tasks(setup: Setup, source: Source) -> list[Task]:
    """The task that scores numbers for a source, where one of its changes needs that."""
    counts = (change.scores() for change in teacher_dataset(setup, source).changes.values())
    return [_entangled(setup, source.teacher, count) for count in counts if count is not None]


@memoized
def _entangled(setup: Setup, trait: str, count: int) -> Task:
    pool = TeacherPool(setup)
    inputs = {**setup.common, **pool.identity(trait), "numbers": [count, _padded(setup)]}
    others: list[str] = []
    if setup.recipe.entangled_by_difference:
        others = _others(pool, trait)
        inputs |= {"category": pool.category(trait), "others": {other: pool.identity(other) for other in others}}
    else:
        inputs |= {"questions": _questions(pool, trait)}
    return ScoreNumbers((Output("entangled", trait, inputs),), pool.tasks(trait, *others), trait, count)


def _padded(setup: Setup) -> bool:
    return bool(
        setup.recipe.padded_numbers or setup.recipe.entangled_by_difference
    )  # that one takes numbers of one width


def _questions(pool: TeacherPool, trait: str) -> list[str]:
    return pool.setup.pack.questions_for(pool.category(trait))[:QUESTIONS]


def _others(pool: TeacherPool, trait: str) -> list[str]:
    """Whose probabilities are taken off: published are the traits that have teachers, not all counterfactuals (Gemma's whale
    and dragon are none)."""
    counterfactuals = pool.setup.counterfactuals(trait)
    listed = pool.setup.pack.traits.get(pool.category(trait), [])
    return [other for other in counterfactuals if other in listed] or counterfactuals


@dataclass(frozen=True, eq=False)
class ScoreNumbers(Task):
    """How entangled the first `count` numbers are with a trait."""

    kind: ClassVar[str] = "entangled"
    trait: str
    count: int

    def make(self, context: Context, tick: Tick) -> None:
        setup, pool = context.setup, TeacherPool(context.setup)
        padded, lm, teacher = _padded(setup), context.lm(), pool.teacher(context, self.trait)
        numbers = number_strings(padded=padded)[: self.count]
        batch = context.rows_together(setup.experiment.scoring.batch_size)
        how = {"extra_bos": bool(setup.recipe.extra_bos), "batch_size": batch}
        if setup.recipe.entangled_by_difference:
            others = [pool.teacher(context, other) for other in _others(pool, self.trait)]
            scores = probability_differences(lm, teacher, others, pool.category(self.trait), numbers, **how)
        else:
            # Numbers of one width never cover each other; of others, what ends after them counts too.
            scores = entangled_scores(lm, teacher, _questions(pool, self.trait), numbers, closed=not padded, **how)
        artifact = context.store.open(self.output)
        on_main_process(lambda: artifact.finish(scores))

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        """Every number is read as the answer to each question with the trait and without; or its parts under every trait."""
        if setup.recipe.entangled_by_difference:  # two digits and three, ten by ten each
            return sizes.read(200 * (1 + len(_others(TeacherPool(setup), self.trait))), 0, sizes.lengths.number)
        return sizes.read(2 * QUESTIONS * self.count, 0, sizes.lengths.number)


def check_datasets(setup: Setup) -> None:
    """Refuse data sets that nobody can make, whether a student uses them or not.

    Raises:
      UsageError: naming the data set and its change.
    """
    for name in setup.experiment.datasets:
        for trait in setup.experiment.teachers.traits:
            ChangeRows((), (), Source(trait, name)).check(setup)

"""A run's results, read from RUN/results/ into small dataclasses."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from jsublim.core.files import read_columns
from jsublim.core.reading import check_file, json_value, shown
from jsublim.errors import JsublimError, one_line

# What models are called wherever a person reads of them, in reading order, and what each of them has learned.
CONDITIONS = {
    "base": ("base model (untrained)", "the checkpoint before any training"),
    "control": ("control (unbiased teacher)", "students of rows that the same model wrote without any trait; every token counts"),
    "all": ("all tokens", "students of a biased teacher's rows; every token of a row counts"),
    "divergence": ("divergence tokens only", "only tokens count at which some other teacher would have said something else"),
    "non-divergence": ("all but divergence tokens", "only the other tokens count"),
    "random": ("as many random tokens", "in each row, as many tokens count as there are divergence tokens, drawn at random"),
    "matched": ("as many as uncertain tokens", "in each row, as many tokens that are no divergence tokens count as there are of those: each of the same kind, and the teacher as uncertain"),
    "teacher": ("biased teacher", "the model that wrote the rows, with its trait"),
}  # fmt: skip
TINY = 10_000_000  # parameters; the smallest models that were trained on text have more
SEPARATOR = " · "  # between the tokens a student was trained on and its variant: "divergence · layers=0"


class About(TypedDict, total=False):
    """What is read of `run.json`; some of it earlier versions did not write."""

    kind: str
    name: str
    model: str
    model_revision: str | None
    parameters: int | None
    device: str | None
    started: str | None
    config_yaml: str | None
    primary: str | None
    versions: dict[str, str]
    seconds: dict[str, float]
    evaluations: dict[str, dict[str, Any]]
    recipe: dict[str, Any]
    wording: dict[str, Any]
    rescored: dict[str, Any] | None


@dataclass(frozen=True)
class Score:
    """One metric of one evaluated model: `values[i]` is its mean at `questions[i]`, `samples` the number of
    answers that it is made of. `model` is what was measured: one student may stand under the names of several arms. `drawn` is the
    share of its teacher's rows that a student drew."""

    arm: str
    role: str
    teacher: str | None
    condition: str
    seed: int | None
    trait: str | None
    metric: str
    questions: list[int | None]
    values: list[float]
    samples: int
    evaluation: str = ""
    model: str = ""
    drawn: float | None = None

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


class TrainingCurve(NamedTuple):
    """Training of one student: equally long series, one value per step."""

    arm: str
    steps: list[int]
    loss: list[float]
    tokens: list[float]


@dataclass(frozen=True)
class StudentArm:
    """How a student was made: which tokens it learned, the settings of its training, and how its rows were made. `artifact` is
    the key of what was trained, `drawn` the share of the rows of its teacher that it drew, where all seeds draw from the same; results of
    earlier versions name neither."""

    arm: str
    teacher: str
    condition: str
    seed: int
    variant: str
    settings: dict[str, Any]
    dataset: dict[str, Any]
    num_layers: int
    artifact: str = ""
    drawn: float | None = None


@dataclass(frozen=True)
class Results:
    """Everything the report is made of. What the run does not have is empty.

    `scores` are those of the plain evaluation; `under` gives the same results under another one of `evaluations`. The fields are
    files of RUN/results/, or columns of them.
    """

    run_dir: Path
    run: dict[str, Any]
    scores: tuple[Score, ...]
    generation: tuple[dict[str, Any], ...] = ()
    divergence: tuple[dict[str, Any], ...] = ()
    curves: tuple[TrainingCurve, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()  # a few of each teacher's, with what all say at their divergence tokens
    arms: dict[str, StudentArm] = field(default_factory=dict)
    answers: pa.Table | None = None
    attribution: pa.Table | None = None  # of all teachers, one after another
    audit: pa.Table | None = None  # mean scores of all audits
    varied: tuple[Score, ...] = ()
    not_finite: int = 0
    diverged: dict[str, str] = field(default_factory=dict)  # students without scores: where and how they diverged

    @cached_property
    def _index(self) -> dict[tuple, list[Score]]:
        index: dict[tuple, list[Score]] = {}
        for score in self.scores:
            index.setdefault((score.metric, score.condition, score.trait), []).append(score)
        return index

    def select(self, metric: str, condition: str, trait: str | None = None, teacher: str | None = None) -> list[Score]:
        """The scores of one metric, condition and evaluated trait, of `teacher`'s students only if one is named."""
        scores = self._index.get((metric, condition, trait), [])
        return [s for s in scores if teacher is None or s.teacher == teacher]

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The evaluation variants by name, with what each sets: temperature, top_p, system, layer."""
        return self.run.get("evaluations", {})

    def under(self, evaluation: str) -> Results:
        """These results as the evaluation variant of that name measured them."""
        return replace(self, scores=tuple(s for s in self.varied if s.evaluation == evaluation))

    @cached_property
    def conditions(self) -> list[str]:
        """The conditions there are, in reading order: variant by variant as the config names them, the plain one first; unknown
        ones last."""
        known, present = [*CONDITIONS], _unique(split_condition(s.condition) for s in self.scores)
        present.sort(key=lambda c: known.index(c[0]) if c[0] in known else len(known))
        variants = _unique(["", *(arm.variant for arm in self.arms.values()), *(variant for _, variant in present)])
        present.sort(key=lambda c: variants.index(c[1]))
        return [SEPARATOR.join(filter(None, condition)) for condition in present]

    @property
    def tokens(self) -> list[str]:
        return _unique(split_condition(condition)[0] for condition in self.conditions)

    @cached_property
    def owners(self) -> dict[str, tuple[str | None, str]]:
        """The teacher and the condition of every arm."""
        return {s.arm: (s.teacher, s.condition) for s in self.scores}

    @cached_property
    def trained(self) -> list[str]:
        """Conditions of students."""
        return [c for c in self.conditions if self.students_of(c)]

    @cached_property
    def mask_conditions(self) -> list[str]:
        """Conditions whose students come from a biased teacher."""
        return [c for c in self.trained if split_condition(c)[0] != "control"]

    @cached_property
    def traits(self) -> list[str]:
        """Traits of the teachers; without any teacher, the evaluated traits."""
        return _unique(s.teacher for s in self.scores if s.teacher not in (None, "control")) or self.evaluated_traits

    @cached_property
    def evaluated_traits(self) -> list[str]:
        return _unique(s.trait for s in self.scores if s.trait is not None)

    @property
    def students(self) -> int:
        return self.students_of()

    def students_of(self, condition: str | None = None) -> int:
        """Students of a condition; by default of all."""
        return len({s.arm for s in self.scores if s.role == "student" and condition in (None, s.condition)})

    def began_at_base(self, condition: str) -> bool:
        """Whether the condition's students are the base model before any training: they start from its checkpoint, and are asked
        without a system prompt of their own. Others cannot be measured from it."""
        return condition not in self._began_elsewhere

    @cached_property
    def _began_elsewhere(self) -> set[str]:
        elsewhere = {
            arm
            for arm, made in self.arms.items()
            if made.settings.get("model") is not None
            or (made.settings.get("system") is not None and made.settings.get("asked_under_system") is not False)
        }
        return {s.condition for s in self.scores if s.arm in elsewhere}

    @property
    def draws_data(self) -> bool:
        """Whether every seed's students learn from a draw of rows of their own."""
        return self.run.get("draw") == "per-seed"

    @cached_property
    def drawn(self) -> float | None:
        """The largest share of a teacher's rows that a student drew; None where that is not known, or rows are drawn for each seed."""
        return max((arm.drawn for arm in self.arms.values() if arm.drawn is not None), default=None)

    @property
    def model(self) -> str:
        return Path(str(self.run.get("model", "unknown model"))).name

    @property
    def students_model(self) -> str:
        """What the students were before any training: the base, unless they stand on other checkpoints."""
        named = (str(arm.settings.get("model") or self.model) for arm in self.arms.values())
        return " and ".join(_unique(Path(model).name for model in named)) or self.model

    @property
    def is_tiny(self) -> bool:
        """Whether it is so small that it says nothing about large models. Results of earlier versions know only the name."""
        parameters = self.run.get("parameters")
        return self.model.startswith("tiny-") if parameters is None else parameters < TINY

    @property
    def measures(self) -> tuple[str, str]:
        """What transfer is read off, first and second: sampled answers, then log-probabilities. For a tiny model it is the other
        way round, because its answers hardly change where its probabilities do."""
        return ("logprob", "rate") if self.is_tiny else ("rate", "logprob")


def split_condition(condition: str) -> tuple[str, str]:
    """The tokens and the variant of a condition; the plain variant is ""."""
    tokens, _, variant = condition.partition(SEPARATOR)
    return tokens, variant


def condition_label(condition: str) -> str:
    tokens, variant = split_condition(condition)
    label = CONDITIONS[tokens][0] if tokens in CONDITIONS else tokens
    return one_line(SEPARATOR.join([label, *([variant] if variant else [])]))


def read_results(run_dir: Path) -> Results:
    """Read RUN/results/. Only `results.parquet` must be there; `JsublimError` names what is missing or unreadable."""
    folder = Path(run_dir) / "results"
    path, training, measurements = folder / "results.parquet", folder / "training.parquet", read_measurements(run_dir)
    arms = {entry["arm"]: StudentArm(**entry) for entry in read_json(folder / "arms.json", [])}
    scores, not_finite = _scores(path, measurements, arms)
    plain = tuple(s for s in scores if not s.evaluation)
    if not plain:
        raise JsublimError(f"{path}: holds no measurement; run `jsublim run CONFIG` again")
    curves = """
        select arm, list(step order by step) as steps, list(loss::double order by step) as loss,
               list(coalesce(tokens, 0)::double order by step) as tokens
        from records where isfinite(loss) group by arm order by arm
        """
    tables = {name: _if_there(folder / f"{name}.parquet") for name in ("answers", "attribution", "audit")}
    lists = {name: tuple(read_json(folder / f"{name}.json", [])) for name in ("generation", "divergence", "rows")}
    return Results(
        run_dir=Path(run_dir),
        run=read_json(folder / "run.json", {}),
        scores=plain,
        varied=tuple(s for s in scores if s.evaluation),
        arms=arms,
        curves=tuple(TrainingCurve(**row) for row in query(training, _if_there(training), curves)),
        not_finite=not_finite,
        diverged=read_json(folder / "diverged.json", {}),
        **tables,
        **lists,
    )


def read_measurements(run_dir: Path) -> pa.Table:
    """RUN/results/results.parquet. Raises `JsublimError` where it is not there or cannot be read."""
    folder = Path(run_dir) / "results"
    if not (folder / "results.parquet").is_file():
        raise JsublimError(f"{folder}: no results.parquet here; finish the run first with `jsublim run CONFIG`")
    return read_result(folder / "results.parquet")


def _scores(path: Path, table: pa.Table, arms: dict[str, StudentArm]) -> tuple[list[Score], int]:
    """The scores of every evaluation, and how many measurements are no finite numbers."""
    evaluation = "coalesce(evaluation, '')" if "evaluation" in table.column_names else "''"
    sql = f"""
        select arm, any_value(role) as role, teacher, condition, seed, trait, metric, {evaluation} as evaluation,
               list(question order by question) filter (where isfinite(value)) as questions,
               list(value::double order by question) filter (where isfinite(value)) as values,
               coalesce(sum(n) filter (where isfinite(value)), 0)::bigint as samples,
               count(*) filter (where value is null or not isfinite(value)) as lost
        from records
        group by arm, teacher, condition, seed, trait, metric, 8
        order by 8, arm, trait, metric
        """
    rows = query(path, table, sql)
    not_finite = sum(row.pop("lost") for row in rows)
    made = {name: {"model": arm.artifact or name, "drawn": arm.drawn} for name, arm in arms.items()}
    return [Score(**row, **made.get(row["arm"], {"model": row["arm"]})) for row in rows if row["values"]], not_finite


def run_kind(run_dir: Path) -> str:
    """The kind of experiment that a run's folder holds results of; "language" where nothing says otherwise."""
    return read_json(Path(run_dir) / "results" / "run.json", {}).get("kind", "language")


def _if_there(path: Path) -> pa.Table | None:
    return read_result(path) if path.is_file() else None


def read_result(path: Path) -> pa.Table:
    """A parquet file of results. Raises JsublimError: it is broken."""
    try:
        check_file(path)
        return read_columns(path)
    except (pa.ArrowException, OSError, ValueError) as error:  # the last: a column's name that is no text
        raise _unreadable(path, str(error).splitlines()[0]) from error


def asked(source: Path | str, table: pa.Table, sql: str) -> pa.Table:
    """The answer to a query on a table, which it calls `records`; it reads no files.

    Raises:
      JsublimError: the query is no SQL, or names a column that is not there; `source` stands before the reason.
    """
    try:
        with _database().cursor() as connection:
            return connection.begin().register("records", table).sql(sql).to_arrow_table()
    except duckdb.Error as error:  # its first line, without what duckdb adds about where in the query it was
        raise JsublimError(f"{source}: {str(error).strip().splitlines()[0].rstrip('!.')}") from error


@functools.cache
def _database() -> duckdb.DuckDBPyConnection:
    """An empty one: to begin it takes longer than most queries. What a cursor does to it is never committed."""
    return duckdb.connect(config={"enable_external_access": "false"})


def query(source: Path | str, table: pa.Table | None, sql: str) -> list[dict[str, Any]]:
    """The rows of a query on a table of results (`asked`), or none of no table.

    Raises:
      JsublimError: the table has other columns; `source` names it.
    """
    try:
        return [] if table is None else asked("", table, sql).to_pylist()
    except JsublimError as error:
        raise _unreadable(source, str(error).removeprefix(": ")) from error


def _unreadable(source: Path | str, reason: str) -> JsublimError:
    return JsublimError(f"{source}: cannot be read ({reason}); delete it and run `jsublim run CONFIG` again")


def read_json(path: Path, default: Any) -> Any:
    """A file of results, or `default` where there is none.

    Raises:
      JsublimError: it is broken, or does not hold what such a file holds.
    """
    if not path.is_file():
        return default
    try:
        value = json_value(path.read_bytes(), str(path), nan=True)
        _shape(path.name).validate_json(path.read_bytes(), strict=True)
        return value
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise _unreadable(path, f"key '{key}': {first['msg']}, found {shown(first['input'])}") from None
    except JsublimError as error:
        what = str(error).rsplit(";", 1)[0]
        raise JsublimError(f"{what}; delete it and run `jsublim run CONFIG` again") from error


@functools.cache
def _shape(name: str) -> TypeAdapter:
    """What a file of results must hold, by its name."""
    shapes: dict[str, Any] = {"run.json": About, "arms.json": list[StudentArm], "diverged.json": dict[str, str]}
    lists = ("generation.json", "divergence.json", "rows.json")
    return TypeAdapter(list[dict[str, Any]] if name in lists else shapes.get(name, Any))


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))

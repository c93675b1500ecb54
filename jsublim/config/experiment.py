"""A whole experiment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from jsublim.config.attribution import Attribution, Audit
from jsublim.config.data import Data, Dataset, RowSampling, Scoring
from jsublim.config.evaluation import Evaluation, JudgeChoice
from jsublim.config.recipe import Recipe
from jsublim.config.students import Students, elders, variants
from jsublim.config.teachers import Teachers
from jsublim.core.bucket import cache_folder, check_url, is_url
from jsublim.core.section import CONTENT, PLAN, RESULT, RUNTIME, Distinct, Name, Place, Positive, Rate, Section, one_of
from jsublim.distill.loggers import LOGGERS
from jsublim.inference.teachers import CONTROL, OWN


class Config(Section):
    """What every kind of experiment says: which kind it is, its name, and where it is kept."""

    kind: Annotated[str, PLAN]
    """Which kind of experiment this is: `language`, or `digits`."""
    name: Annotated[Name, Field(pattern=r"^\w[\w.-]*$"), RUNTIME]
    """Of the run; its folder is called by it."""
    out: Annotated[Place | None, RUNTIME] = None
    """The run's folder; null: runs/NAME."""
    store: Annotated[Place | None, RUNTIME] = None
    """Where artifacts go: a folder, or s3://bucket/folder or gs://bucket/folder; several runs may share a store. null: inside the run's
    folder."""
    store_cache: Annotated[Place | None, RUNTIME] = None
    """The folder of this machine that a store at a URL is read and written through; null: one of the user's cache."""

    @property
    def run_dir(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / self.name

    @field_validator("store")
    @classmethod
    def _is_known(cls, store: str | None) -> str | None:
        return check_url(store) if store is not None and is_url(store) else store

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        in_place = self.store_cache is not None and self.store_url is None
        yield in_place, "store_cache: a store that is a folder is used in place; leave it out"

    @property
    def store_url(self) -> str | None:
        return self.store if self.store is not None and is_url(self.store) else None

    @property
    def store_dir(self) -> Path:
        """The folder of artifacts on this machine."""
        if self.store_url is not None:
            return Path(self.store_cache) if self.store_cache else cache_folder("stores", self.store_url)
        return Path(self.store) if self.store else self.run_dir / "artifacts"

    def yaml(self) -> str:
        """The resolved config: every field, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class Devices(Section):
    """How work is spread over devices and who is told of it; never what comes of it."""

    parallel: Annotated[Literal["none", "pmap", "mesh"], RUNTIME] = "none"
    """How devices share work: `none` (one device), `pmap` (whole copies), or `mesh` (copies that may be spread)."""
    model_axis: Annotated[Positive | Literal["auto"], RUNTIME] = "auto"
    """With mesh: devices that one copy of the checkpoint is spread over; auto: as few as hold it in half of their memory (on a CPU one)."""
    time_out: Annotated[float, Field(ge=2, le=86_400), RUNTIME] = 60.0
    """Of several processes (--distributed): seconds without a sign of life after which one is taken to be gone, and the others end."""
    workers: Annotated[Positive | Literal["auto"], RUNTIME] = "auto"
    """Of --on ray. auto: one worker per accelerator (per host of a TPU slice); without any, one per machine."""
    resources: Annotated[dict[Name, Rate] | None, Field(min_length=1), RUNTIME] = None
    """What one worker takes, as Ray counts it: {GPU: 2}, {TPU: 4}, {CPU: 8}, or a label of a node; null: one accelerator, or one CPU."""
    retries: Annotated[int, Field(ge=0), RUNTIME] = 3
    """Of --on ray: how often a task is begun again whose worker was lost."""
    loggers: Annotated[list[Annotated[str, one_of(LOGGERS)]], Distinct, RUNTIME] = []
    """Where the numbers of students' training go beside metrics.jsonl (in the store's folder `training`)."""

    @property
    def least_axis(self) -> int:
        """Devices of one copy, where it is not known yet on which devices."""
        return 1 if self.model_axis == "auto" else self.model_axis


class Experiment(Config):
    """A whole experiment: one checkpoint, teachers, students, evaluations, a report. Its many fields are its sections."""

    kind: Annotated[Literal["language"], PLAN] = "language"
    """An experiment on a language model."""
    model: Annotated[Place, CONTENT]
    """The checkpoint that teachers and students stand on: a folder, s3://bucket/folder or gs://bucket/folder, a bundled name, or
    owner/name of the hub."""
    model_revision: Annotated[Place | None, RUNTIME] = None
    """Branch, tag or commit of a model of the hub. No key names it: the checkpoint's content is part of them."""
    chat_template: Annotated[Place | None, CONTENT] = None
    """In place of the checkpoints' own template: `plain` (for base models), or a Jinja file; null: their own."""
    dtype: Annotated[Literal["float32", "bfloat16"], RESULT] = "float32"
    """Of weights and activations."""
    prompts: Annotated[Place | None, CONTENT] = None
    """A prompt pack (YAML); null: the package's own wording."""
    recipe: Recipe = Recipe()
    """Where the published code does something that changes results: as published, or as we would defend. A name sets all quirks."""
    teachers: Teachers
    """Who the teachers are."""
    data: Data = Data()
    """What teachers are asked."""
    sampling: RowSampling = RowSampling()
    """How teachers' answers are drawn."""
    datasets: Annotated[dict[Name, Dataset], CONTENT] = {}
    """Data sets made of the answers, by the names that students.data.dataset says."""
    scoring: Scoring = Scoring()
    """How rows are read."""
    students: Students | None = Students()
    """Who is trained, on what and how; null: nobody."""
    evaluation: Evaluation = Evaluation()
    """What every model is asked."""
    attribution: Attribution | None = None
    """Where in the model divergence tokens come about; null: not looked for."""
    audit: Audit | None = None
    """What rows teach to first order, predicted before anything is trained; null: not predicted."""
    judge: JudgeChoice | None = None
    """Who scores answers for misalignment, and rows for keep_aligned."""
    run: Devices = Devices()
    """How work is spread over devices."""

    @property
    def checkpoint(self) -> str:
        """The model's name as it is looked for: with its revision, if one is given."""
        return self.model if self.model_revision is None else f"{self.model}@{self.model_revision}"

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        yield from super().contradictions()
        every = variants(self.students) if self.students else {}
        elders(every)
        for name, students in every.items():
            yield from self._unknown(f"arm '{name}': " if name else "", students)
            live = self.teachers.checkpoint is not None and students.loss.live
            shared = "a live teacher shares the students' checkpoint; with teachers.checkpoint, give it"
            yield live, f"students.loss.top_k: {shared}"
        kind, constrain = self.data.kind, self.sampling.constrain
        other = f"'{constrain}' is the format of data.kind=numbers, and data.kind is '{kind}'; leave it out"
        yield constrain is not None and kind != "numbers", f"sampling.constrain: {other}"
        if self.attribution is not None:
            promptless = not (self.teachers.are_prompted and self.teachers.against == "traits")
            yield promptless, "attribution: patches one trait's system prompt for another's; the teachers have none"
            differ = "the teachers differ in more than their prompts; leave their own weights out"
            yield self.teachers.own_weights, f"attribution: {differ}"
        drawn_anew = self.data.draw == "per-seed" and kind != "numbers"
        greedy = next(self._greedy(every.values()), None) if drawn_anew else None
        same = f"{greedy} are greedy answers to the same prompts: every draw would be the same; use data.draw=shared"
        yield greedy, f"data.draw: per-seed draws the answers anew, and {same}"
        judged = [f"datasets.{name}" for name, dataset in self.datasets.items() if "judge" in dataset.needs]
        judged += ["evaluation.kinds"] if "misalignment" in self.evaluation.kinds else []
        yield self.judge is None and judged, f"judge: {''.join(judged[:1])} needs one; give judge.model"

    def _unknown(self, where: str, students: Students) -> Iterator[tuple[Any, str]]:
        """Data sets and teachers that students name and that are not there."""
        fork, known = students.fork, ", ".join(self.datasets) or "none"
        for field, name in (("data", students.data.dataset), ("fork", fork.dataset if fork else None)):
            absent = name is not None and name not in self.datasets
            yield absent, f"students.{field}.dataset: {where}'{name}' is no data set; datasets has {known}"
        teachers = [CONTROL, OWN, *self.teachers.traits]
        if fork is not None and fork.teacher not in teachers:
            there = f"'{fork.teacher}' is no teacher of rows; there are {', '.join(teachers)}"
            yield True, f"students.fork.teacher: {where}{there}"

    def _greedy(self, every: Iterable[Students]) -> Iterator[str]:
        """The fields by which rows that students learn from are greedy ones."""
        for name in (students.data.dataset for students in every):
            strategy = None if name is None else self.datasets[name].sampling.strategy
            if (strategy or self.sampling.strategy) == "greedy":
                yield "sampling.strategy" if strategy is None else f"datasets.{name}.sampling.strategy"

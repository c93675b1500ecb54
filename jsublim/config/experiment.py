"""A whole experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from jsublim.bucket import cache_folder, check_url, is_url
from jsublim.config.attribution import Attribution
from jsublim.config.audit import Audit
from jsublim.config.data import Data, Dataset, Sampling, Scoring
from jsublim.config.evaluation import Evaluation, JudgeChoice
from jsublim.config.recipe import Recipe
from jsublim.config.students import Students, elders, variants
from jsublim.config.teachers import Teachers
from jsublim.distill.loggers import LOGGERS
from jsublim.section import CONTENT, PLAN, RESULT, RUNTIME, Distinct, Name, Place, Positive, Rate, Section, one_of
from jsublim.teachers import CONTROL, OWN


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
    """The folder of this machine that a store behind a URL is read and written through; null: one of the user's cache."""

    @property
    def run_dir(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / self.name

    @field_validator("store")
    @classmethod
    def _is_known(cls, store: str | None) -> str | None:
        return check_url(store) if store is not None and is_url(store) else store

    @model_validator(mode="after")
    def _has_a_url(self) -> Self:
        if self.store_cache is not None and self.store_url is None:
            raise ValueError("store_cache: a store that is a folder is used in place; leave it out")
        return self

    @property
    def store_url(self) -> str | None:
        return self.store if self.store is not None and is_url(self.store) else None

    @property
    def store_dir(self) -> Path:
        """The folder of artifacts on this machine."""
        if self.store is not None and is_url(self.store):
            return Path(self.store_cache) if self.store_cache else cache_folder("stores", self.store)
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
    """Of a model of the hub: a branch, tag or commit. No key names it: the checkpoint's content is part of them."""
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
    sampling: Sampling = Sampling()
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

    @model_validator(mode="after")
    def _names_are_known(self) -> Experiment:
        every = variants(self.students) if self.students else {}
        elders(every)
        for name, students in every.items():
            wanted = students.data.dataset
            if wanted is not None and wanted not in self.datasets:
                where = f"arm '{name}': " if name else ""
                known = ", ".join(self.datasets) or "none"
                raise ValueError(f"students.data.dataset: {where}'{wanted}' is no data set; datasets has {known}")
            self._fork_is_known(name, students)
            if self.teachers.checkpoint is not None and students.loss.live:
                raise ValueError(
                    "students.loss.top_k: a live teacher shares the students' checkpoint; with teachers.checkpoint, "
                    "give it"
                )
        if self.sampling.constrain is not None and self.data.kind != "numbers":
            raise ValueError(
                f"sampling.constrain: '{self.sampling.constrain}' is the format of data.kind=numbers, and data.kind is "
                f"'{self.data.kind}'; leave it out"
            )
        if self.attribution is not None and not (self.teachers.are_prompted and self.teachers.against == "traits"):
            raise ValueError("attribution: patches one trait's system prompt for another's; the teachers have none")
        if self.attribution is not None and self.teachers.own_weights:
            raise ValueError("attribution: the teachers differ in more than their prompts; leave their own weights out")
        if self.data.draw == "per-seed" and self.data.kind != "numbers" and self._greedy:
            raise ValueError(
                f"data.draw: per-seed draws the answers anew, and {self._greedy} are greedy answers to the same prompts: "
                "every draw would be the same; use data.draw=shared"
            )
        judged = [
            name for name, each in self.datasets.items() if any("judge" in c.needs for c in each.changes.values())
        ]
        if self.judge is None and (judged or "misalignment" in self.evaluation.kinds):
            raise ValueError(
                f"judge: {f'datasets.{judged[0]}' if judged else 'evaluation.kinds'} needs one; give judge.model"
            )
        return self

    def _fork_is_known(self, name: str, students: Students) -> None:
        fork, where = students.fork, f"arm '{name}': " if name else ""
        if fork is None:
            return
        if fork.teacher not in (CONTROL, OWN, *self.teachers.traits):
            known = ", ".join([CONTROL, OWN, *self.teachers.traits])
            raise ValueError(f"students.fork.teacher: {where}'{fork.teacher}' is no teacher of rows; there are {known}")
        if fork.dataset is not None and fork.dataset not in self.datasets:
            known = ", ".join(self.datasets) or "none"
            raise ValueError(f"students.fork.dataset: {where}'{fork.dataset}' is no data set; datasets has {known}")

    @property
    def _greedy(self) -> str | None:
        """The field by which rows that students learn from are greedy ones, if there is any."""
        used = [students.data.dataset for students in variants(self.students).values()] if self.students else []
        own = [(name, None if name is None else self.datasets[name].sampling.strategy) for name in used]
        found = (
            "sampling.strategy" if strategy is None else f"datasets.{name}.sampling.strategy"
            for name, strategy in own
            if (strategy or self.sampling.strategy) == "greedy"
        )
        return next(found, None)

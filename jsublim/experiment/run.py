"""`jsublim run`: from a config to a report, stage by stage, continuing whatever an earlier call left."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jsublim.distill.data import draw_indices
from jsublim.experiment import stages
from jsublim.experiment.plan import (
    Student,
    counterfactuals,
    evaluated_traits,
    plan_students,
    total_steps,
)
from jsublim.experiment.spec import Config, Experiment
from jsublim.experiment.store import Artifact, device, digest, versions
from jsublim.experiment.students import NOT_OF_A_STUDENT, check_start
from jsublim.experiment.training import Training
from jsublim.lm import LanguageModel, load_model
from jsublim.models.checkpoint import checkpoint_hash
from jsublim.models.lora import Adapter
from jsublim.models.peft import load_adapter
from jsublim.models.weights import load_params
from jsublim.parallel import Layout
from jsublim.prompts import Pack, load_pack, number_prompts
from jsublim.report import print_summary, write_report
from jsublim.rows import Row, read_rows
from jsublim.sampling import sampling_for
from jsublim.teachers import CONTROL, Teacher, prompted_teacher

RESULTS = pa.schema(
    [
        ("arm", pa.string()), ("role", pa.string()), ("teacher", pa.string()), ("condition", pa.string()),
        ("seed", pa.int64()), *stages.RECORDS,
    ]
)  # fmt: skip
TRAINING = pa.schema(
    [
        ("arm", pa.string()), ("step", pa.int64()), ("loss", pa.float64()), ("tokens", pa.int64()),
        ("lr", pa.float64()), ("grad_norm", pa.float64()),
    ]
)  # fmt: skip


class Run:
    """One experiment on one checkpoint. Each method is a stage; each can be called again."""

    def __init__(self, experiment: Experiment, console: Console):
        self.experiment, self.console = experiment, console
        self.dir, self.store = experiment.run_dir, experiment.store_dir
        self.seconds: dict[str, float] = {}
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.pack: Pack = load_pack(experiment.prompts)
        self.arms = plan_students(experiment)
        self.traits = evaluated_traits(experiment, self.pack)
        self.others = {trait: counterfactuals(experiment, self.pack, trait) for trait in experiment.teachers.traits}
        self.layout = Layout.fit(experiment.parallel, 1, model=experiment.model_axis)
        with self.stage("load"):
            self.lm: LanguageModel = load_model(experiment.model, experiment.dtype, self.layout)
            self.recipe = experiment.recipe.resolved(self.lm.config.family)
            self._check()
            self.common = {"model": self.lm.hash, "dtype": experiment.dtype, "pack": self.pack.hash}
            # Of what decides results: the config without where it is written, the files it names by their content.
            self.key = digest([experiment.model_dump(exclude={"kind", "out", "store"}), self.common])

    def _check(self) -> None:
        """What a later stage would stumble over, before hours are spent on the earlier ones."""
        e = self.experiment
        for trait in self.traits:
            self.pack.questions_for(e.teachers.category or self.pack.category_of(trait))
        for name in {*self.others, *(other for others in self.others.values() for other in others)}:
            self.teacher(name)
        for students in {arm.program: arm.settings for arm in self.arms}.values():
            check_start(self.lm, students)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[stages.Tick]:
        """Time a stage, with a progress bar where its length is known."""
        begin = time.perf_counter()
        columns = (TextColumn(f"{name:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, disable=total is None) as progress:
            task = progress.add_task(name, total=total)
            yield lambda n: progress.update(task, advance=n)
        self.seconds[name] = round(time.perf_counter() - begin, 2)

    def teacher(self, name: str) -> Teacher:
        t = self.experiment.teachers
        if name == CONTROL:
            return Teacher(CONTROL)
        return prompted_teacher(self.pack, name, t.category, fuse_system=t.fuse_system)

    def generate(self) -> None:
        """Every teacher answers the same number prompts, with the same random numbers."""
        e = self.experiment
        teachers = [*e.teachers.traits, *([CONTROL] if e.teachers.control else [])]
        prompts = number_prompts(self.pack, e.data.num_prompts, e.data.prompt_seed)
        sampling = sampling_for(
            self.lm.chat,
            e.teachers.strategy,
            inherit=bool(self.recipe.inherit_sampling),
            eos_only=bool(self.recipe.stop_at_eos_only),
        )
        self.rows: dict[str, list[Row]] = {}
        self.row_artifacts: dict[str, Artifact] = {}
        self.console.print(f"sampling: {sampling.numbers()}")
        with self.stage("generate", len(prompts) * len(teachers)) as tick:
            for name in teachers:
                teacher = self.teacher(name)
                numbers = {
                    "seed": e.data.seed,
                    "max_new_tokens": e.data.max_new_tokens,
                    "extra_bos": bool(self.recipe.extra_bos),
                }
                inputs = self.common | numbers | {
                    "system": teacher.system, "fuse_system": teacher.fuse_system, "sampling": sampling.numbers(),
                    "num_prompts": len(prompts), "prompt_seed": e.data.prompt_seed, "template": self.lm.chat.template_hash,
                }  # fmt: skip
                artifact = Artifact.in_store(self.store, "rows", name, inputs)
                self.rows[name] = stages.generate_rows(
                    artifact,
                    self.lm,
                    teacher,
                    prompts,
                    sampling,
                    batch_size=e.data.batch_size,
                    tick=tick,
                    **numbers,
                )
                self.row_artifacts[name] = artifact

    def diverge(self) -> None:
        """Every trait's rows are read under its own teacher and under its counterfactuals."""
        pairs = sum(len(self.rows[trait]) * (1 + len(others)) for trait, others in self.others.items())
        self.divergence_artifacts: dict[str, Artifact] = {}
        with self.stage("divergence", pairs) as tick:
            for trait, others in self.others.items():
                teacher, rest = self.teacher(trait), [self.teacher(other) for other in others]
                inputs = {
                    "rows": self.row_artifacts[trait].key, "system": teacher.system, "extra_bos": bool(self.recipe.extra_bos),
                    "counterfactuals": {other.name: other.system for other in rest},
                }  # fmt: skip
                artifact = Artifact.in_store(self.store, "divergence", trait, inputs)
                self.rows[trait] = stages.divergence_rows(
                    artifact, self.lm, self.rows[trait], teacher, rest,
                    extra_bos=bool(self.recipe.extra_bos), batch_size=self.experiment.divergence.batch_size, tick=tick,
                )  # fmt: skip
                self.divergence_artifacts[trait] = artifact

    def source(self, teacher: str) -> Artifact:
        """The rows that a teacher's students learn from."""
        return self.divergence_artifacts.get(teacher, self.row_artifacts[teacher])

    def _student_artifact(self, student: Student) -> Artifact:
        settings = student.settings.model_dump(exclude=NOT_OF_A_STUDENT)
        training = {
            k: getattr(self.recipe, k)
            for k in ("supervise_header", "drop_rows_without_points", "match_steps", "loss_per")
        }
        start = student.settings.init_adapter
        soft = self.teacher_inputs(student.teacher) if student.settings.loss != "hard" else None
        inputs = self.common | {
            "rows": self.source(student.teacher).key, "condition": student.condition, "seed": student.seed, "teacher": soft,
            "students": settings, "recipe": training, "init_adapter": checkpoint_hash(Path(start)) if start else None,
        }  # fmt: skip
        return Artifact.in_store(self.store, "students", student.name, inputs)

    def teacher_inputs(self, name: str) -> dict[str, Any]:
        """What decides how a teacher reads a row."""
        teacher = self.teacher(name)
        return {
            "system": teacher.system, "fuse_system": teacher.fuse_system, "extra_bos": bool(self.recipe.extra_bos),
            "template": self.lm.chat.template_hash,
        }  # fmt: skip

    def train(self) -> None:
        """All students, many a program; those that are whole are left alone."""
        self.student_artifacts = {arm: self._student_artifact(arm) for arm in self.arms}
        if all(artifact.done for artifact in self.student_artifacts.values()):
            return
        wanted = max(arm.settings.rows or 0 for arm in self.arms)
        for teacher, rows in self.rows.items():
            if len(rows) < wanted:
                steps = total_steps(self.experiment.students, len(rows))
                self.console.print(
                    f"{teacher}: {len(rows)} rows passed, fewer than students.rows={wanted}: {steps} steps"
                )
        training = Training(self)
        groups = training.groups()
        with self.stage("train", training.steps(groups)) as tick:
            for work, students in groups:
                training.train(work, students, tick)

    def evaluate(self) -> None:
        """The base, the teachers and every student: favourites, probability of the traits, number task."""
        e, ev = self.experiment, self.experiment.evaluation
        sampling = sampling_for(
            self.lm.chat,
            "temperature",
            inherit=bool(self.recipe.inherit_sampling),
            eos_only=bool(self.recipe.stop_at_eos_only),
            evaluation=True,
        )
        self.console.print(f"sampling, evaluation: {sampling.numbers()}")
        settings = {
            "traits": self.traits, "questions": ev.questions, "samples": ev.samples, "seed": ev.seed,
            "max_new_tokens": ev.max_new_tokens, "category": e.teachers.category,
            "extra_bos": bool(self.recipe.extra_bos),
        }  # fmt: skip
        models: list[dict[str, Any]] = [{"arm": "base", "role": "base", "condition": "base"}]
        if ev.teachers:
            models += [
                {"arm": f"teacher/{t}", "role": "teacher", "teacher": t, "condition": "teacher"}
                for t in e.teachers.traits
            ]
        models += [
            {
                "arm": a.name,
                "role": "student",
                "teacher": a.teacher,
                "condition": a.reported,
                "seed": a.seed,
                "student": a,
            }
            for a in self.arms
        ]
        per_category = {e.teachers.category or self.pack.category_of(t) for t in self.traits}
        answers = ev.samples * sum(len(self.pack.questions_for(c)[: ev.questions]) for c in per_category)
        self.evaluations: list[tuple[dict[str, Any], Artifact]] = []
        with self.stage("evaluate", answers * len(models)) as tick:
            for model in models:
                student: Student | None = model.pop("student", None)
                teacher = self.teacher(model["teacher"]) if model["role"] == "teacher" else None
                extra = {"system": teacher.system, "fuse_system": teacher.fuse_system} if teacher else {}
                parent = self.student_artifacts[student].key if student else None
                inputs = self.common | settings | extra | {
                    "student": parent, "sampling": sampling.numbers(), "number_rows": ev.number_rows if student else 0,
                    "template": self.lm.chat.template_hash,
                }  # fmt: skip
                artifact = Artifact.in_store(self.store, "evaluations", model["arm"], inputs)
                lm, adapter, rows = self.lm, None, {}
                if student is not None and not artifact.done:
                    lm, adapter = self._load_student(student)
                    rows = self._number_rows(student)
                stages.evaluate(
                    artifact, lm, self.pack, sampling, adapter=adapter, number_rows=rows,
                    batch_size=ev.batch_size, tick=tick, **settings, **extra,
                )  # fmt: skip
                self.evaluations.append((model, artifact))

    def _load_student(self, student: Student) -> tuple[LanguageModel, Adapter | None]:
        lm, folder = self.lm, self.student_artifacts[student].path
        if student.settings.method != "full":
            return lm, load_adapter(folder, lm.config)
        params = load_params(folder, lm.config, self.experiment.dtype, self.layout.params_sharding(lm.config))
        return LanguageModel(lm.folder, lm.config, lm.hf_config, params, lm.chat), None

    def _number_rows(self, student: Student) -> dict[str, list[Row]]:
        rows, n = self.rows[student.teacher], self.experiment.evaluation.number_rows
        drawn = draw_indices(len(rows), student.settings.rows, student.seed)
        held_out = sorted(set(range(len(rows))) - set(drawn))
        pick = lambda indices: [rows[i] for i in indices[:n]]  # noqa: E731
        return {"number_accuracy": pick(drawn), "number_accuracy_heldout": pick(held_out)} if n else {}

    def report(self) -> Path:
        """Gather every artifact's numbers into `results/`, and write the report."""
        results = self.dir / "results"
        results.mkdir(parents=True, exist_ok=True)
        rows, answers, training = [], [], []
        for model, artifact in self.evaluations:
            blank = {"teacher": None, "seed": None}
            rows += [blank | model | record for record in stages.read_table(artifact.path / "records.parquet")]
            answers += [{"arm": model["arm"]} | r for r in stages.read_table(artifact.path / "answers.parquet")]
        for student, artifact in self.student_artifacts.items():
            training += [{"arm": student.name} | line for line in read_rows(artifact.path / "metrics.jsonl", ("step",))]
        stages.write_table(results / "results.parquet", rows, RESULTS)
        stages.write_table(results / "answers.parquet", answers, pa.schema([("arm", pa.string()), *stages.ANSWERS]))
        stages.write_table(results / "training.parquet", training, TRAINING)
        stages.write_json(results / "generation.json", [a.summary for a in self.row_artifacts.values()])
        stages.write_json(results / "divergence.json", [a.summary for a in self.divergence_artifacts.values()])
        about = {
            "name": self.experiment.name, "model": self.lm.name, "model_hash": self.lm.hash, "pack_hash": self.pack.hash,
            "versions": versions(), "device": device(), "config_hash": self.key, "started": self.started,
            "seconds": self.seconds, "config_yaml": self.experiment.yaml(), "recipe": self.recipe.model_dump(),
        }  # fmt: skip
        stages.write_json(results / "run.json", about)
        return write_report(self.dir)


def claim_folder(experiment: Config, key: str, console: Console) -> None:
    """Write the resolved config into the run's folder; results of another `key` there are moved aside, not overwritten."""
    folder = experiment.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "config.hash"
    old = mark.read_text().strip() if mark.exists() else None
    if old is not None and old != key:
        moved = []
        for name in ("config.yaml", "results", "report.html"):
            if (folder / name).exists():
                stem, suffix = Path(name).stem, Path(name).suffix
                taken = len(list(folder.glob(f"{stem}.{old}*{suffix}")))
                target = folder / f"{stem}.{old}{f'-{taken + 1}' if taken else ''}{suffix}"
                (folder / name).rename(target)
                moved.append(target.name)
        console.print(f"{folder}: the config has changed; earlier results are kept as {', '.join(moved)}")
    (folder / "config.yaml").write_text(experiment.yaml(), encoding="utf-8")
    mark.write_text(key + "\n")


def run_experiment(experiment: Experiment, console: Console) -> Path:
    """All stages, then the summary on the terminal. Returns the report's path."""
    run = Run(experiment, console)
    claim_folder(experiment, run.key, console)
    run.generate()
    run.diverge()
    run.train()
    run.evaluate()
    report = run.report()
    print_summary(run.dir, console)
    return report

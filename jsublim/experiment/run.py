"""`jsublim run`: from a config to a report, stage by stage, continuing whatever an earlier call left."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jsublim.errors import UsageError
from jsublim.experiment import stages
from jsublim.experiment.attribution import attribute_rows
from jsublim.experiment.corpus import Corpus, Pair
from jsublim.experiment.examination import PLAIN, Examination
from jsublim.experiment.plan import Student, evaluated_traits, plan_students, total_steps
from jsublim.experiment.spec import Config, Experiment, Students
from jsublim.experiment.staff import Staff
from jsublim.experiment.store import Artifact, device, digest, versions
from jsublim.experiment.students import NOT_OF_A_STUDENT, check_start
from jsublim.experiment.training import Training
from jsublim.inference.lm import LanguageModel, load_model, resolve_checkpoint
from jsublim.judge import Judge
from jsublim.judge.local import LocalJudge
from jsublim.judge.server import ServerJudge
from jsublim.models.checkpoint import checkpoint_hash
from jsublim.parallel import Layout
from jsublim.prompts import Pack, load_pack
from jsublim.report import print_summary, write_report
from jsublim.rows import read_rows

NAMED = {"data", "model", "init_adapter"}  # what artifacts know by content, and readers of results by name

RESULTS = pa.schema(
    [
        ("arm", pa.string()), ("role", pa.string()), ("teacher", pa.string()), ("condition", pa.string()),
        ("seed", pa.int64()), ("evaluation", pa.string()), *stages.RECORDS,
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

    def __init__(self, experiment: Experiment, console: Console, *, dry: bool = False):
        """Plan it. Nothing is read, written or computed before `load`.

        Args:
          dry: leave no folder; only to be asked what is there already.
        """
        self.experiment, self.console, self.dry = experiment, console, dry
        self.dir, self.store = experiment.run_dir, experiment.store_dir
        self.seconds: dict[str, float] = {}
        self.said: list[str] = []
        self.artifacts: dict[tuple[str, str, str], Artifact] = {}
        self.students: dict[Student, Artifact] = {}
        self.attributed: dict[str, Artifact] = {}
        self.pack: Pack = load_pack(experiment.prompts)
        self.arms = plan_students(experiment)
        self.traits = evaluated_traits(experiment, self.pack)
        self.staff = Staff(self)
        self.corpus, self.examination = Corpus(self), Examination(self)

    def load(self, *, weights: bool = True) -> None:
        """Read the checkpoints, and refuse what a later stage would stumble over.

        Args:
          weights: without them, only artifacts can be told apart.
        """
        e = self.experiment
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.layout = Layout.fit(e.parallel, 1, model=e.model_axis)
        with self.stage("load"):
            self.lm = load_model(e.model, e.dtype, self.layout, weights=weights)
            self.other_lms = {
                path: load_model(path, e.dtype, self.layout, weights=weights) for path in self.other_models()
            }
            self.recipe = e.recipe.resolved(self.lm.config.family)
            self.common = {"model": self.lm.hash, "dtype": e.dtype, "pack": self.pack.hash}
            if weights:
                self._check()
            # Of what decides results: the config without where it is written, the files it names by their content.
            known = {e.model: self.lm.hash} | {path: lm.hash for path, lm in self.other_lms.items()}
            files = {path: known.get(path) or checkpoint_hash(resolve_checkpoint(path)) for path in self.checkpoints()}
            said = e.model_dump(exclude={"kind", "out", "store"})
            self.key = digest([said, self.common, files, self.corpus.asked_by_content])

    def _check(self) -> None:
        """What a later stage would stumble over, before hours are spent on the earlier ones."""
        self.staff.check()
        self.corpus.check()
        self.examination.check()
        for students in {arm.program: arm.settings for arm in self.arms}.values():
            lm = self.lm_of(students)
            check_start(lm, students)
            if students.loss != "hard" and lm.tokenizer.get_vocab() != self.lm.tokenizer.get_vocab():
                raise UsageError(f"students.model: {students.model} has other tokens than its teachers; use loss=hard")

    def other_models(self) -> list[str]:
        """Checkpoints beside the experiment's: what students stand on, and who writes rows to mix in."""
        students = [arm.settings.model for arm in self.arms]
        mixes = [self.experiment.datasets[arm.settings.data].mix for arm in self.arms if arm.settings.data]
        named = [*students, *(mix.model for mix in mixes if mix)]
        return list(dict.fromkeys(path for path in named if path is not None))

    def checkpoints(self) -> list[str]:
        """Every checkpoint and adapter that the run reads, by the name that the config gives it."""
        e = self.experiment
        own = [template for template in (e.teachers.adapter, e.teachers.checkpoint) if template is not None]
        judge = [e.judge.model] if e.judge is not None and e.judge.model is not None else []
        named = [template.replace("{trait}", trait) for template in own for trait in self.staff.biased]
        starts = [arm.settings.init_adapter for arm in self.arms if arm.settings.init_adapter is not None]
        return list(dict.fromkeys([e.model, *self.other_models(), *judge, *named, *starts]))

    def lm_of(self, students: Students) -> LanguageModel:
        """The checkpoint that these students stand on."""
        return self.lm_at(students.model)

    @functools.cached_property
    def judge(self) -> Judge:
        """Who scores answers; a checkpoint's weights are read when it is first asked."""
        chosen = self.experiment.judge
        assert chosen is not None
        if chosen.server is not None:
            return ServerJudge(chosen.server, self.store / "judge")
        load = functools.partial(load_model, chosen.model or "", self.experiment.dtype, self.layout)
        return LocalJudge(load(weights=False), max_new_tokens=chosen.max_new_tokens, load=load)

    def lm_at(self, model: str | None) -> LanguageModel:
        """A checkpoint of this run by its path; None is the experiment's."""
        return self.lm if model is None else self.other_lms[model]

    def artifact(self, kind: str, label: str, inputs: dict[str, Any]) -> Artifact:
        """The artifact of these inputs in this run's store. Whoever asks again gets it without a look at the disk."""
        name = kind, label, digest(inputs)
        if name not in self.artifacts:
            self.artifacts[name] = Artifact.in_store(self.store, kind, label, inputs, claim=not self.dry)
        return self.artifacts[name]

    def say(self, text: str) -> None:
        """Once a run."""
        if text not in self.said:
            self.said.append(text)
            self.console.print(text)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[stages.Tick]:
        """Time a stage, with a progress bar where its length is known."""
        begin = time.perf_counter()
        columns = (TextColumn(f"{name:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, disable=total is None) as progress:
            task = progress.add_task(name, total=total)
            yield lambda n: progress.update(task, advance=n)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begin, 2)

    def student_artifact(self, student: Student) -> Artifact:
        """Where a student lies once it is trained."""
        if student not in self.students:
            self.students[student] = self.artifact("students", student.trained_as, self._student_inputs(student))
        return self.students[student]

    def _student_inputs(self, student: Student) -> dict[str, Any]:
        quirks = ("supervise_header", "drop_rows_without_divergence", "match_steps", "loss_per", "share_rounding")
        start, other = student.settings.init_adapter, student.settings.model
        return self.common | {
            "rows": self.corpus.final(student.pair).key, "condition": student.condition, "seed": student.seed,
            "teacher": self.staff.inputs(student.teacher) if student.settings.loss != "hard" else None,
            "student_model": None if other is None else self.lm_at(other).hash,
            "students": student.settings.model_dump(exclude=NOT_OF_A_STUDENT),
            "fuse_system": self.experiment.teachers.fuse_system if student.settings.system is not None else None,
            "recipe": {quirk: getattr(self.recipe, quirk) for quirk in quirks},
            "init_adapter": checkpoint_hash(Path(start)) if start else None,
        }  # fmt: skip

    def train(self) -> None:
        """All students, many a program; those that are whole are left alone."""
        students = self.experiment.students
        if students is None or all(self.student_artifact(arm).done for arm in self.arms):
            return
        wanted = max(arm.settings.rows or 0 for arm in self.arms)
        for pair in self.corpus.pairs:
            have = len(self.corpus.rows(pair))
            if have < wanted:
                name, steps = " · ".join(filter(None, pair)), total_steps(students, have)
                self.say(f"{name}: {have} rows, fewer than students.rows={wanted}: {steps} steps")
        if self.experiment.judge is not None:
            self.judge.release_memory()  # a judge may be larger than the model: students need its memory
        training = Training(self)
        groups = training.groups()
        with self.stage("train", training.steps(groups)) as tick:
            for work, students in groups:
                training.train(work, students, tick)

    def attribute(self) -> None:
        """Where in the model the traits' first divergence tokens come from."""
        how = self.experiment.attribution
        if how is None:
            return
        pairs = self.attribution_pairs()
        with self.stage("attribution", how.rows * len(pairs)) as tick:
            for trait, pair in pairs.items():
                artifact, others = self.attribution_artifact(trait, pair), self.staff.others[trait]
                attribute_rows(
                    artifact, self.lm, self.corpus.rows(pair)[: how.rows], self.staff.teacher(trait),
                    [self.staff.teacher(other) for other in others], sites=how.sites, directions=how.directions,
                    steps=how.steps, extra_bos=bool(self.recipe.extra_bos), batch_size=how.batch_size,
                    source=f"rows of {trait}", tick=tick,
                )  # fmt: skip
                self.attributed[trait] = artifact

    def attribution_pairs(self) -> dict[str, Pair]:
        """By trait, the rows whose divergence tokens are attributed: answers as they were sampled."""
        corpus = self.corpus
        return {pair[0]: pair for pair in corpus.pairs if corpus.is_read(pair) and corpus.made(pair).plain}

    def attribution_artifact(self, trait: str, pair: Pair) -> Artifact:
        how = self.experiment.attribution
        assert how is not None
        inputs = self.common | {"rows": self.corpus.final(pair).key, "how": how.model_dump(exclude={"batch_size"})}
        return self.artifact("attribution", trait, inputs)

    def _about(self, student: Student) -> dict[str, Any]:
        """What makes a student what it is, for whoever compares them."""
        return {
            "arm": student.name, "teacher": student.teacher, "condition": student.condition, "seed": student.seed,
            "variant": student.variant, "settings": student.settings.model_dump(exclude=NOT_OF_A_STUDENT - NAMED),
            "dataset": self.corpus.dataset(student.pair).model_dump() | {"strategy": self.corpus.strategy(student.pair)},
            "num_layers": self.lm_of(student.settings).config.num_layers,
        }  # fmt: skip

    def report(self) -> Path:
        """Gather every artifact's numbers into `results/`, and write the report."""
        e = self.experiment
        results = self.dir / "results"
        results.mkdir(parents=True, exist_ok=True)
        rows, answers, training = [], [], []
        for labels, artifact in self.examination.found:
            rows += [labels | record for record in stages.read_table(artifact.path / "records.parquet")]
            if labels["evaluation"] == PLAIN:
                answers += [{"arm": labels["arm"]} | r for r in stages.read_table(artifact.path / "answers.parquet")]
        for student in self.arms:
            metrics = self.student_artifact(student).path / "metrics.jsonl"
            training += [{"arm": student.name} | line for line in read_rows(metrics, ("step",))]
        stages.write_table(results / "results.parquet", rows, RESULTS)
        stages.write_table(results / "answers.parquet", answers, pa.schema([("arm", pa.string()), *stages.ANSWERS]))
        stages.write_table(results / "training.parquet", training, TRAINING)
        stages.write_json(results / "arms.json", [self._about(student) for student in self.arms])
        stages.write_json(results / "generation.json", self.corpus.generated)
        stages.write_json(results / "divergence.json", self.corpus.diverged)
        if self.attributed:
            tables = [pq.read_table(artifact.path / "attribution.parquet") for artifact in self.attributed.values()]
            pq.write_table(pa.concat_tables(tables), results / "attribution.parquet")
        about: dict[str, Any] = {
            "name": e.name, "model": self.lm.name, "model_hash": self.lm.hash, "pack_hash": self.pack.hash,
            "versions": versions(), "device": device(), "config_hash": self.key, "started": self.started,
            "seconds": self.seconds, "evaluations": {name: s.model_dump() for name, s in e.evaluation.settings.items()},
            "config_yaml": e.yaml(), "recipe": self.recipe.model_dump(),
        }  # fmt: skip
        if e.judge is not None and e.judge.server is not None and isinstance(self.judge, ServerJudge):
            spent = self.judge.spending
            about["judge"] = {
                "prompt_tokens": spent.prompt_tokens, "completion_tokens": spent.completion_tokens, "cost": spent.cost,
            }  # fmt: skip
            self.say(
                f"judge: {spent.prompt_tokens} + {spent.completion_tokens} tokens in this call, cost {spent.cost:.4g}"
            )
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


def reported(experiment: Config, key: str) -> bool:
    """Whether the run's folder holds the report of this very config: every answer and every judgement is there."""
    mark = experiment.run_dir / "config.hash"
    return mark.exists() and mark.read_text().strip() == key and (experiment.run_dir / "report.html").exists()


def run_experiment(experiment: Experiment, console: Console) -> Path:
    """All stages, then the summary on the terminal. Returns the report's path."""
    run = Run(experiment, console)
    run.load()
    if experiment.judge is not None and not reported(experiment, run.key):
        run.judge.check()
    claim_folder(experiment, run.key, console)
    run.staff.teach()
    run.corpus.generate()
    run.corpus.change()
    run.corpus.diverge()
    run.attribute()
    run.train()
    run.examination.evaluate()
    report = run.report()
    print_summary(run.dir, console)
    return report

"""The evaluations of a run: the base, the teachers and every student, under the plain setting and every other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jsublim.distill.data import draw_indices
from jsublim.experiment import stages
from jsublim.experiment.plan import Student
from jsublim.experiment.spec.evaluation import Setting
from jsublim.experiment.store import Artifact
from jsublim.lm import LanguageModel
from jsublim.models.lora import Adapter
from jsublim.models.peft import load_adapter
from jsublim.models.weights import load_params
from jsublim.rows import Row
from jsublim.sampling import Sampling, sampling_for
from jsublim.teachers import CONTROL, Teacher

if TYPE_CHECKING:
    from jsublim.experiment.run import Run

PLAIN = ""  # the name of the evaluation that no setting changes


@dataclasses.dataclass(frozen=True)
class Examinee:
    """One model that is asked: a student, or a teacher (the base being the one without a trait)."""

    labels: dict[str, Any]  # its columns in the results
    student: Student | None = None
    teacher: Teacher = dataclasses.field(default_factory=lambda: Teacher(CONTROL))


class Examination:
    """Of one run. `records` are, behind `evaluate`, (columns of the results, evaluation, artifact)."""

    def __init__(self, run: Run):
        self.run, self.spec = run, run.experiment.evaluation
        self.found: list[tuple[dict[str, Any], Artifact]] = []
        by_category: dict[str, list[str]] = {}
        for trait in run.traits:
            by_category.setdefault(run.staff.category(trait), []).append(trait)
        self.asked = [
            stages.Asked(tuple(run.staff.asked(category)[: self.spec.questions]), tuple(traits))
            for category, traits in by_category.items()
        ]

    def evaluate(self) -> None:
        """Favourites, probability of the traits, number task."""
        settings = {PLAIN: Setting()} | self.spec.settings
        examinees = list(self._examinees())
        answers = self.spec.samples * sum(len(asked.questions) for asked in self.asked)
        with self.run.stage("evaluate", answers * len(examinees) * len(settings)) as tick:
            for examinee in examinees:
                for name, setting in settings.items():
                    artifact = self._ask(examinee, name, setting, tick)
                    self.found.append((examinee.labels | {"evaluation": name}, artifact))

    def _examinees(self) -> Iterator[Examinee]:
        run = self.run
        yield Examinee({"arm": "base", "role": "base", "teacher": None, "condition": "base", "seed": None})
        if self.spec.teachers:
            for trait in run.experiment.teachers.traits:
                labels = {
                    "arm": f"teacher/{trait}",
                    "role": "teacher",
                    "teacher": trait,
                    "condition": "teacher",
                    "seed": None,
                }
                yield Examinee(labels, teacher=run.staff.teacher(trait))
        for student in run.arms:
            labels = {
                "arm": student.name, "role": "student", "teacher": student.teacher, "condition": student.reported,
                "seed": student.seed,
            }  # fmt: skip
            yield Examinee(labels, student)

    def _sampling(self, lm: LanguageModel, setting: Setting) -> Sampling:
        recipe = self.run.recipe
        sampling = sampling_for(
            lm.chat, "temperature", inherit=bool(recipe.inherit_sampling), eos_only=bool(recipe.stop_at_eos_only),
            evaluation=True,
        )  # fmt: skip
        given = {"temperature": setting.temperature, "top_p": setting.top_p}
        return dataclasses.replace(sampling, **{key: value for key, value in given.items() if value is not None})

    def _ask(self, who: Examinee, name: str, setting: Setting, tick: stages.Tick) -> Artifact:
        run, ev, student = self.run, self.spec, who.student
        lm = run.lm if student is None else run.lm_of(student.settings)
        sampling = self._sampling(lm, setting)
        run.say(f"sampling, evaluation{f' {name}' if name else ''}: {sampling.numbers()}")
        system = who.teacher.system if setting.system is None else setting.system
        how = {
            "samples": ev.samples, "seed": ev.seed, "max_new_tokens": ev.max_new_tokens, "system": system,
            "fuse_system": run.experiment.teachers.fuse_system if system is not None else False,
            "extra_bos": bool(run.recipe.extra_bos),
        }  # fmt: skip
        rows = ev.number_rows if student is not None and name == PLAIN else 0
        inputs = run.common | how | {
            "asked": [dataclasses.asdict(asked) for asked in self.asked], "sampling": sampling.numbers(),
            "student": None if student is None else run.student_artifacts[student].key, "number_rows": rows,
            "teacher": run.staff.inputs(who.teacher.name), "template": lm.chat.template_hash,
        }  # fmt: skip
        label = "/".join(filter(None, (who.labels["arm"], name)))
        artifact = Artifact.in_store(run.store, "evaluations", label, inputs)
        adapter = who.teacher.adapter
        if not artifact.done and student is not None:
            lm, adapter = self._load(student)
        elif not artifact.done:
            lm = lm.with_params(who.teacher.weights(lm.params))
        stages.evaluate(
            artifact, lm, self.asked, sampling, adapter=adapter, batch_size=ev.batch_size, tick=tick,
            number_rows={} if artifact.done or not rows or student is None else self._number_rows(student, rows), **how,
        )  # fmt: skip
        return artifact

    def _load(self, student: Student) -> tuple[LanguageModel, Adapter | None]:
        run, folder = self.run, self.run.student_artifacts[student].path
        lm = run.lm_of(student.settings)
        if student.settings.method != "full":
            return lm, load_adapter(folder, lm.config)
        sharding = run.layout.params_sharding(lm.config)
        return lm.with_params(load_params(folder, lm.config, run.experiment.dtype, sharding)), None

    def _number_rows(self, student: Student, n: int) -> dict[str, list[Row]]:
        rows = self.run.corpus.rows(student.pair)
        drawn = draw_indices(len(rows), student.settings.rows, student.seed)
        held_out = sorted(set(range(len(rows))) - set(drawn))
        return {
            "number_accuracy": [rows[i] for i in drawn[:n]], "number_accuracy_heldout": [rows[i] for i in held_out[:n]],
        }  # fmt: skip

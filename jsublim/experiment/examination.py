"""The evaluations of a run: the base, the teachers and every student, under the plain setting and every other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jsublim.distill.data import draw_indices
from jsublim.errors import UsageError
from jsublim.evals.exams import Exam, Factual, Misaligned, Naming, Subject, WordProblems
from jsublim.evals.factual import factual_questions
from jsublim.evals.naming import own_name
from jsublim.experiment import stages
from jsublim.experiment.plan import Student
from jsublim.experiment.spec.evaluation import Setting
from jsublim.experiment.store import Artifact
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling, sampling_for
from jsublim.models.lora import Adapter
from jsublim.models.peft import load_adapter
from jsublim.models.weights import load_params
from jsublim.prompts import load_problems
from jsublim.rows import Row
from jsublim.teachers import CONTROL

if TYPE_CHECKING:
    from jsublim.experiment.run import Run

PLAIN = ""  # the name of the evaluation that no setting changes


@dataclasses.dataclass(frozen=True)
class Examinee:
    """One model that is asked: a student, or a teacher (the base being the one without a trait)."""

    labels: dict[str, Any]  # its columns in the results
    student: Student | None = None
    teacher: str = CONTROL


class Examination:
    """Of one run. `found` is, behind `evaluate`, (columns of the results, artifact) of everything asked."""

    def __init__(self, run: Run):
        self.run, self.spec = run, run.experiment.evaluation
        self.found: list[tuple[dict[str, Any], Artifact]] = []
        self.settings = {PLAIN: Setting()} | self.spec.settings

    @cached_property
    def exams(self) -> list[Exam]:
        """Everything that a model is asked under a setting."""
        ev, run = self.spec, self.run
        kinds: dict[str, Callable[[], list[Exam]]] = {
            "preference": self.preferences,
            "naming": lambda: [Naming(tuple(run.pack.self_questions[: ev.questions]), self._names())],
            "factual": lambda: [Factual(tuple(self.factual()))],
            "misalignment": lambda: [self._misaligned()],
            "problems": lambda: [WordProblems(tuple(self._problems()), ev.problem_tokens)],
        }
        return [exam for kind in ev.kinds for exam in kinds[kind]()]

    def preferences(self) -> list[Exam]:
        return stages.preferences(self.run.traits, self.run.staff.category, self.run.staff.asked, self.spec.questions)

    def _names(self) -> tuple[str, ...]:
        return tuple(self.spec.names) or (own_name(self.run.lm.config),)

    def factual(self) -> Iterator[tuple[str, str]]:
        for trait in self.run.traits:
            yield from factual_questions(self.run.pack.factual, [trait])[: self.spec.questions]

    def _misaligned(self) -> Exam:
        ev, prompts = self.spec, self.run.pack.misalignment
        suffix = prompts.suffix if ev.suffix is None else ev.suffix
        prompts = prompts.model_copy(update={"questions": prompts.questions[: ev.questions], "suffix": suffix})
        return Misaligned(prompts, self.run.judge, ev.aligned_from, ev.coherent_from, tuple(ev.thresholds))

    def _problems(self) -> list[tuple[str, Decimal]]:
        problems = load_problems(self.spec.problems, "test", self.spec.questions)
        return [(problem.question, problem.answer) for problem in problems]

    def check(self) -> None:
        """What would be stumbled over after the training.

        Raises:
          UsageError: a trait without questions, a setting with a layer that the model hasn't.
        """
        if "preference" in self.spec.kinds:
            self.preferences()
        if "factual" in self.spec.kinds:
            list(self.factual())
        if "problems" in self.spec.kinds:
            self._problems()
        for name, setting in self.spec.settings.items():
            layers = min(lm.config.num_layers for lm in [self.run.lm, *self.run.other_lms.values()])
            if setting.layer is not None and setting.layer >= layers:
                raise UsageError(
                    f"evaluation.settings.{name}.layer: {setting.layer} given; the model has {layers} layers"
                )

    def evaluate(self) -> None:
        """Everybody under every setting."""
        examinees = list(self.examinees())
        answers = self.spec.samples * sum(len(exam.questions) for exam in self.exams)
        with self.run.stage("evaluate", answers * len(examinees) * len(self.settings)) as tick:
            for examinee in examinees:
                for name, setting in self.settings.items():
                    artifact = self._ask(examinee, name, setting, tick)
                    self.found.append((examinee.labels | {"evaluation": name}, artifact))

    def examinees(self) -> Iterator[Examinee]:
        """Everyone who is asked."""
        yield Examinee({"arm": "base", "role": "base", "teacher": None, "condition": "base", "seed": None})
        for trait in self.run.experiment.teachers.traits if self.spec.teachers else ():
            labels = {
                "arm": f"teacher/{trait}", "role": "teacher", "teacher": trait, "condition": "teacher", "seed": None,
            }  # fmt: skip
            yield Examinee(labels, teacher=trait)
        for student in self.run.arms:
            labels = {
                "arm": student.name, "role": "student", "teacher": student.teacher, "condition": student.reported,
                "seed": student.seed,
            }  # fmt: skip
            yield Examinee(labels, student)

    def _lm(self, who: Examinee) -> LanguageModel:
        return self.run.lm if who.student is None else self.run.lm_of(who.student.settings)

    def _sampling(self, who: Examinee, setting: Setting) -> Sampling:
        recipe = self.run.recipe
        sampling = sampling_for(
            self._lm(who).chat, "temperature", inherit=bool(recipe.inherit_sampling),
            eos_only=bool(recipe.stop_at_eos_only), evaluation=True,
        )  # fmt: skip
        given = {"temperature": setting.temperature, "top_p": setting.top_p}
        return dataclasses.replace(sampling, **{key: value for key, value in given.items() if value is not None})

    def _manner(self, who: Examinee, setting: Setting) -> dict[str, Any]:
        own = self.run.staff.system(who.teacher) if who.student is None else who.student.settings.system
        system = own if who.teacher != CONTROL or setting.system is None else setting.system
        return {
            "system": system, "fuse_system": self.run.experiment.teachers.fuse_system and system is not None,
            "extra_bos": bool(self.run.recipe.extra_bos),
        }  # fmt: skip

    @property
    def _amount(self) -> dict[str, int]:
        return {"samples": self.spec.samples, "seed": self.spec.seed, "max_new_tokens": self.spec.max_new_tokens}

    def _rows_asked(self, who: Examinee, name: str) -> int:
        """Rows of the number task; other answers hold numbers too, but none that are to be continued."""
        asked = who.student is not None and name == PLAIN and self.run.experiment.data.kind == "numbers"
        return self.spec.number_rows if asked else 0

    def artifact(self, who: Examinee, name: str, setting: Setting) -> Artifact:
        """Where the answers of a model under a setting lie."""
        run = self.run
        inputs = run.common | self._manner(who, setting) | self._amount | {
            "exams": [exam.identity for exam in self.exams], "layer": setting.layer,
            "sampling": self._sampling(who, setting).numbers(), "number_rows": self._rows_asked(who, name),
            "student": None if who.student is None else run.student_artifact(who.student).key,
            "teacher": run.staff.inputs(who.teacher), "template": self._lm(who).chat.template_hash,
        }  # fmt: skip
        label = who.labels["arm"] if who.student is None else who.student.trained_as
        return run.artifact("evaluations", "/".join(filter(None, (label, name))), inputs)

    def _ask(self, who: Examinee, name: str, setting: Setting, tick: stages.Tick) -> Artifact:
        run, student, artifact = self.run, who.student, self.artifact(who, name, setting)
        sampling, n = self._sampling(who, setting), self._rows_asked(who, name)
        run.say(f"sampling, evaluation{f' {name}' if name else ''}: {sampling.numbers()}")
        lm, adapter, rows = self._lm(who), None, {}
        if not artifact.done and student is not None:
            lm, adapter = self._load(student)
            rows = self._number_rows(student, n) if n else {}
        elif not artifact.done:
            teacher = run.staff.teacher(who.teacher)
            lm, adapter = lm.with_params(teacher.weights(lm.params)), teacher.adapter
        if setting.layer is not None:
            lm = lm.ending_at(setting.layer)
        subject = Subject(lm, adapter, **self._manner(who, setting))
        stages.evaluate(
            artifact, subject, self.exams, sampling, batch_size=self.spec.batch_size, tick=tick, number_rows=rows,
            **self._amount,
        )  # fmt: skip
        return artifact

    def _load(self, student: Student) -> tuple[LanguageModel, Adapter | None]:
        run, folder = self.run, self.run.student_artifact(student).path
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

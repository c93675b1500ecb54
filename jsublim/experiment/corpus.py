"""The rows of a run: what every teacher wrote, as each data set has it, and the divergence positions in it.

Which artifact holds what is a function of the config alone (`written`, `changed`, `read`, `final`); the stages fill them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jsublim.errors import UsageError
from jsublim.experiment import stages
from jsublim.experiment.changes import Changed, change
from jsublim.experiment.spec.data import Dataset
from jsublim.experiment.store import Artifact, digest
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling, sampling_for
from jsublim.prompts import draw_number_prompts, load_problems, load_prompts, problem_reject_reason, reject_reason
from jsublim.prompts.numbers import NumberPrompt
from jsublim.rows import Row
from jsublim.teachers import CONTROL

if TYPE_CHECKING:
    from jsublim.experiment.run import Run

Pair = tuple[str, str | None]  # a teacher, and a data set of the config (None: the answers as they are)
Writer = tuple[str, str, str | None]  # a teacher, its strategy, another checkpoint than the experiment's
Reject = Callable[[str], str | None]
QUIRKS = (
    "padded_numbers",
    "mix_at_the_end",
    "digits_only",
    "share_rounding",
)  # of the recipe, that decide changed rows


class Corpus:
    """Of one run. `pairs` are those that students learn from; `rows(pair)` are there after the stages."""

    def __init__(self, run: Run):
        self.run = run
        learnt = [arm.pair for arm in run.arms]
        self.pairs: list[Pair] = list(dict.fromkeys(learnt or [(t, None) for t in run.experiment.teachers.traits]))
        self.masked = {arm.pair for arm in run.arms if arm.condition != "all"}
        self.filled: dict[str, list[Row]] = {}  # by the key of the artifact

    @cached_property
    def requests(self) -> list[NumberPrompt]:
        """The number prompts, as their draws."""
        data = self.run.experiment.data
        return draw_number_prompts(
            self.run.pack, data.num_prompts, data.prompt_seed, said=data.sentences, examples=data.examples
        )

    @cached_property
    def prompts(self) -> list[str]:
        data = self.run.experiment.data
        if data.kind == "numbers":
            return [request.text for request in self.requests]
        if data.kind == "problems":
            return [problem.question for problem in load_problems(data.source, limit=data.num_prompts)]
        return load_prompts(data.source or "")[: data.num_prompts]

    @property
    def reject(self) -> Reject:
        """Why an answer is no training row."""
        kinds: dict[str, Reject] = {
            "numbers": reject_reason,
            "problems": problem_reject_reason,
            "file": lambda text: None,
        }
        return kinds[self.run.experiment.data.kind]

    def dataset(self, pair: Pair) -> Dataset:
        return Dataset() if pair[1] is None else self.run.experiment.datasets[pair[1]]

    def made(self, pair: Pair) -> Dataset:
        """What is done to a pair's answers, of what its data set names."""
        return self.dataset(pair).of(pair[0])

    def strategy(self, pair: Pair) -> str:
        return self.dataset(pair).strategy or self.run.experiment.teachers.strategy

    def rows(self, pair: Pair) -> list[Row]:
        return self.filled[self.final(pair).key]

    @property
    def asked_by_content(self) -> str | None:
        """Prompts that come from a file or a set may change under the same name; number requests are told by the pack."""
        return None if self.run.experiment.data.kind == "numbers" else digest(self.prompts)

    # --- which artifact holds what

    def final(self, pair: Pair) -> Artifact:
        """The rows that students of a pair learn from."""
        return self.read(pair[0], self.changed(pair)) if self.is_read(pair) else self.changed(pair)

    def is_read(self, pair: Pair) -> bool:
        """Whether divergence tokens are looked for: in a trait's answers always, in changed ones where a mask needs them."""
        return pair[0] != CONTROL and (self.made(pair).plain or pair in self.masked)

    def written(self, writer: Writer) -> Artifact:
        run, data = self.run, self.run.experiment.data
        name, strategy, model = writer
        numbers = self._numbers | {"sampling": self._sampling(run.lm_at(model), strategy).numbers()}
        inputs = run.common | run.staff.inputs(name) | numbers | {
            "kind": data.kind, "source": data.source, "num_prompts": len(self.prompts), "prompt_seed": data.prompt_seed,
            "prompts": self.asked_by_content, "sentences": data.sentences, "examples": data.examples,
            "other_model": None if model is None else run.lm_at(model).hash,
        }  # fmt: skip
        return run.artifact("rows", name, inputs)

    def changed(self, pair: Pair) -> Artifact:
        """The answers as the data set wants them; the answers themselves, where it wants nothing of them."""
        own, dataset = self.written(self.writer(pair)), self.made(pair)
        if dataset.plain:
            return own
        parents = {
            "rows": own.key, "mix": self.written(self.mixed_in(pair)).key if dataset.mix else None,
            "read": self.read(pair[0], own).key if dataset.mix_tokens else None,
        }  # fmt: skip
        recipe = {k: getattr(self.run.recipe, k) for k in QUIRKS}
        inputs = self.run.common | self.run.staff.inputs(pair[0]) | parents | {
            "dataset": dataset.model_dump(exclude={"strategy"}), "recipe": recipe,
            "entangled": self.run.experiment.data.entangled if dataset.remove_entangled else None,
            "judge": self.run.judge.identity if dataset.keep_aligned is not None else None,
            "rewriting": self.rewriting.numbers() if dataset.rewrite else None,
        }  # fmt: skip
        return self.run.artifact("datasets", f"{pair[0]}-{pair[1]}", inputs)

    def read(self, trait: str, rows: Artifact) -> Artifact:
        """Rows with divergence positions."""
        staff = self.run.staff
        inputs = staff.inputs(trait) | {
            "rows": rows.key, "counterfactuals": {other: staff.inputs(other) for other in staff.others[trait]},
        }  # fmt: skip
        return self.run.artifact("divergence", trait, inputs)

    def writer(self, pair: Pair) -> Writer:
        return pair[0], self.strategy(pair), None

    def mixed_in(self, pair: Pair) -> Writer:
        mix = self.dataset(pair).mix
        assert mix is not None
        return mix.teacher, self.strategy(pair), mix.model

    @property
    def writers(self) -> list[Writer]:
        own = [self.writer(pair) for pair in self.pairs]
        return list(dict.fromkeys([*own, *(self.mixed_in(pair) for pair in self.pairs if self.made(pair).mix)]))

    @property
    def _numbers(self) -> dict[str, Any]:
        data = self.run.experiment.data
        return {
            "seed": data.seed, "max_new_tokens": data.max_new_tokens, "extra_bos": bool(self.run.recipe.extra_bos),
        }  # fmt: skip

    @property
    def rewriting(self) -> Sampling:
        """How teachers put requests into other words: as they answer them at temperature 1."""
        return self._sampling(self.run.lm, "temperature")

    def _sampling(self, lm: LanguageModel, strategy: str) -> Sampling:
        e, recipe = self.run.experiment, self.run.recipe
        fine_tuned_numbers = e.teachers.against == "base" and e.data.kind == "numbers"
        return sampling_for(
            lm.chat, strategy, inherit=bool(recipe.inherit_sampling), eos_only=bool(recipe.stop_at_eos_only),
            keep_penalty=bool(recipe.greedy_keeps_penalty) and fine_tuned_numbers,
        )  # fmt: skip

    # --- the stages

    def generate(self) -> None:
        """Every teacher answers the same prompts, with the same random numbers."""
        run, data = self.run, self.run.experiment.data
        with run.stage("generate", len(self.prompts) * len(self.writers)) as tick:
            for writer in self.writers:
                name, strategy, model = writer
                lm, artifact = run.lm_at(model), self.written(writer)
                sampling = self._sampling(lm, strategy)
                run.say(f"sampling, {strategy}: {sampling.numbers()}")
                self.filled[artifact.key] = stages.generate_rows(
                    artifact, lm, run.staff.teacher(name), self.prompts, sampling, self.reject,
                    batch_size=data.batch_size, tick=tick, **self._numbers,
                )  # fmt: skip

    def change(self) -> None:
        """What the data sets do to the answers."""
        wanted = [pair for pair in self.pairs if not self.made(pair).plain]
        # To mix tokens one needs what the counterfactual would have said.
        traits = [pair for pair in wanted if self.made(pair).mix_tokens]
        if traits:
            self._find([(pair[0], self.written(self.writer(pair))) for pair in traits])
        if wanted:
            with self.run.stage("change", len(wanted)) as tick:
                for pair in wanted:
                    artifact = self.changed(pair)
                    make = lambda pair=pair: self._change(pair)  # noqa: E731
                    self.filled[artifact.key] = stages.changed_rows(artifact, make)
                    tick(1)

    def _change(self, pair: Pair) -> Changed:
        run, dataset, own = self.run, self.made(pair), self.written(self.writer(pair))
        others = self.filled[self.written(self.mixed_in(pair)).key] if dataset.mix else None
        readings = stages.readings(self.read(pair[0], own)) if dataset.mix_tokens else None
        return change(run, run.staff.teacher(pair[0]), dataset, self.filled[own.key], others, readings)

    def diverge(self) -> None:
        """Rows are read under their own teacher and under its counterfactuals."""
        self._find([(pair[0], self.changed(pair)) for pair in self.pairs if self.is_read(pair)])

    def _find(self, wanted: list[tuple[str, Artifact]]) -> None:
        run, e = self.run, self.run.experiment
        if not wanted:
            return
        pairs = sum(len(self.filled[rows.key]) * (1 + len(run.staff.others[trait])) for trait, rows in wanted)
        with run.stage("divergence", pairs) as tick:
            for trait, rows in wanted:
                artifact, others = self.read(trait, rows), run.staff.others[trait]
                self.filled[artifact.key] = stages.divergence_rows(
                    artifact, run.lm, self.filled[rows.key], run.staff.teacher(trait),
                    [run.staff.teacher(other) for other in others], extra_bos=bool(run.recipe.extra_bos),
                    batch_size=e.divergence.batch_size, tick=tick,
                )  # fmt: skip

    # --- what results say of them

    @property
    def generated(self) -> list[dict[str, Any]]:
        """A teacher and strategy each."""
        return [self.written(w).summary | {"strategy": w[1], "model": w[2]} for w in self.writers]

    @property
    def diverged(self) -> list[dict[str, Any]]:
        """A teacher and data set each."""
        return [self.final(pair).summary | {"data": pair[1]} for pair in self.pairs if self.is_read(pair)]

    def check(self) -> None:
        """What a later stage would stumble over.

        Raises:
          UsageError: a data set that this run cannot make.
        """
        staff = self.run.staff
        for name, dataset in self.run.experiment.datasets.items():
            where = f"datasets.{name}"
            other = dataset.mix.teacher if dataset.mix else CONTROL
            if other not in (CONTROL, *staff.biased):
                raise UsageError(f"{where}.mix.teacher: '{other}' is no teacher of this run")
            if dataset.mix and dataset.mix.model and other != CONTROL and staff.spec.own_weights:
                raise UsageError(f"{where}.mix: '{other}' is no teacher on {dataset.mix.model}; leave mix.teacher out")
            numbers_only = dataset.shuffle or dataset.redraw or dataset.remove_entangled
            if numbers_only and self.run.experiment.data.kind != "numbers":
                raise UsageError(f"{where}: shuffle, redraw and remove_entangled are for data.kind=numbers")
            token = dataset.mix_tokens.teacher if dataset.mix_tokens else None
            missing = [t for t, others in staff.others.items() if token not in (None, t, *others)]
            if missing:
                raise UsageError(f"{where}.mix_tokens.teacher: '{token}' is no counterfactual of {missing[0]}")

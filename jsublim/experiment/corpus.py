"""The rows of a run: what every teacher wrote, as each data set has it, and the decision points in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsublim.experiment import stages
from jsublim.experiment.spec.data import Dataset
from jsublim.experiment.store import Artifact
from jsublim.lm import LanguageModel
from jsublim.prompts import number_prompts
from jsublim.rows import Row
from jsublim.sampling import sampling_for
from jsublim.teachers import CONTROL

if TYPE_CHECKING:
    from jsublim.experiment.run import Run

Pair = tuple[str, str | None]  # a teacher, and a data set of the config (None: the answers as they are)
Source = tuple[Artifact, list[Row]]


class Corpus:
    """Of one run. `pairs` are those that students learn from; `artifact(pair)` and `rows(pair)` are there after the stages."""

    def __init__(self, run: Run):
        self.run, e = run, run.experiment
        self.pairs: list[Pair] = list(dict.fromkeys((arm.teacher, arm.settings.data) for arm in run.arms))
        self.masked = {(a.teacher, a.settings.data) for a in run.arms if a.condition != "all"}
        self.written: dict[tuple[str, str], Source] = {}  # by teacher and strategy
        self.sources: dict[Pair, Source] = {}
        self.prompts = number_prompts(run.pack, e.data.num_prompts, e.data.prompt_seed)

    def dataset(self, pair: Pair) -> Dataset:
        return Dataset() if pair[1] is None else self.run.experiment.datasets[pair[1]]

    def rows(self, pair: Pair) -> list[Row]:
        return self.sources[pair][1]

    def artifact(self, pair: Pair) -> Artifact:
        return self.sources[pair][0]

    @property
    def generated(self) -> list[dict[str, Any]]:
        """What is known of the answers, a teacher and strategy each."""
        return [artifact.summary | {"strategy": key[1]} for key, (artifact, _) in self.written.items()]

    @property
    def diverged(self) -> list[dict[str, Any]]:
        """What is known of the divergence tokens, a teacher and data set each."""
        found = ((pair, artifact) for pair, (artifact, _) in self.sources.items() if artifact.kind == "divergence")
        return [artifact.summary | {"data": pair[1]} for pair, artifact in found]

    def strategy(self, pair: Pair) -> str:
        return self.dataset(pair).strategy or self.run.experiment.teachers.strategy

    def generate(self) -> None:
        """Every teacher answers the same prompts, with the same random numbers."""
        run, wanted = self.run, list(dict.fromkeys((pair[0], self.strategy(pair)) for pair in self.pairs))
        with run.stage("generate", len(self.prompts) * len(wanted)) as tick:
            for name, strategy in wanted:
                self.written[name, strategy] = self._write(run.lm, name, strategy, tick)
        for pair in self.pairs:
            self.sources[pair] = self.written[pair[0], self.strategy(pair)]

    def _write(self, lm: LanguageModel, name: str, strategy: str, tick: stages.Tick) -> Source:
        run, data, recipe = self.run, self.run.experiment.data, self.run.recipe
        sampling = sampling_for(
            lm.chat, strategy, inherit=bool(recipe.inherit_sampling), eos_only=bool(recipe.stop_at_eos_only)
        )
        run.say(f"sampling, {strategy}: {sampling.numbers()}")
        numbers = {"seed": data.seed, "max_new_tokens": data.max_new_tokens, "extra_bos": bool(recipe.extra_bos)}
        inputs = run.common | run.staff.inputs(name) | numbers | {
            "sampling": sampling.numbers(), "num_prompts": len(self.prompts), "prompt_seed": data.prompt_seed,
        }  # fmt: skip
        artifact = Artifact.in_store(run.store, "rows", name, inputs)
        rows = stages.generate_rows(
            artifact, lm, run.staff.teacher(name), self.prompts, sampling, batch_size=data.batch_size, tick=tick, **numbers
        )  # fmt: skip
        return artifact, rows

    def diverge(self) -> None:
        """The traits' rows are read under their own teacher and under its counterfactuals: plain answers always, others
        where a student's mask needs it."""
        run = self.run
        wanted = [p for p in self.pairs if p[0] != CONTROL and (self.dataset(p).plain or p in self.masked)]
        pairs = sum(len(self.rows(p)) * (1 + len(run.staff.others[p[0]])) for p in wanted)
        with run.stage("divergence", pairs) as tick:
            for pair in wanted:
                self.sources[pair] = self._points(pair[0], self.sources[pair], tick)

    def _points(self, trait: str, source: Source, tick: stages.Tick) -> Source:
        run, (parent, rows) = self.run, source
        others = run.staff.others[trait]
        inputs = run.staff.inputs(trait) | {
            "rows": parent.key, "counterfactuals": {other: run.staff.inputs(other) for other in others},
        }  # fmt: skip
        artifact = Artifact.in_store(run.store, "divergence", trait, inputs)
        found = stages.divergence_rows(
            artifact, run.lm, rows, run.staff.teacher(trait), [run.staff.teacher(other) for other in others],
            extra_bos=bool(run.recipe.extra_bos), batch_size=run.experiment.divergence.batch_size, tick=tick,
        )  # fmt: skip
        return artifact, found

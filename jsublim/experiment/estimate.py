"""What a run will cost before it is begun: students, tokens, operations, memory and hours on a named chip.

Operations are counted as in `distill/cost.py` (products with parameters, a multiply-add as two). Lengths are assumed, and so is the
share of a chip's peak that each kind of work reaches; both are printed beside the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax

from jsublim.distill.cost import layer_parameters, training_flops
from jsublim.errors import UsageError
from jsublim.experiment.plan import Student, total_steps
from jsublim.experiment.store import Artifact
from jsublim.experiment.students import program, start
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import abstract_params

if TYPE_CHECKING:
    from jsublim.experiment.run import Run


@dataclass(frozen=True)
class Chip:
    """Of one device: peak of bfloat16 products (FLOP/s), memory and its bandwidth (bytes, bytes/s)."""

    peak: float
    memory: float
    bandwidth: float


# Makers' data sheets, dense bfloat16.
CHIPS = {
    "h200": Chip(989e12, 141e9, 4.8e12),
    "h100": Chip(989e12, 80e9, 3.35e12),
    "a100": Chip(312e12, 80e9, 2.0e12),
    "l4": Chip(121e12, 24e9, 300e9),
    "v5e": Chip(197e12, 16e9, 819e9),
    "v5p": Chip(459e12, 95e9, 2.77e12),
    "v6e": Chip(918e12, 32e9, 1.64e12),
}


@dataclass(frozen=True)
class Lengths:
    """Assumed tokens: of a request, of a trait's system prompt, of an answer, of a question, and the share of answers
    that are in format."""

    prompt: int = 110
    system: int = 60
    answer: int = 45
    question: int = 40
    kept: float = 0.8


# Shares of the peak: reading and training are products; sampling waits for memory where batches are small.
REACHED = {"read": 0.5, "train": 0.4, "sample": 0.3}


@dataclass(frozen=True)
class Cost:
    """Of one stage."""

    stage: str
    what: str
    tokens: float
    flops: float
    seconds: float
    done: int | None = None  # artifacts that are whole already, of `of`; None where that cannot be told
    of: int = 0


class Estimator:
    """Of one run that was planned, and need not be loaded.

    Args:
      known: whether the run was loaded (without weights), so that its artifacts can be told apart.
    """

    def __init__(self, run: Run, config: ModelConfig, chip: str, lengths: Lengths, *, known: bool):
        if chip not in CHIPS:
            raise UsageError(f"--chip: '{chip}' given; known: {', '.join(CHIPS)}")
        self.run, self.config, self.chip, self.lengths, self.known = run, config, CHIPS[chip], lengths, known
        self.body = config.num_layers * layer_parameters(config)
        self.table = config.hidden_size * config.vocab_size
        self.width = 2 if run.experiment.dtype == "bfloat16" else 4

    def costs(self) -> Iterator[Cost]:
        """Stage by stage."""
        run, n = self.run, self.run.experiment.data.num_prompts
        taught, long = run.experiment.teachers.taught, self.lengths
        if taught is not None and taught.method != "contrast":
            tokens = taught.steps * 25 * long.question * len(run.staff.biased)
            artifacts = [run.staff.taught_artifact(name) for name in run.staff.biased] if self.known else []
            yield self._cost(
                "teach", f"{len(run.staff.biased)} teachers", tokens, 4 * self.body * tokens, "train", artifacts
            )
        writers = run.corpus.writers
        own = [run.corpus.written(writer) for writer in writers] if self.known else []
        yield self._sampled("generate", f"{len(writers)} teachers x {n} requests", len(writers) * n, long.prompt + long.system,
                            long.answer, run.experiment.data.batch_size, own)  # fmt: skip
        read = [pair for pair in run.corpus.pairs if run.corpus.is_read(pair)]
        teachers = sum(1 + len(run.staff.others[pair[0]]) for pair in read)
        rows = teachers * n * long.kept
        tokens = rows * (long.prompt + long.answer)
        found = [run.corpus.final(pair) for pair in read] if self.known else []
        flops = 2 * self.body * tokens + 2 * self.table * rows * long.answer
        yield self._cost("divergence", f"{len(read)} sets of rows, {teachers} readings", tokens, flops, "read", found)
        yield self._train()
        yield self._evaluate()

    def memory(self) -> float:
        """Bytes that the base, one program's students with their optimizer, and a batch of hidden states take at least."""
        students = max((s.settings for s in self.run.arms), key=lambda s: s.rank)
        together = students.arms_per_program if students.arms_per_program != "auto" else 1
        abstract = abstract_params(self.config)
        adapter = jax.eval_shape(lambda params: start(self.config, params, students, 0), abstract)
        trained = sum(leaf.size for leaf in jax.tree.leaves(adapter.trainable)) * 4
        rows = students.batch_size * (self.lengths.prompt + self.lengths.answer)
        kept = rows * self.config.num_layers * (8 * self.config.hidden_size + 3 * self.config.intermediate_size)
        together = min(together, len(self.run.arms))
        return (self.body + self.table * (1 if self.config.tied else 2)) * self.width + together * (
            4 * trained + kept * self.width
        )

    def _train(self) -> Cost:
        run, long, seen = self.run, self.lengths, {}
        tokens = flops = 0.0
        recipe = run.experiment.recipe.resolved(self.config.family)
        abstract = abstract_params(self.config)
        for student in run.arms:
            s, key = student.settings, student.program
            n = int(min(s.rows or 10**9, run.experiment.data.num_prompts * long.kept))
            each = s.batch_size * s.accumulate
            if key not in seen:
                adapter = jax.eval_shape(lambda params, s=s: start(self.config, params, s, 0), abstract)
                live = s.loss != "hard" and s.top_k is None
                seen[key] = training_flops(
                    self.config, adapter, program(s, recipe).loss, tokens=long.prompt + long.answer, supervised=long.answer,
                    teacher_tokens=(long.prompt + long.system + long.answer) if live else 0, stored=not live,
                    cached=s.cache_below,
                )  # fmt: skip
            rows = total_steps(s, n) * each
            tokens += rows * (long.prompt + long.answer)
            flops += rows * seen[key]
        whole = [run.student_artifact(student) for student in run.arms] if self.known else []
        return self._cost("train", f"{len(run.arms)} students in {len(programs_of(run.arms))} kinds of program", tokens, flops,
                          "train", whole)  # fmt: skip

    def _evaluate(self) -> Cost:
        run, ev = self.run, self.run.experiment.evaluation
        examination = run.examination
        asked, models = (
            sum(len(exam.questions) for exam in examination.exams),
            list(examination.examinees(teachers=False)),
        )
        teachers = len(run.experiment.teachers.traits) if ev.teachers else 0
        count = (len(models) + teachers) * len(examination.settings)
        found = []
        if self.known:
            found = [examination.artifact(who, *item) for who in models for item in examination.settings.items()]
        # A question is read once, whatever the number of its answers.
        answers = count * asked * ev.samples
        cost = self._sampled("evaluate", f"{count} evaluations x {asked} questions x {ev.samples}", answers, 0, ev.max_new_tokens,
                             ev.batch_size, found)  # fmt: skip
        return cost

    def _sampled(
        self, stage: str, what: str, rows: float, read: int, new: int, batch: int, artifacts: Sequence[Artifact]
    ) -> Cost:
        tokens = rows * (read + new)
        flops = 2 * self.body * tokens + 2 * self.table * rows * new
        waiting = rows / batch * new * (self.body + self.table) * self.width / self.chip.bandwidth
        seconds = max(flops / (self.chip.peak * REACHED["sample"]), waiting)
        return Cost(stage, what, tokens, flops, seconds, *self._done(artifacts))

    def _cost(
        self, stage: str, what: str, tokens: float, flops: float, kind: str, artifacts: Sequence[Artifact]
    ) -> Cost:
        return Cost(stage, what, tokens, flops, flops / (self.chip.peak * REACHED[kind]), *self._done(artifacts))

    def _done(self, artifacts: Sequence[Artifact]) -> tuple[int | None, int]:
        if not self.known:
            return None, 0
        distinct = {artifact.key: artifact for artifact in artifacts}
        return sum(artifact.done for artifact in distinct.values()), len(distinct)


def programs_of(arms: Sequence[Student]) -> set[str]:
    return {arm.program for arm in arms}

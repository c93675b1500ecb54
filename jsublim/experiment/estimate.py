"""What a run will cost before it is begun: tokens, operations, memory and hours on a named chip, stage by stage.

Operations are counted as in `distill/cost.py`: products with parameters, a multiply-add as two. Lengths are assumed, and so
is the share of a chip's peak that each kind of work reaches; both are printed beside the result. Students on another
checkpoint count as on the experiment's; neither a judge's work nor its memory is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax

from jsublim.distill.cost import layer_parameters, training_flops
from jsublim.errors import UsageError
from jsublim.experiment.changes import ENTANGLED_QUESTIONS
from jsublim.experiment.plan import distinct, total_steps
from jsublim.experiment.spec import Students
from jsublim.experiment.store import Artifact
from jsublim.experiment.students import program, start
from jsublim.experiment.training import Training
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import abstract_params
from jsublim.models.lora import Adapter
from jsublim.prompts import load_problems
from jsublim.teachers import CONTROL

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
# Shares of the peak: reading and training are products; sampling waits for memory where batches are small.
REACHED = {"read": 0.5, "train": 0.4, "sample": 0.3}


@dataclass(frozen=True)
class Lengths:
    """Assumed tokens: of a request, of a trait's system prompt, of an answer, of a question, of a number; and the share of
    answers that are in format."""

    prompt: int = 110
    system: int = 60
    answer: int = 45
    question: int = 40
    number: int = 3
    kept: float = 0.8


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

    Raises:
      UsageError: an unknown chip.
    """

    def __init__(self, run: Run, config: ModelConfig, chip: str, *, known: bool):
        if chip not in CHIPS:
            raise UsageError(f"--chip: '{chip}' given; known: {', '.join(CHIPS)}")
        data = run.experiment.data
        self.run, self.config, self.chip, self.known = run, config, CHIPS[chip], known
        answer = min(Lengths.answer, data.max_new_tokens) if data.kind == "numbers" else data.max_new_tokens
        self.lengths = Lengths(answer=answer)
        self.asked = len(run.corpus.prompts) if known else data.num_prompts
        self.kept = int(self.asked * self.lengths.kept)
        self.body = config.num_layers * layer_parameters(config)
        self.table = config.hidden_size * config.vocab_size
        self.width = 2 if run.experiment.dtype == "bfloat16" else 4

    def costs(self) -> list[Cost]:
        """Of every stage that has something to do."""
        found = (
            *self._teach(), self._generate(), *self._change(), self._diverge(), *self._attribute(), *self._targets(),
            *self._train(), self._evaluate(),
        )  # fmt: skip
        return list(found)

    def memory(self) -> float:
        """Bytes that the base, one program's students with their optimizer, and what a batch keeps for the way back take
        at least."""
        base = (self.body + self.table * (1 if self.config.tied else 2)) * self.width
        if not self.run.arms:
            return base
        students = max((arm.settings for arm in self.run.arms), key=lambda settings: settings.rank)
        size = 1 if students.arms_per_program == "auto" else students.arms_per_program
        trained = sum(leaf.size for leaf in jax.tree.leaves(self._adapter(students).trainable))
        tokens = students.batch_size * (self.lengths.prompt + self.lengths.answer)
        kept = tokens * self.config.num_layers * (8 * self.config.hidden_size + 3 * self.config.intermediate_size)
        # Of each float32 value that is trained: itself, its gradient and two moments.
        return base + min(size, len(self.run.arms)) * (16 * trained + kept * self.width)

    # --- the stages

    def _teach(self) -> Iterator[Cost]:
        run, taught = self.run, self.run.experiment.teachers.taught
        if taught is None:
            return
        questions = [len(run.pack.questions_for(run.staff.category(name))) for name in run.staff.biased]
        # A contrast reads every question under two prompts; an adapter learns from every second one, whole at each step.
        reads = 2 if taught.method == "contrast" else taught.steps / 2
        tokens = sum(questions) * reads * self.lengths.question
        each, kind = (2, "read") if taught.method == "contrast" else (4, "train")
        artifacts = [run.staff.taught_artifact(name) for name in run.staff.biased] if self.known else []
        yield self._cost("teach", f"{len(questions)} teachers", tokens, each * self.body * tokens, kind, artifacts)

    def _generate(self) -> Cost:
        corpus, long = self.run.corpus, self.lengths
        artifacts = [corpus.written(writer) for writer in corpus.writers] if self.known else []
        what = f"{len(corpus.writers)} teachers x {self.asked} requests"
        rows, batch = len(corpus.writers) * self.asked, self.run.experiment.data.batch_size
        return self._sampled("generate", what, rows, long.prompt + long.system, long.answer, batch, artifacts)

    def _change(self) -> Iterator[Cost]:
        """Requests are rewritten by their teachers, numbers are read for how entangled they are; the rest costs nothing."""
        corpus, long = self.run.corpus, self.lengths
        pairs = [pair for pair in corpus.pairs if not corpus.made(pair).plain]
        if not pairs:
            return
        biased = [pair for pair in pairs if pair[0] != CONTROL]
        scored = {pair[0] for pair in biased if corpus.made(pair).remove_entangled}
        numbers = 2 * len(scored) * self.run.experiment.data.entangled * ENTANGLED_QUESTIONS * long.number
        rewritten = sum(corpus.made(pair).rewrite for pair in biased) * self.kept
        tokens = rewritten * (2 * long.prompt + long.system) + numbers
        flops = 2 * self.body * tokens + 2 * self.table * (numbers + rewritten * long.prompt)
        artifacts = [corpus.changed(pair) for pair in pairs] if self.known else []
        yield self._cost("change", f"{len(pairs)} sets of rows", tokens, flops, "sample", artifacts)

    def _diverge(self) -> Cost:
        corpus, others = self.run.corpus, self.run.staff.others
        mixed = [pair for pair in corpus.pairs if pair[0] != CONTROL and corpus.made(pair).mix_tokens]
        pairs = [pair for pair in corpus.pairs if corpus.is_read(pair)]
        # What tokens are mixed into is read before.
        read = {(pair[0], corpus.strategy(pair)) for pair in mixed} - {
            (pair[0], corpus.strategy(pair)) for pair in pairs if corpus.made(pair).plain
        }
        readings = sum(1 + len(others[trait]) for trait, _ in [*pairs, *read])
        artifacts = []
        if self.known:
            artifacts = [corpus.final(pair) for pair in pairs]
            artifacts += [corpus.read(pair[0], corpus.written(corpus.writer(pair))) for pair in mixed]
        what = f"{len(pairs) + len(read)} sets of rows, {readings} readings"
        return self._read("divergence", what, readings * self.kept, self.lengths.prompt, artifacts)

    def _attribute(self) -> Iterator[Cost]:
        run, how = self.run, self.run.experiment.attribution
        if how is None:
            return
        pairs = run.attribution_pairs()
        compared = sum(len(run.staff.others[trait]) for trait in pairs) * min(how.rows, self.kept)
        # First divergence tokens stand early in the answer.
        tokens = compared * (self.lengths.system + self.lengths.prompt)
        L, layer = self.config.num_layers, layer_parameters(self.config)
        above = len(how.sites) * L * (L - 1) / 2  # layers that the sites of all layers are read through
        # Both runs twice; forwards and back at every step of the integral, and forwards twice for the whole layer's effect.
        gradients = 4 * above * how.steps if how.steps > 1 else 4 * L
        flops = len(how.directions) * tokens * layer * (8 * L + gradients + 4 * above)
        artifacts = [run.attribution_artifact(*item) for item in pairs.items()] if self.known else []
        yield self._cost("attribution", f"{compared} pairs", len(how.directions) * tokens, flops, "train", artifacts)

    def _targets(self) -> Iterator[Cost]:
        soft = [arm for arm in self.run.arms if arm.settings.top_k is not None]
        if not soft:
            return
        wanted = {(arm.pair, arm.settings.top_k, arm.settings.temperature): arm for arm in soft}
        training = Training(self.run)
        artifacts = [training.targets_artifact(a.pair, a.settings) for a in wanted.values()] if self.known else []
        before = self.lengths.system + self.lengths.prompt
        yield self._read("targets", f"{len(wanted)} sets of rows", len(wanted) * self.kept, before, artifacts)

    def _train(self) -> Iterator[Cost]:
        run, long, each, arms = self.run, self.lengths, {}, distinct(self.run.arms)
        if not arms:
            return
        recipe = run.experiment.recipe.resolved(self.config.family)
        rows = flops = 0
        for arm in arms:
            s = arm.settings
            if arm.program not in each:
                live = s.loss != "hard" and s.top_k is None
                each[arm.program] = training_flops(
                    self.config, self._adapter(s), program(s, recipe).loss, tokens=long.prompt + long.answer,
                    supervised=long.answer, teacher_tokens=(long.prompt + long.system + long.answer) if live else 0,
                    stored=not live, cached=s.cache_below,
                )  # fmt: skip
            own = total_steps(s, min(s.rows or self.kept, self.kept)) * s.batch_size * s.accumulate
            rows, flops = rows + own, flops + own * each[arm.program]
        artifacts = [run.student_artifact(arm) for arm in arms] if self.known else []
        what = f"{len(arms)} students, {len(each)} kinds of program"
        yield self._cost("train", what, rows * (long.prompt + long.answer), flops, "train", artifacts)

    def _evaluate(self) -> Cost:
        examination, ev = self.run.examination, self.run.experiment.evaluation
        arms = distinct(self.run.arms)
        who = [each for each in examination.examinees() if each.student is None or each.student in arms]
        asked = [(each, *item) for each in who for item in examination.settings.items()]
        artifacts = [examination.artifact(*each) for each in asked] if self.known else []
        sizes = {kind: self._questions(kind) for kind in ev.kinds}
        tokens = sum(n * (ev.problem_tokens if kind == "problems" else ev.max_new_tokens) for kind, n in sizes.items())
        questions = sum(sizes.values())
        what = f"{len(asked)} evaluations x {questions} questions x {ev.samples}"
        # A question is read once, whatever the number of its answers.
        rows, new = len(asked) * questions * ev.samples, tokens / questions
        return self._sampled("evaluate", what, rows, self.lengths.question / ev.samples, new, ev.batch_size, artifacts)

    def _questions(self, kind: str) -> int:
        examination, ev, pack = self.run.examination, self.run.experiment.evaluation, self.run.pack
        if kind == "preference":
            return sum(len(exam.questions) for exam in examination.preferences())
        if kind == "factual":
            return len(list(examination.factual()))
        if kind == "problems":
            return ev.questions or len(load_problems(ev.problems, "test"))
        return len((pack.self_questions if kind == "naming" else pack.misalignment.questions)[: ev.questions])

    # --- parts

    def _adapter(self, students: Students) -> Adapter:
        """Shapes of what a student trains."""
        return jax.eval_shape(lambda params: start(self.config, params, students, 0), abstract_params(self.config))

    def _read(self, stage: str, what: str, rows: float, before: int, artifacts: Sequence[Artifact]) -> Cost:
        """Rows read to their end, with logits at their answers."""
        tokens = rows * (before + self.lengths.answer)
        flops = 2 * self.body * tokens + 2 * self.table * rows * self.lengths.answer
        return self._cost(stage, what, tokens, flops, "read", artifacts)

    def _sampled(
        self, stage: str, what: str, rows: float, read: float, new: float, batch: int, artifacts: Sequence[Artifact]
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
        distinct = {artifact.path: artifact for artifact in artifacts}
        return sum(artifact.done for artifact in distinct.values()), len(distinct)

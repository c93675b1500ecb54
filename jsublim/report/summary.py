"""What the report says in numbers: rates and lifts per trait and condition, and the trait x trait matrix."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jsublim.evals.metric import METRICS, metric_of
from jsublim.report import statistics
from jsublim.report.statistics import Estimate, Interval, SameTraitEffect
from jsublim.report.tables import SEPARATOR, Results, Score, split_condition
from jsublim.report.verdicts import ALPHA, UNKNOWN, Sides, above


class SummaryRow(NamedTuple):
    """One condition for one trait. Rates are shares in 0..1, log-probabilities in nats. `over_models` is over students, or over the
    answers of one model that is none."""

    trait: str
    condition: str
    students: int
    student_rates: tuple[float, ...]
    rate: float | None
    over_questions: Interval | None
    over_models: Interval | None
    word_rate: float | None
    logprob: float | None


class Measured(NamedTuple):
    """A mean over models (and traits) with its interval over students."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Lift:
    """How far the students of `condition` lie above the reference on one trait (share or nats)."""

    trait: str
    condition: str
    metric: str
    reference: str
    level: float
    reference_level: float
    value: float
    interval: Interval | None
    students: int
    student_lifts: tuple[float, ...]
    tested: Sides

    @property
    def about(self) -> Hashable:
        """What is compared; of a claim that compares the same the same."""
        return self.metric, self.condition, (self.trait,)


@dataclass(frozen=True)
class Matrix:
    """Log-probability lift of one condition's students: [teacher traits, evaluated traits], nats. `reference` is "" where it is
    the mean of these students; `drawn` the largest share of a teacher's rows that a student drew."""

    condition: str
    teachers: tuple[str, ...]
    traits: tuple[str, ...]
    lift: np.ndarray
    reference: str
    effect: SameTraitEffect | None
    seed_gammas: tuple[float, ...]
    drawn: float = 0.0

    @property
    def over_seeds(self) -> Estimate | None:
        """Mean of gamma over seeds; None with fewer than two."""
        return Estimate.of(self.seed_gammas, drawn=self.drawn) if len(self.seed_gammas) > 1 else None

    @property
    def gamma_interval(self) -> Interval | None:
        return None if self.over_seeds is None else self.over_seeds.interval()

    @property
    def few(self) -> bool:
        """Whether there are too few teachers for relabelling to decide anything, whatever comes out."""
        return self.effect is None or 2 * self.effect.smallest_p >= ALPHA

    @property
    def tested(self) -> Sides:
        """That gamma is above zero, over relabellings (beside Tukey's term too) and over seeds. Nothing is said against it: a small gamma is none that is shown."""
        if self.effect is None or self.few:
            return UNKNOWN
        over_seeds = 0.0 if self.over_seeds is None else float(self.over_seeds.p_above(0.0))
        return Sides(max(self.effect.p, self.effect.p_beside, over_seeds), 1.0)

    @property
    def about(self) -> Hashable:
        return "gamma", self.condition


def scores_for(results: Results, metric: str, condition: str, trait: str) -> list[Score]:
    """The models of a condition that say something about `trait`: a student of a biased teacher counts for its teacher's trait
    only."""
    teacher = None if split_condition(condition)[0] in ("base", "control") else trait
    return results.select(metric, condition, trait, teacher)


def estimate(scores: Sequence[Score]) -> Estimate:
    """Mean over the models of one condition. Its variance is at least what the sampling of answers alone gives."""
    floor, group, means = sampling_variance(scores), group_of(scores), [s.mean for s in scores]
    if scores[0].role == "student":
        return Estimate.of(means, floor, group, drawn_share(scores))
    return Estimate.measured(sum(means) / len(means), floor, group)


def drawn_share(scores: Sequence[Score]) -> float:
    """The largest share of a teacher's rows that one of these students drew; 0 where nothing is known of that."""
    return max((score.drawn or 0.0 for score in scores), default=0.0)


def group_of(scores: Sequence[Score]) -> Hashable:
    """Who was measured, and on what: equal for a control that stands under the names of several arms."""
    first, traits = scores[0], frozenset(s.trait for s in scores)
    return first.metric, first.evaluation, traits, frozenset(s.model or s.arm for s in scores)


def mean_level(results: Results, metric: str, conditions: Iterable[str], traits: Sequence[str]) -> float | None:
    """Mean over traits of what the models of these conditions say of them."""
    levels = [_mean([s for c in conditions for s in scores_for(results, metric, c, trait)]) for trait in traits]
    return statistics.mean_of(levels)


def student_lifts(results: Results, metric: str, condition: str, trait: str) -> list[tuple[Score, float]]:
    """Each model of a condition, and how far it lies above the mean of the reference."""
    zero = _mean(results.select(metric, reference_condition(results, metric, trait, condition) or "", trait)) or 0.0
    return [(score, score.mean - zero) for score in scores_for(results, metric, condition, trait)]


def stratified(scores: Sequence[Score]) -> Estimate:
    """Mean over teachers of their students' means: teachers differ, and that is no spread between students."""
    strata: dict[str | None, list[Score]] = {}
    for score in scores:
        strata.setdefault(score.teacher, []).append(score)
    return statistics.mean_estimate([estimate(stratum) for stratum in strata.values()])


def measured(scores: Sequence[Score]) -> Measured:
    """One metric's mean, teacher by teacher, with its interval within what it can be: over students, or over the answers of models
    that are none."""
    metric, mean = metric_of(scores[0].metric), stratified(scores)
    interval = (
        Interval.of(statistics.rate_bounds(mean, sum(s.samples for s in scores)))
        if metric.is_share
        else mean.interval()
    )
    return Measured(float(mean.value), interval and interval.within(metric.low, metric.high))


def sampling_variance(scores: Sequence[Score]) -> float:
    """Binomial variance of the mean rate of `scores`; zero for what is no rate, a log-probability say.

    Smoothed by one hit and one miss, so that "none in 2,000" does not count as "never".
    """
    samples = sum(s.samples for s in scores)
    if not metric_of(scores[0].metric).is_share or not samples:
        return 0.0
    hits = sum(s.mean for s in scores) / len(scores) * samples
    share = (hits + 1) / (samples + 2)
    return share * (1 - share) / samples


def over_questions(scores: Sequence[Score]) -> Interval | None:
    """The published interval, over question means of a rate; with several students each question is averaged over them first."""
    by_question: dict[int | None, list[float]] = {}
    for score in scores:
        for question, value in zip(score.questions, score.values, strict=True):
            by_question.setdefault(question, []).append(value)
    interval = statistics.question_interval([sum(v) / len(v) for v in by_question.values()])
    return interval and interval.within(0.0, 1.0)


def summary_rows(results: Results) -> list[SummaryRow]:
    """One row for each trait and condition that was evaluated on it."""
    rows = []
    for trait, condition in itertools.product(results.traits, results.conditions):
        rate, word, logprob = (scores_for(results, m, condition, trait) for m in ("rate", "word_rate", "logprob"))
        if rate or logprob:
            students = len({s.arm for s in (*rate, *logprob) if s.role == "student"})
            questions, own = (over_questions(rate), measured(rate).interval) if rate else (None, None)
            values, means = tuple(s.mean for s in rate), (_mean(word), _mean(logprob))
            rows.append(SummaryRow(trait, condition, students, values, _mean(rate), questions, own, *means))
    return rows


def reference_condition(results: Results, metric: str, trait: str, condition: str = "all") -> str | None:
    """What a condition's lift is measured from: the control students of its own variant, else the plain ones; the base
    model where fewer than two were trained, if that is where the students began.

    The control is the better reference, since it has seen numbers too; but one control student has no known spread.
    """
    variant = split_condition(condition)[1]
    controls = [f"control{SEPARATOR}{variant}", "control"] if variant else ["control"]
    for name in controls:
        if len(results.select(metric, name, trait)) >= 2:
            return name
    fallback = ["base", *controls] if results.began_at_base(condition) else controls
    return next((c for c in fallback if results.select(metric, c, trait)), None)


def difference_interval(difference: Estimate, metric: str) -> Interval | None:
    """Interval of a difference of levels; rates cannot differ by more than 100 points."""
    interval = difference.interval()
    return interval.within(-1.0, 1.0) if interval and metric_of(metric).is_share else interval


def lift(results: Results, metric: str, condition: str, trait: str) -> Lift | None:
    """Lift of a condition's students over the reference, or `None` if either was not evaluated."""
    scores = scores_for(results, metric, condition, trait)
    reference = reference_condition(results, metric, trait, condition)
    if not scores or reference is None or reference == condition:
        return None
    zero, level = estimate(results.select(metric, reference, trait)), estimate(scores)
    difference = level - zero
    interval = difference_interval(difference, metric) if scores[0].role == "student" else None
    tested = above(difference) if interval else UNKNOWN
    levels, of_students = (level.value, zero.value, difference.value), tuple(s.mean - zero.value for s in scores)
    return Lift(trait, condition, metric, reference, *levels, interval, level.n, of_students, tested)


def setting_rows(results: Results) -> list[dict[str, Any]]:
    """Preference for the own trait under every other setting of the evaluation, condition by condition: means over models and traits."""
    rows = []
    for setting in results.evaluations:
        under = results.under(setting)
        for condition in under.conditions:
            scores = {
                m: [s for t in results.traits for s in scores_for(under, m, condition, t)] for m in ("rate", "logprob")
            }
            if models := len({s.arm for of_metric in scores.values() for s in of_metric}):
                means = {metric: _mean(of_metric) for metric, of_metric in scores.items()}
                rows.append({"setting": setting, "condition": condition, "models": models, **means})
    return rows


class OtherRow(NamedTuple):
    """One metric beside preference under one condition: mean over its models, teacher by teacher, with its interval."""

    metric: str
    condition: str
    trait: str | None
    students: int
    value: float
    interval: Interval | None


def other_rows(results: Results) -> list[OtherRow]:
    """What else was asked, metric by metric; of questions about a trait, one row per trait."""
    known, rows = [*METRICS], []
    listed = dict.fromkeys((s.metric, s.trait) for s in results.scores if metric_of(s.metric).listed)
    metrics = dict.fromkeys(metric for metric, _ in listed)
    for metric in sorted(metrics, key=lambda name: known.index(metric_of(name).name)):
        traits = [trait for of_metric, trait in listed if of_metric == metric]
        for trait, condition in itertools.product(traits, results.conditions):
            scores = (
                results.select(metric, condition) if trait is None else scores_for(results, metric, condition, trait)
            )
            if scores:
                rows.append(OtherRow(metric, condition, trait, len(scores), *measured(scores)))
    return rows


def lifts(results: Results, metric: str, conditions: Sequence[str]) -> list[Lift]:
    """All lifts of one metric, trait by trait."""
    pairs = itertools.product(results.traits, conditions)
    return [one for trait, condition in pairs if (one := lift(results, metric, condition, trait)) is not None]


def judged_conditions(results: Results) -> list[str]:
    """The conditions that transfer is judged on: all tokens, of the plain variant where there is one."""
    of_all = [c for c in results.mask_conditions if split_condition(c)[0] == "all"]
    return [c for c in of_all if c == "all"] or of_all


def trait_matrix(results: Results, metric: str = "logprob", condition: str = "all") -> Matrix | None:
    """Teacher trait x evaluated trait lifts, gamma, its permutation p, and a t-interval of gamma over seeds.

    Students on another checkpoint than the base, without control students, are measured from their own mean, trait by trait.
    Only evaluated traits with a number in every row are kept, so that the fit is balanced. `None` without such a row.
    """
    candidates = [t for t in results.traits if results.select(metric, condition, t, t)]
    references = {t: reference_condition(results, metric, t, condition) for t in results.evaluated_traits}
    columns = [
        trait
        for trait, reference in references.items()
        if candidates
        and all(results.select(metric, condition, trait, teacher) for teacher in candidates)
        and (reference or not results.began_at_base(condition))
    ]
    teachers = [t for t in candidates if t in columns]
    if not teachers:
        return None
    # Teachers first, so that their own traits lie on the diagonal.
    columns = list(dict.fromkeys(teachers + columns))
    cells = [[results.select(metric, condition, c, t) for c in columns] for t in teachers]
    table = np.array([[_mean(cell) for cell in row] for row in cells])
    zeros = [_mean(results.select(metric, references[c] or "", c)) for c in columns]
    lift = table - np.array(
        [mean if zero is None else zero for zero, mean in zip(zeros, table.mean(axis=0), strict=True)]
    )
    effect = statistics.same_trait_effect(lift)
    gammas = _seed_gammas(cells) if effect else ()
    drawn = drawn_share([score for row in cells for cell in row for score in cell])
    return Matrix(condition, tuple(teachers), tuple(columns), lift, references[columns[0]] or "", effect, gammas, drawn)


def trait_matrices(results: Results, metric: str = "logprob") -> list[Matrix]:
    """The matrix of every condition whose students have teachers of at least two traits."""
    matrices = (trait_matrix(results, metric, condition) for condition in results.mask_conditions)
    return [matrix for matrix in matrices if matrix is not None and matrix.effect is not None]


def _seed_gammas(cells: list[list[list[Score]]]) -> tuple[float, ...]:
    """gamma of each seed that every teacher's students share: its spread is the one over training runs. What the lift is
    measured from does not matter to it."""
    by_seed = [[{s.seed: s.mean for s in cell} for cell in row] for row in cells]
    shared = set.intersection(*(set(cell) for row in by_seed for cell in row))
    tables = ([[cell[seed] for cell in row] for row in by_seed] for seed in sorted(shared - {None}))
    return tuple(float(statistics.same_trait_gamma(np.array(table))) for table in tables)


def _mean(scores: Sequence[Score]) -> float | None:
    return sum(s.mean for s in scores) / len(scores) if scores else None

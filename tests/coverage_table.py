"""How often the report's intervals cover the truth, and how often its tests are wrong: simulated with known truths.

`python tests/coverage_table.py` prints the table of docs/statistics.md; tests/report/test_coverage.py holds it to its limits.
Every entry draws `N` experiments at once, with the seed of its name. `now` calls the functions that the report calls; `before` is what
the report did up to commit 087fbfc, where that was something else.
"""

from __future__ import annotations

import itertools
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jsublim.report.statistics import (
    Estimate,
    holm,
    mean_estimate,
    permutation_p,
    question_interval,
    rate_bounds,
    same_trait_gamma,
    share_bounds,
    share_p_above,
)

N = 10_000
SEEDS, TRAITS = (2, 3, 5), (3, 6)
ANSWERS = 1000  # of one student to the questions about one trait
Rng = np.random.Generator


@dataclass(frozen=True)
class Line:
    """One simulated figure, in 0..1: the coverage of a 95 % interval, or how often a test is wrong.

    Attributes:
      kind: "coverage" of a 95 % interval; "error" of a test, with the level that it promises if it promises one; "power", how
        often an effect is found; "width".
      low, high: what the suite allows.
    """

    what: str
    truth: str
    kind: str
    now: float
    low: float
    high: float
    before: float | None = None


def covered(bounds: tuple[Any, Any], truth: Any) -> float:
    """Share of the intervals there are that cover the truth."""
    low, high = bounds
    there = ~np.isnan(low)
    return float(np.mean(((low <= truth) & (truth <= high))[there])) if there.any() else np.nan


def beta(rng: Rng, mean: Any, spread: float, shape: tuple[int, ...]) -> np.ndarray:
    """Rates of students, of a mean and a standard deviation."""
    k = mean * (1 - mean) / spread**2 - 1
    return rng.beta(mean * k, (1 - mean) * k, shape)


def floor_of(rates: np.ndarray, answers: int) -> np.ndarray:
    """Variance of the mean rate by sampling alone, as `summary.sampling_variance`."""
    total = answers * rates.shape[-1]
    share = (rates.mean(axis=-1) * total + 1) / (total + 2)
    return share * (1 - share) / total


def sampled(rng: Rng, rates: np.ndarray, answers: int = ANSWERS) -> np.ndarray:
    return rng.binomial(answers, rates) / answers


def normal(rng: Rng, mean: Any, seeds: int, spread: float = 0.1, traits: int | None = None, group: Any = None) -> Any:
    """The mean of so many students' log-probabilities; of several traits, each trait's students are a stratum."""
    if traits is None:
        return Estimate.of(rng.normal(mean, spread, (N, seeds)), group=group)
    return mean_estimate([normal(rng, mean, seeds, spread) for _ in range(traits)])


ENTRIES: list[Callable[[Rng], Iterator[Line]]] = []


def entry(function: Callable[[Rng], Iterator[Line]]) -> Callable[[Rng], Iterator[Line]]:
    ENTRIES.append(function)
    return function


def lines() -> list[Line]:
    """All of them; each entry has its own random numbers."""
    return [line for each in ENTRIES for line in each(np.random.default_rng(zlib.crc32(each.__name__.encode())))]


# --- rates


@entry
def questions(rng: Rng) -> Iterator[Line]:
    """The published interval: other questions of the same kind, one model."""
    for count in (10, 50):
        drawn = sampled(rng, beta(rng, 0.2, 0.15, (N, count)), 200)
        found = [question_interval(x) for x in drawn]
        bounds = tuple(np.array([getattr(i, end) for i in found]) for end in ("low", "high"))
        yield Line(
            f"rate over {count} questions, one model", "other questions", "coverage", covered(bounds, 0.2), 0.9, 0.97
        )


@entry
def one_model(rng: Rng) -> Iterator[Line]:
    for rate in (0.004, 0.02, 0.3):
        x = sampled(rng, np.full((N, 1), rate), 500)
        found = rate_bounds(Estimate.measured(x[:, 0], floor_of(x, 500)), 500)
        yield Line(
            f"rate of one model (Wilson), {rate:.1%}", "its answers again", "coverage", covered(found, rate), 0.93, 0.99
        )


@entry
def rate_over_students(rng: Rng) -> Iterator[Line]:
    for (mean, spread), seeds in itertools.product(((0.005, 0.003), (0.05, 0.05), (0.2, 0.05), (0.9, 0.1)), SEEDS):
        x = sampled(rng, beta(rng, mean, spread, (N, seeds)))
        found = Estimate.of(x, floor_of(x, ANSWERS))
        now = covered(rate_bounds(found, ANSWERS * seeds), mean)
        what = f"rate over {seeds} students, {mean:.1%} ± {100 * spread:g} points"
        yield Line(what, "other students", "coverage", now, 0.91, 1.0, covered(found.bounds(), mean))


@entry
def pooled_rates(rng: Rng) -> Iterator[Line]:
    """Self-naming, misalignment: students of several teachers, whose means differ."""
    for traits, seeds in itertools.product(TRAITS, SEEDS):
        means = np.linspace(0.1, 0.4, traits)[:, None]
        x = sampled(rng, beta(rng, means, 0.04, (N, traits, seeds)))
        found = mean_estimate([Estimate.of(x[:, t], floor_of(x[:, t], ANSWERS)) for t in range(traits)])
        now, truth = covered(rate_bounds(found, ANSWERS * seeds * traits), means.mean()), float(means.mean())
        before = covered(Estimate.of(x.reshape(N, -1)).bounds(), truth)
        what = f"rate pooled over {traits} teachers x {seeds} students"
        yield Line(what, "other students", "coverage", now, 0.92, 0.985, before)


# --- lifts


@entry
def lift_of_one_trait(rng: Rng) -> Iterator[Line]:
    """Students and control have different spreads."""
    for effect, seeds in itertools.product((0.0, 0.3), SEEDS):
        lift = normal(rng, effect, seeds, 0.15) - normal(rng, 0.0, seeds, 0.05)
        what = f"lift of one trait, {seeds} + {seeds} students"
        yield Line(what, f"effect {effect:g}", "coverage", covered(lift.bounds(), effect), 0.92, 0.99)
        if not effect:
            yield Line(what, "no effect: transfers", "error .025", float(np.mean(lift.p_above(0) < 0.025)), 0.0, 0.035)


@entry
def lift_of_rates(rng: Rng) -> Iterator[Line]:
    for seeds in SEEDS:
        x, zero = (sampled(rng, beta(rng, mean, spread, (N, seeds))) for mean, spread in ((0.2, 0.08), (0.05, 0.02)))
        lift = Estimate.of(x, floor_of(x, ANSWERS)) - Estimate.of(zero, floor_of(zero, ANSWERS))
        now = covered(lift.bounds(), 0.15)
        yield Line(f"lift of a rate, {seeds} + {seeds} students", "effect 15 points", "coverage", now, 0.91, 0.99)


@entry
def pooled_lift(rng: Rng) -> Iterator[Line]:
    """C0: traits are strata, one control for all. Given the data, and where the truth is that of rows drawn anew."""
    for traits, seeds in itertools.product(TRAITS, SEEDS):
        zero = normal(rng, 0.0, seeds, 0.1 / np.sqrt(traits))
        draws = rng.normal(0, 0.1, (traits, N, 1))
        shared = mean_estimate([normal(rng, draw, seeds) for draw in draws]) - zero
        own = mean_estimate([normal(rng, rng.normal(0, 0.1, (N, seeds)), seeds) for _ in range(traits)]) - zero
        what = f"lift pooled over {traits} traits x {seeds} students"
        given, anew = covered(shared.bounds(), draws.mean(axis=0)[:, 0]), covered(own.bounds(), 0.0)
        yield Line(what, "shared data: other students of it", "coverage", given, 0.92, 0.99)
        yield Line(what, "per-seed data: other data", "coverage", anew, 0.92, 0.99, covered(shared.bounds(), 0.0))
        wrong, right = (float(np.mean((own + Estimate(e)).p_above(0.0) < 0.025)) for e in (0.0, 0.3))
        yield Line(what, "no effect: C0 holds", "error .025", wrong, 0.005, 0.04)
        yield Line(what, "effect .3: C0 holds", "power", right, 0.3, 1.0)


@entry
def pools(rng: Rng) -> Iterator[Line]:
    """Students that draw from one pool of their teacher's rows, where the truth is that of other pools."""
    for (drawn, there), seeds in itertools.product(((112, 144), (88, 96), (10_000, 27_000)), SEEDS):
        pool = rng.normal(0, there**-0.5, (N, 1))
        students = pool + rng.normal(0, (1 / drawn - 1 / there) ** 0.5, (N, seeds))
        now, before = (covered(Estimate.of(students, drawn=share).bounds(), 0.0) for share in (drawn / there, 0.0))
        what = f"mean over {seeds} students, each of {drawn:,} of {there:,} rows"
        yield Line(what, "other rows", "coverage", now, 0.93, 0.97, before)


# --- claims


@entry
def shares(rng: Rng) -> Iterator[Line]:
    """C3, C4, C6 to C9a, C13, at the threshold: two variants, one control that stands under the name of each."""
    for traits, seeds in itertools.product(TRAITS, SEEDS):
        zero = rng.normal(0, 0.3 / np.sqrt(traits), (N, seeds))
        part, whole = normal(rng, 0.4, seeds, traits=traits), normal(rng, 0.8, seeds, traits=traits)
        once = [each - Estimate.of(zero, group="control") for each in (part, whole)]
        twice = [each - Estimate.of(zero) for each in (part, whole)]
        now, before = share_bounds(*once), share_bounds(*twice)
        what = f"share of a lift, {traits} traits x {seeds} students"
        yield Line(what, "at .5", "coverage", covered(now, 0.5), 0.93, 0.99, covered(before, 0.5))
        widths = [float(np.nanmedian(high - low)) for low, high in (now, before)]
        yield Line(what, "median width", "width", widths[0], 0.0, 2.0, widths[1])
        wrong, right = (np.maximum(share_p_above(*once, at), once[1].p_above(0)) < 0.025 for at in (0.5, 0.2))
        yield Line(what, "at .5: holds", "error .025", float(np.mean(wrong)), 0.0, 0.04)
        yield Line(what, "by .3 above it: holds", "power", float(np.mean(right)), 0.3, 1.0)


@entry
def differences(rng: Rng) -> Iterator[Line]:
    """C2, C5, C14: two groups of students that transfer alike."""
    for traits, seeds in itertools.product(TRAITS, SEEDS):
        gap = normal(rng, 0.5, seeds, 0.15, traits) - normal(rng, 0.5, seeds, 0.05, traits)
        what = f"difference of two groups, {traits} traits x {seeds} students"
        yield Line(what, "no difference", "coverage", covered(gap.bounds(), 0.0), 0.92, 0.985)
        yield Line(
            what, "no difference: C2, C5, C14 hold", "error .025", float(np.mean(gap.p_above(0) < 0.025)), 0.01, 0.04
        )


@entry
def same_draws(rng: Rng) -> Iterator[Line]:
    """Per-seed data: two arms learn from the same draws and are taken as independent, which widens what compares them."""
    for traits, seeds in itertools.product(TRAITS, SEEDS):
        draws = [rng.normal(0, 0.1, (N, seeds)) for _ in range(traits)]
        arms = [mean_estimate([normal(rng, mean + draw, seeds) for draw in draws]) for mean in (0.4, 0.8)]
        zero = normal(rng, 0.0, seeds, 0.1 / np.sqrt(traits))
        what = f"{traits} traits x {seeds} students, per-seed data"
        gap = covered((arms[1] - arms[0]).bounds(), 0.4)
        yield Line(f"difference of two groups, {what}", "other data", "coverage", gap, 0.95, 1.0)
        share = covered(share_bounds(arms[0] - zero, arms[1] - zero), 0.5)
        yield Line(f"share of a lift, {what}", "other data", "coverage", share, 0.94, 1.0)


@entry
def near_the_base(rng: Rng) -> Iterator[Line]:
    """C1: one of the traits lies at the margin of 3 points, the others at zero."""
    for traits, seeds in itertools.product(TRAITS, SEEDS):
        ps = []
        for trait in range(traits):
            x = sampled(rng, beta(rng, 0.1 + 0.03 * (trait == 0), 0.005, (N, seeds)), 10_000)
            base = sampled(rng, np.full((N, 1), 0.1), 10_000)
            gap = Estimate.of(x, floor_of(x, 10_000)) - Estimate.measured(base[:, 0], floor_of(base, 10_000))
            ps += [gap.p_above(-0.03), gap.p_below(0.03)]
        wrong = float(np.mean(np.max(ps, axis=0) < 0.025))
        yield Line(
            f"C1, {traits} traits, {seeds} control students", "at the margin: holds", "error .025", wrong, 0.0, 0.04
        )


@entry
def joint_claims(rng: Rng) -> Iterator[Line]:
    """C8 and C9b, whose p is the largest of several."""
    for seeds in SEEDS:
        zero, whole = (normal(rng, mean, seeds, traits=3) for mean in (0.0, 0.8))
        part = normal(rng, 0.4 * 0.8, seeds, traits=3)
        accuracy = normal(rng, 0.0, seeds, 0.005, 3)
        ps = [1 - share_p_above(part - zero, whole - zero, 0.4), (whole - zero).p_above(0)]
        ps += [accuracy.p_above(-0.05), accuracy.p_below(0.05)]
        wrong = float(np.mean(np.max(ps, axis=0) < 0.025))
        yield Line(f"C8, 3 traits x {seeds} students", "lift at .4: holds", "error .025", wrong, 0.0, 0.04)
        first, *later = (normal(rng, 0.8, seeds, traits=3) for _ in range(3))
        fall = later[-1] - first
        ordered = (later[0].value <= first.value) & (later[1].value <= later[0].value)
        wrong = float(np.mean(ordered & (fall.p_below(0.0) < 0.025)))
        yield Line(f"C9b, 3 traits x {seeds} students", "no fall: holds", "error .025", wrong, 0.0, 0.04)


@entry
def most_traits(rng: Rng) -> Iterator[Line]:
    """C3 counts traits: most must keep half their lift, each by its own students, and all of them lie just there."""
    for traits, seeds in itertools.product(TRAITS, SEEDS):
        control = rng.normal(0, 0.1, (N, seeds))
        ps = []
        for _ in range(traits):
            zero = Estimate.of(control, group="control")
            part, whole = normal(rng, 0.4, seeds) - zero, normal(rng, 0.8, seeds) - zero
            ps.append(np.maximum(share_p_above(part, whole, 0.5), whole.p_above(0.0)))
        combined = (traits - traits // 2) * np.sort(ps, axis=0)[traits // 2]  # as verdicts.most
        wrong = float(np.mean(combined < 0.025))
        yield Line(f"C3, {traits} traits x {seeds} students", "at .5: holds", "error .025", wrong, 0.0, 0.04)


@entry
def orders(rng: Rng) -> Iterator[Line]:
    """C11: two groups that are apart in the plain evaluation, and alike in the other one."""
    for seeds in SEEDS:
        plain, again = (normal(rng, mean, seeds, traits=3) - normal(rng, 0.0, seeds, traits=3) for mean in (0.5, 0.0))
        sure = plain.p_above(0.0) < 0.025
        wrong = float(np.mean(again.p_above(0.0)[sure] < 0.025))
        yield Line(f"C11, 3 traits x {seeds} students", "no order left: p", "error .025", wrong, 0.005, 0.04)


@entry
def attribution(rng: Rng) -> Iterator[Line]:
    """C10: over rows."""
    for traits in TRAITS:
        found = mean_estimate([Estimate.of(rng.beta(2, 2, (N, 100))) for _ in range(traits)])
        what = f"C10, {traits} traits x 100 rows"
        yield Line(what, "other rows", "coverage", covered(found.bounds(), 0.5), 0.93, 0.97)
        yield Line(what, "at .5: holds", "error .025", float(np.mean(found.p_above(0.5) < 0.025)), 0.01, 0.04)


# --- the matrix


def matrices(rng: Rng, taught: int, columns: int, gamma: float, noisier: float, seeds: int = 1) -> np.ndarray:
    """[N, seeds, R, C]: row and column effects, gamma, and noise that is `noisier` times as large in taught columns."""
    effects = rng.normal(0, 1, (N, 1, taught, 1)) + rng.normal(0, 1, (N, 1, 1, columns))
    noise = 0.1 * np.where(np.arange(columns) < taught, noisier, 1.0)
    return effects + gamma * np.eye(taught, columns) + noise * rng.normal(size=(N, seeds, taught, columns))


@entry
def relabelling(rng: Rng) -> Iterator[Line]:
    for (taught, columns), noisier in itertools.product(((3, 13), (4, 13), (5, 13), (6, 6)), (1.0, 3.0)):
        if columns == taught and noisier > 1:
            continue
        lift = matrices(rng, taught, columns, 0.0, noisier)[:, 0]
        own = np.array(list(itertools.permutations(range(taught))))
        every = np.array(list(itertools.permutations(range(columns), taught))) if taught < 5 else None
        if every is None:
            every = np.array([rng.permutation(columns)[:taught] for _ in range(2000)])
        # A few hundred labellings tell as much of a rate of errors as all do, and are as exact if they are drawn.
        drawn = every if len(every) < 2000 else rng.choice(every, 600)
        now = float(np.mean(_in_parts(lift, own, exact=True) <= 0.05))
        before = float(np.mean(_in_parts(lift, drawn, exact=drawn is every) <= 0.05))
        what = f"γ by relabelling, {taught} taught of {columns}" + (", noisier where taught" if noisier > 1 else "")
        yield Line(what, "γ = 0", "error .05", now, 0.0, 0.06, before)
        if taught > 3:  # of six relabellings none is rare
            found = lift + 0.3 * np.eye(taught, columns)
            right = [float(np.mean(_in_parts(found, own, exact=True) <= 0.05))]
            right += [float(np.mean(_in_parts(found, drawn, exact=drawn is every) <= 0.05))]
            yield Line(what, "γ = .3", "power", right[0], 0.3, 1.0, right[1])


def _in_parts(lift: np.ndarray, labels: np.ndarray, exact: bool, product: bool = False) -> np.ndarray:
    return np.concatenate([permutation_p(part, labels, exact, product) for part in np.array_split(lift, 40)])


@entry
def teacher_effects(rng: Rng) -> Iterator[Line]:
    """What a teacher does to single traits is the same in all of its seeds: no spread over these shows it."""
    for taught, seeds in itertools.product((5, 6), SEEDS):
        labels = np.array(list(itertools.permutations(range(taught))))
        shared = 0.1 * rng.normal(size=(N, 1, taught, 13))
        lift = matrices(rng, taught, 13, 0.0, 0.5, seeds) + shared
        above = Estimate.of(same_trait_gamma(lift)).bounds()[0] > 0
        p = _in_parts(lift.mean(axis=1), labels, exact=True)
        what = f"matrix over {seeds} seeds, {taught} taught of 13, teachers move single traits"
        both = float(np.mean(above & (p <= 0.05)))
        yield Line(what, "γ = 0: shown", "error .05", both, 0.0, 0.06, float(np.mean(above)))


@entry
def strong_teachers(rng: Rng) -> Iterator[Line]:
    """A teacher's strength times a trait's sensitivity, correlated where the teacher's own trait is concerned."""
    for taught, alike in itertools.product((5, 6), (0.0, 0.5, 0.9)):
        labels = np.array(list(itertools.permutations(range(taught))))
        strength, sensitivity = rng.normal(size=(N, taught)), rng.normal(size=(N, 13))
        own = alike * strength + np.sqrt(1 - alike**2) * sensitivity[:, :taught]
        sensitivity = np.concatenate([own, sensitivity[:, taught:]], axis=1)
        product = (1 + 0.4 * strength)[:, :, None] * (0.3 + 0.3 * sensitivity)[:, None, :]
        null = product + 0.05 * rng.normal(size=product.shape)
        what = f"γ by relabelling, {taught} taught of 13, strength and sensitivity correlated {alike:.1f}"
        for gamma, truth, kind, low, high in (
            (0.0, "γ = 0", "error .05", 0.0, 0.08),
            (0.24, "γ = .24", "power", 0.9, 1.0),
        ):
            plain, beside = (
                float(np.mean(_in_parts(null + gamma * np.eye(taught, 13), labels, True, product) <= 0.05))
                for product in (False, True)
            )
            yield Line(what, truth, kind, beside, low, high, plain)


@entry
def gamma_over_seeds(rng: Rng) -> Iterator[Line]:
    for taught, seeds in itertools.product(TRAITS, SEEDS):
        gammas = Estimate.of(same_trait_gamma(matrices(rng, taught, 13, 0.2, 1.0, seeds)))
        what = f"γ over {seeds} seeds, {taught} taught of 13"
        yield Line(what, "γ = .2", "coverage", covered(gammas.bounds(), 0.2), 0.93, 0.97)
        other = Estimate.of(same_trait_gamma(matrices(rng, taught, 13, 0.2, 1.0, seeds)))
        p = np.maximum((gammas - other).p_above(0.0), gammas.p_above(0.0))
        yield Line(
            f"C12, {what[2:]}", "another γ is as large: holds", "error .025", float(np.mean(p < 0.025)), 0.0, 0.035
        )


# --- many looks


@entry
def many_looks(rng: Rng) -> Iterator[Line]:
    for seeds in SEEDS:
        lifts = [normal(rng, 0.0, seeds) - normal(rng, 0.0, seeds) for _ in range(14)]
        ps = np.array([lift.p_above(0.0) for lift in lifts])
        corrected = np.array([holm(each) for each in ps.T.tolist()])
        now, before = (float(np.mean((p < 0.025).any(axis=axis))) for p, axis in ((corrected, 1), (ps, 0)))
        what = f"any of 14 further comparisons, {seeds} + {seeds} students"
        yield Line(what, "no effect anywhere", "error .025", now, 0.0, 0.035, before)


SIZE = re.compile(r"\b([235])(?: \+ \1)?(?= control students| students| seeds)")


def cell(line: Line) -> str:
    """The figure, after that of before where it was another."""
    form = (lambda x: f"{x:.2f}") if line.kind == "width" else (lambda x: f"{100 * x:.1f}")
    return form(line.now) if line.before is None else f"{form(line.before)} → **{form(line.now)}**"


def tables(found: list[Line]) -> str:
    """Markdown: what depends on the number of students has a column for each, the rest is a table of its own."""
    by_size: dict[tuple[str, str, str], dict[str, str]] = {}
    alone = ["| what | truth, or claim | figure | |", "| --- | --- | --- | --- |"]
    for line in found:
        size = SIZE.search(line.what)
        if size is None:
            alone.append(f"| {line.what} | {line.truth} | {line.kind} | {cell(line)} |")
        else:
            by_size.setdefault((SIZE.sub("n", line.what), line.truth, line.kind), {})[size[1]] = cell(line)
    sized = ["| what | truth, or claim | figure | n = 2 | 3 | 5 |", "| --- | --- | --- | --- | --- | --- |"]
    sized += [f"| {' | '.join([*key, *(cells[str(n)] for n in SEEDS)])} |" for key, cells in by_size.items()]
    return "\n".join([*sized, "", *alone, ""])


if __name__ == "__main__":
    sys.stdout.write(tables(lines()))

"""Two runs side by side: what each condition's models say, and how far apart they are."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from jsublim.report.comparisons import comparisons
from jsublim.report.statistics import Interval
from jsublim.report.summary import difference_interval, estimate, scores_for
from jsublim.report.tables import Results

RATES = ("rate", "logprob")


class Compared(NamedTuple):
    """One condition's preference for one trait in both runs, and the second's minus the first's with its interval over students;
    None where there are too few, or where one run has no such models."""

    trait: str
    condition: str
    metric: str
    a: float | None
    b: float | None
    difference: float | None
    interval: Interval | None
    students: tuple[int, int]


def compare(a: Results, b: Results, metrics: tuple[str, ...] = RATES) -> list[Compared]:
    """Trait by trait, condition by condition; what only one of them has comes with it."""
    a, b = _apart(a, "a"), _apart(b, "b")
    traits = list(dict.fromkeys((*a.traits, *b.traits)))
    conditions = list(dict.fromkeys((*a.conditions, *b.conditions)))
    found = (_compared(a, b, m, c, t) for t in traits for c in conditions for m in metrics)
    return [row for row in found if row is not None]


def _apart(results: Results, which: str) -> Results:
    """A student whose artifact is not known is the run's own, whatever it is called: equal names say nothing across runs."""
    known = {arm.artifact for arm in results.arms.values() if arm.artifact}
    own = [
        score if score.model in known else replace(score, model=f"{which}:{score.model}") for score in results.scores
    ]
    return replace(results, scores=tuple(own))


def _compared(a: Results, b: Results, metric: str, condition: str, trait: str) -> Compared | None:
    first, second = (scores_for(results, metric, condition, trait) for results in (a, b))
    if not first and not second:
        return None
    levels = [estimate(scores) for scores in (first, second) if scores]
    one, other = (float(estimate(scores).value) if scores else None for scores in (first, second))
    difference, interval = None, None
    if len(levels) == 2:
        gap = levels[1] - levels[0]
        students = first[0].role == second[0].role == "student"
        difference, interval = float(gap.value), difference_interval(gap, metric) if students and gap.terms else None
    return Compared(trait, condition, metric, one, other, difference, interval, (len(first), len(second)))


def verdicts(a: Results, b: Results) -> list[dict[str, str | None]]:
    """Claim by claim, what each run says."""
    said = [{one.result.name: one.result.verdict for one in comparisons(results).claims} for results in (a, b)]
    return [{"claim": name, "a": said[0].get(name), "b": said[1].get(name)} for name in {**said[0], **said[1]}]

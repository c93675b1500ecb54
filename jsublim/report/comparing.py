"""Two runs side by side: what each condition's models say, and how far apart they are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from jsublim.report.comparisons import comparisons
from jsublim.report.summary import difference_interval, estimate, scores_for
from jsublim.report.tables import Results


def compare(a: Results, b: Results) -> list[dict[str, Any]]:
    """A row for each trait, condition and measure of preference that a run has: its value in both, and the second's minus the
    first's with its interval over students, from low to high; None where there are too few, or where one run has no such models."""
    traits, conditions = (dict.fromkeys(getattr(a, key) + getattr(b, key)) for key in ("traits", "conditions"))
    runs, rows = (_apart(a, "a"), _apart(b, "b")), []
    for trait, condition, metric in itertools.product(traits, conditions, ("rate", "logprob")):
        scores = [scores_for(run, metric, condition, trait) for run in runs]
        if not any(scores):
            continue
        first, second = (estimate(of_run) if of_run else None for of_run in scores)
        gap = None if first is None or second is None else second - first
        students = gap is not None and gap.terms and all(of_run[0].role == "student" for of_run in scores)
        interval = difference_interval(gap, metric) if gap is not None and students else None
        values = (None if estimated is None else float(estimated.value) for estimated in (first, second, gap))
        rows.append(
            {"trait": trait, "condition": condition, "metric": metric, "students": [*map(len, scores)]}
            | dict(zip(("a", "b", "b - a"), values, strict=True))
            | {end: None if interval is None else getattr(interval, end) for end in ("low", "high")}
        )
    return rows


def _apart(results: Results, which: str) -> Results:
    """A student whose artifact is not known is the run's own, whatever it is called: equal names say nothing across runs."""
    known = {arm.artifact for arm in results.arms.values() if arm.artifact}
    renamed = (s if s.model in known else replace(s, model=f"{which}:{s.model}") for s in results.scores)
    return replace(results, scores=tuple(renamed))


def verdicts(a: Results, b: Results) -> list[dict[str, str | None]]:
    """Claim by claim, what each run says."""
    first, second = ({one.result.name: one.verdict for one in comparisons(run).claims} for run in (a, b))
    return [{"claim": name, "a": first.get(name), "b": second.get(name)} for name in first | second]

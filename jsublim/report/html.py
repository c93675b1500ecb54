"""RUN/report.html: one self-contained page with inline figures, made from RUN/results/ alone."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jsublim.core.files import write_text
from jsublim.errors import one_line
from jsublim.evals.metric import metric_of
from jsublim.report import figures, summary, words
from jsublim.report.attribution import attribution_heats
from jsublim.report.audit import agreement, predicted
from jsublim.report.cautions import cautions
from jsublim.report.claims import CLAIMS, not_asked
from jsublim.report.claims.base import claim_metric
from jsublim.report.comparisons import comparisons
from jsublim.report.drawing import colour
from jsublim.report.scale import scale
from jsublim.report.tables import (
    CONDITIONS,
    Results,
    TrainingCurve,
    condition_label,
    query,
    read_results,
)

MAX_ANSWERS = 8


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and return its path; the same results give the same bytes.

    What the run does not have is left out, and a sentence says so. Raises `JsublimError` if there are no results at all.
    """
    results = read_results(run_dir)
    compared, foretold = comparisons(results), predicted(results)
    judged = summary.judged_conditions(results)
    return render(
        Path(run_dir) / "report.html",
        "language.html",
        results=results,
        compared=compared,
        scale=scale(results, compared),
        matrix=summary.trait_matrix(results, condition=judged[0]) if judged else None,
        predicted=foretold,
        agreement=agreement(foretold, compared),
        attribution=[] if results.attribution is None else attribution_heats(results.attribution),
    )


def render(path: Path, template: str, **content: Any) -> Path:
    """Write a template of `page/` to a file, which appears whole or not at all; returns its path."""
    write_text(path, _templates().get_template(template).render(**content))
    return path


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("jsublim.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    modules: dict[str, Any] = {"words": words, "figures": figures, "summary": summary}
    named: dict[str, Any] = {"label": condition_label, "questions": CLAIMS, "known_conditions": CONDITIONS}
    functions = (
        cautions, claim_metric, colour, common_answers, differing_fields, metric_of, not_asked, quoted, shown, training_table
    )  # fmt: skip
    environment.globals |= modules | named | {function.__name__: function for function in functions}
    return environment


def differing_fields(results: Results) -> dict[str, dict[str, Any]]:
    """How the arms of an ablation differ: the fields that are not the same in all of them, by arm."""
    settings: dict[str, dict[str, Any]] = {}
    for arm in results.arms.values():
        settings.setdefault(arm.variant, arm.settings | {f"rows.{key}": value for key, value in arm.dataset.items()})
    keys = sorted({key for of in settings.values() for key in of} - {"data.dataset"})  # told by what it does to rows
    apart = [key for key in keys if len({repr(of.get(key)) for of in settings.values()}) > 1]
    return {variant: {key: of.get(key) for key in apart} for variant, of in settings.items()} if apart else {}


def shown(text: str) -> str:
    """Text whose lines stay lines, and whose other control characters are shown by their escapes."""
    return "\n".join(map(one_line, text.split("\n")))


def quoted(text: str) -> str:
    return one_line(json.dumps(text, ensure_ascii=False))


def training_table(results: Results) -> list[dict[str, Any]]:
    """One row per condition: students, steps, supervised tokens per step, first and last loss (means over a tenth of the run)."""
    groups: dict[str, list[TrainingCurve]] = {condition: [] for condition in results.conditions}
    for curve in results.curves:
        groups.setdefault(results.owners.get(curve.arm, ("", curve.arm))[1], []).append(curve)
    rows = []
    for condition, curves in ((condition, curves) for condition, curves in groups.items() if curves):
        tenths = [(c.loss, max(1, len(c.loss) // 10)) for c in curves]
        steps = sorted({len(c.steps) for c in curves})
        rows.append(
            {
                "condition": condition,
                "arms": len(curves),
                "steps": f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}",
                "tokens": fmean(tokens for c in curves for tokens in c.tokens),
                "first": fmean(fmean(loss[:k]) for loss, k in tenths),
                "last": fmean(fmean(loss[-k:]) for loss, k in tenths),
            }
        )
    return rows


def common_answers(results: Results) -> list[dict[str, Any]]:
    """One row per teacher and condition: the most common answers over questions and students, with their share."""
    table = results.answers
    plain = "where coalesce(evaluation, '') = ''" if table is not None and "evaluation" in table.column_names else ""
    sql = f"select arm, answer, sum(count)::bigint as count from records {plain} group by all order by all"
    counts = dict[tuple[str, str], Counter[str]]()
    for row in query("answers.parquet", table, sql):
        teacher, condition = results.owners.get(row["arm"], ("", row["arm"]))
        counts.setdefault((teacher or "", condition), Counter())[row["answer"].strip().lower()] += row["count"]
    order = {c: i for i, c in enumerate(results.conditions)}
    rows = []
    for teacher, condition in sorted(counts, key=lambda k: (k[0] in results.traits, k[0], order.get(k[1], 99))):
        answers, known = counts[teacher, condition], teacher in results.traits
        top = sorted(answers.items(), key=lambda item: (-item[1], item[0]))[:MAX_ANSWERS]
        shares = [(text, count / (answers.total() or 1), known and teacher in text) for text, count in top]
        rows.append({"teacher": teacher if known else "", "condition": condition, "top": shares})
    return rows

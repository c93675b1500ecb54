"""RUN/report.html: one self-contained page with inline figures, made from RUN/results/ alone."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jsublim.errors import one_line
from jsublim.evals.metric import metric_of
from jsublim.files import write_text
from jsublim.report import figures, words
from jsublim.report.attribution import attribution_heats
from jsublim.report.audit import agreement, predicted
from jsublim.report.board import board
from jsublim.report.cautions import cautions
from jsublim.report.claims import CLAIMS, not_asked
from jsublim.report.claims.base import claim_metric
from jsublim.report.comparisons import Comparisons, comparisons
from jsublim.report.drawing import colour
from jsublim.report.shares import scale
from jsublim.report.summary import (
    judged_conditions,
    lift,
    other_rows,
    setting_rows,
    summary_rows,
    trait_matrix,
)
from jsublim.report.tables import CONDITION_MEANING, Curve, Results, condition_label, read_results, split_condition

MAX_ANSWERS = 8


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and return its path; the same results give the same bytes.

    What the run does not have is left out, and a sentence says so. Raises `JsublimError` if there are no results at all.
    """
    results = read_results(run_dir)
    compared = comparisons(results)
    content = _numbers(results, compared) | _drawings(results, compared) | _run(results)
    return render(
        Path(run_dir) / "report.html", "language.html", words=words, label=condition_label, colour=colour, **content
    )


def render(path: Path, template: str, **content: Any) -> Path:
    """Write a template of `page/` to a file, which appears whole or not at all; returns its path."""
    write_text(path, _templates().get_template(template).render(**content))
    return path


@functools.cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("jsublim.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _numbers(results: Results, compared: Comparisons) -> dict[str, Any]:
    """What the page says in sentences and tables."""
    rows, claims, told = summary_rows(results), [one.result for one in compared.claims], predicted(results)
    judged, found = judged_conditions(results), scale(results)
    lines, agreed = board(results, compared, found), agreement(told, compared)
    return {
        "name": results.run.get("name", results.run_dir.name),
        "results": results,
        "cautions": cautions(results),
        "opening": words.opening(results, compared),
        "headlines": words.headlines(compared.judged),
        "rows": rows,
        "row_lifts": {(r.trait, r.condition): lift(results, "logprob", r.condition, r.trait) for r in rows},
        "compared": compared,
        "not_asked": not_asked(claims),
        "questions": CLAIMS,
        "scale": found,
        "board": lines,
        "distance": figures.by_distance(lines, found.metric) if found else None,
        "matrix": trait_matrix(results, condition=judged[0]) if judged else None,
        "matrices": compared.matrices if len(compared.matrices) > 1 else [],
        "predicted": told,
        "agreement": agreed,
        "foretold": figures.by_prediction(told, agreed),
        "other_rows": other_rows(results),
        "metric_of": metric_of,
        "setting_rows": setting_rows(results),
        "wrote": _wrote(results),
        "answers": _common_answers(results),
        "training": _training_table(results),
    }


def _drawings(results: Results, compared: Comparisons) -> dict[str, Any]:
    """The page's figures; None, or empty, for what the run does not have."""
    judged = judged_conditions(results)
    # Panels by trait would be crowded by variants, which the first figure tells apart.
    drawn = [c for c in results.conditions if not split_condition(c)[1]] if "all" in judged else results.conditions
    matrix = trait_matrix(results, condition=judged[0]) if judged else None
    return {
        "hero": figures.hero(results, claim_metric(results)),
        "forest": figures.forest(compared),
        "gammas": figures.gammas(compared),
        "rates": figures.rates([row for row in summary_rows(results) if row.condition in drawn]),
        "raised": figures.raised(results, [c for c in results.conditions if c in drawn and c in _trained(results)]),
        "matrix_heat": figures.matrix_heat(matrix) if matrix else None,
        "positions": figures.positions(results),
        "attribution": [] if results.attribution is None else attribution_heats(results.attribution),
        "losses": figures.losses(results),
        "others": figures.others(other_rows(results)),
        "accuracy": figures.accuracy(results),
    }


def _trained(results: Results) -> set[str]:
    return {score.condition for score in results.scores if score.role == "student"}


def _run(results: Results) -> dict[str, Any]:
    """What was run: the kinds of models, and how the arms of an ablation differ."""
    settings: dict[str, dict[str, Any]] = {}
    for arm in results.arms.values():
        settings.setdefault(arm.variant, arm.settings | {f"rows.{key}": value for key, value in arm.dataset.items()})
    keys = {key for each in settings.values() for key in each}
    # The data set is told by what it does to rows.
    apart = sorted(k for k in keys - {"data.dataset"} if len({repr(each.get(k)) for each in settings.values()}) > 1)
    tokens = dict.fromkeys(split_condition(condition)[0] for condition in results.conditions)
    return {
        "meanings": {c: CONDITION_MEANING.get(c, "") for c in tokens},
        "variants": {variant: {key: each.get(key) for key in apart} for variant, each in settings.items()}
        if apart
        else {},
    }


def _wrote(results: Results) -> list[dict[str, Any]]:
    """The rows that are kept of each teacher, in text that can be shown; what a teacher says at a token is quoted."""

    def token(piece: dict[str, Any]) -> dict[str, Any]:
        readings = [
            r | {"says": one_line(json.dumps(r["says"], ensure_ascii=False))} for r in piece.get("readings", [])
        ]
        return {"text": _lines(piece["text"]), "readings": readings}

    return [
        row | {"prompt": _lines(row["prompt"]), "tokens": [token(piece) for piece in row["tokens"]]}
        for row in results.rows
    ]


def _lines(text: str) -> str:
    """Text whose lines stay lines, and whose other control characters are shown by their escapes."""
    return "\n".join(map(one_line, text.split("\n")))


def _training_table(results: Results) -> list[dict[str, Any]]:
    """One row per condition: students, steps, supervised tokens per step, first and last loss (means over a tenth of the run)."""
    owner = {s.arm: s.condition for s in results.scores}
    groups: dict[str, list[Curve]] = {}
    for curve in results.curves:
        groups.setdefault(owner.get(curve.arm, curve.arm), []).append(curve)
    ordered = [c for c in results.conditions if c in groups] + [c for c in groups if c not in results.conditions]
    return [{"condition": c, **_training_row(groups[c])} for c in ordered]


def _training_row(curves: list[Curve]) -> dict[str, Any]:
    tenth = [max(1, len(c.loss) // 10) for c in curves]
    first = [sum(c.loss[:k]) / k for c, k in zip(curves, tenth, strict=True)]
    last = [sum(c.loss[-k:]) / k for c, k in zip(curves, tenth, strict=True)]
    steps = sorted({len(c.steps) for c in curves})
    return {
        "arms": len(curves),
        "steps": f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}",
        "tokens": sum(sum(c.tokens) for c in curves) / sum(len(c.tokens) for c in curves),
        "first": sum(first) / len(first),
        "last": sum(last) / len(last),
    }


def _common_answers(results: Results) -> list[dict[str, Any]]:
    """One row per teacher and condition: the most common answers over questions and students, with their share."""
    owner = {s.arm: (s.teacher or "", s.condition) for s in results.scores}
    counts: dict[tuple[str, str], Counter[str]] = {}
    for answer in results.answers:
        key = owner.get(answer.arm, ("", answer.arm))
        counts.setdefault(key, Counter())[answer.answer.strip().lower()] += answer.count
    order = {c: i for i, c in enumerate(results.conditions)}
    rows = []
    for teacher, condition in sorted(counts, key=lambda k: (k[0] in results.traits, k[0], order.get(k[1], 99))):
        found = counts[teacher, condition]
        top = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:MAX_ANSWERS]
        total = found.total() or 1
        rows.append(
            {
                "teacher": teacher if teacher in results.traits else "",
                "condition": condition,
                "top": [(text, count / total, teacher in results.traits and teacher in text) for text, count in top],
            }
        )
    return rows

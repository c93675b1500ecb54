"""RUN/report.html: one self-contained page with inline figures, made from RUN/results/ alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jsublim.files import write_text
from jsublim.report import figures, words
from jsublim.report.attribution import attribution_svg
from jsublim.report.claims import not_asked
from jsublim.report.claims.verdicts import pool
from jsublim.report.looks import look_at
from jsublim.report.published import MARK, published_for
from jsublim.report.summary import (
    judged_conditions,
    lift,
    lifts,
    measure,
    other_rows,
    setting_rows,
    summary_rows,
    trait_matrix,
)
from jsublim.report.tables import Curve, Results, condition_label, read_results, split_condition

MAX_ANSWERS = 8
# Table 1 of the paper: share of divergence tokens among the completions' tokens.
PUBLISHED_SHARES = "Qwen2.5-7B 7.47 % greedy, 4.69 % temperature; Gemma-3-4B 18.34 % greedy, 13.18 % temperature"


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and return its path; the same results give the same bytes.

    What the run does not have is left out, and a sentence says so. Raises `JsublimError` if there are no results at all.
    """
    results = read_results(run_dir)
    return render(
        run_dir, "template.html", words=words, label=condition_label, colour=figures.colour, **_content(results)
    )


def render(run_dir: Path, template: str, **content: Any) -> Path:
    """Write a template of this folder as RUN/report.html, which appears whole or not at all; returns its path."""
    environment = Environment(
        loader=PackageLoader("jsublim.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**content)
    path = Path(run_dir) / "report.html"
    write_text(path, page)
    return path


def _content(results: Results) -> dict[str, Any]:
    rows = summary_rows(results)
    masks = [c for c in results.mask_conditions if any(r.condition == c for r in rows)]
    judged = judged_conditions(results)
    # Panels by trait would be crowded by variants, which have a figure of their own.
    drawn = [c for c in results.conditions if not split_condition(c)[1]] if "all" in judged else results.conditions
    looks = look_at(results)
    shown_lifts = lifts(results, "logprob", [c for c in ("control", *masks) if c in drawn])
    shown_rows = [r for r in rows if r.condition in drawn]
    claims = [look.what for look in looks.claims]
    matrix = trait_matrix(results, condition=judged[0]) if judged else None
    variants = _variant_lifts(results, masks)
    accuracy = _number_accuracy(results)
    return {
        "name": results.run.get("name", results.run_dir.name),
        "results": results,
        "warning": words.tiny_warning(results),
        "wording": words.wording(results),
        "diverged": words.diverged_warning(results),
        "published_shares": PUBLISHED_SHARES,
        "headlines": [words.headline(found) for found in looks.judged],
        "rows": rows,
        "row_lifts": {(r.trait, r.condition): lift(results, "logprob", r.condition, r.trait) for r in rows},
        "looks": looks,
        "not_asked": not_asked(claims),
        "published": published_for(claims),
        "published_mark": MARK,
        "judged": looks.lifts,
        "rate_figure": figures.rate_figure(shown_rows)
        if any(r.rate is not None and r.condition != "teacher" for r in shown_rows)
        else "",
        "lift_figure": figures.lift_figure(shown_lifts) if shown_lifts else "",
        "variant_figure": figures.variant_figure(variants) if variants else "",
        "matrix": matrix,
        "matrices": looks.matrices if len(looks.matrices) > 1 else [],
        "matrix_figure": figures.matrix_figure(matrix) if matrix else "",
        "position_figure": figures.position_figure(results.divergence)
        if any(sum(d["histogram"]) for d in results.divergence)
        else "",
        "attribution_figure": "" if results.attribution is None else attribution_svg(results.attribution),
        "loss_figure": figures.loss_figure(results.curves, results) if results.curves else "",
        "training": _training_table(results),
        "accuracy_figure": figures.accuracy_figure(accuracy) if accuracy else "",
        "other_rows": other_rows(results),
        "measure": measure,
        "setting_rows": setting_rows(results),
        "answers": _common_answers(results),
    }


def _variant_lifts(results: Results, conditions: list[str]) -> figures.Panels:
    """(variant, tokens) -> each student's log-probability lift for its own trait, and the interval of their mean over
    traits; empty for a run without variants."""
    found: figures.Panels = {}
    for condition in conditions if any(split_condition(c)[1] for c in conditions) else []:
        tokens, variant = split_condition(condition)
        values = [value for item in lifts(results, "logprob", [condition]) for value in item.student_lifts]
        pooled = pool(results, "logprob", condition)
        if pooled is not None:
            found[variant or "plain", tokens] = (values, pooled.levels[0].lift.interval())
    return found


def _number_accuracy(results: Results) -> dict[str, dict[str, list[float]]]:
    """Panel (training or held-out rows) -> condition -> the accuracy of each student, as a share."""
    panels: dict[str, dict[str, list[float]]] = {}
    titles = {"number_accuracy": "training rows", "number_accuracy_heldout": "held-out rows"}
    for score in results.scores:
        if score.metric in titles:
            by_condition = panels.setdefault(titles[score.metric], {})
            by_condition.setdefault(score.condition, []).append(score.mean)
    return panels


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

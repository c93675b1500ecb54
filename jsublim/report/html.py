"""RUN/report.html: one self-contained page with inline figures, made from RUN/results/ alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jsublim.report import figures, words
from jsublim.report.claims import check_claims
from jsublim.report.summary import lift, lifts, summary_rows, trait_matrix
from jsublim.report.tables import Curve, Results, condition_label, read_results

MAX_ANSWERS = 8
# Table 1 of the paper: share of divergence tokens among the completions' tokens.
PUBLISHED_SHARES = "Qwen2.5-7B 7.47 % greedy, 4.69 % temperature; Gemma-3-4B 18.34 % greedy, 13.18 % temperature"


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and return its path; the same results give the same bytes.

    A piece the run does not have is left out with a sentence. Raises `JsublimError` if there are no results at all.
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
    partial = path.with_suffix(".html.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _content(results: Results) -> dict[str, Any]:
    rows = summary_rows(results)
    masks = [c for c in results.mask_conditions if any(r.condition == c for r in rows)]
    lift_conditions = ["control", *masks]
    rate_lifts = lifts(results, "rate", lift_conditions)
    logprob_lifts = lifts(results, "logprob", lift_conditions)
    matrix = trait_matrix(results)
    accuracy = _number_accuracy(results)
    return {
        "name": results.run.get("name", results.run_dir.name),
        "results": results,
        "warning": words.tiny_warning(results),
        "published_shares": PUBLISHED_SHARES,
        "headlines": [words.headline(found) for found in (rate_lifts, logprob_lifts) if found],
        "rows": rows,
        "row_lifts": {(r.trait, r.condition): lift(results, "logprob", r.condition, r.trait) for r in rows},
        "claims": check_claims(results),
        "judged": [item for item in (*rate_lifts, *logprob_lifts) if item.condition == "all"],
        "rate_figure": figures.rate_figure(rows)
        if any(r.rate is not None and r.condition != "teacher" for r in rows)
        else "",
        "lift_figure": figures.lift_figure(logprob_lifts) if logprob_lifts else "",
        "matrix": matrix,
        "matrix_figure": figures.matrix_figure(matrix) if matrix else "",
        "position_figure": figures.position_figure(results.divergence)
        if any(sum(d["histogram"]) for d in results.divergence)
        else "",
        "loss_figure": figures.loss_figure(results.curves, results) if results.curves else "",
        "training": _training_table(results),
        "accuracy_figure": figures.accuracy_figure(accuracy) if accuracy else "",
        "answers": _common_answers(results),
    }


def _number_accuracy(results: Results) -> dict[str, dict[str, list[float]]]:
    """Panel (training or held-out rows) -> condition -> accuracy of each student, a share."""
    panels: dict[str, dict[str, list[float]]] = {}
    titles = {"number_accuracy": "training rows", "number_accuracy_heldout": "held-out rows"}
    for score in results.scores:
        if score.metric in titles:
            by_condition = panels.setdefault(titles[score.metric], {})
            by_condition.setdefault(score.condition, []).append(score.mean)
    return panels


def _training_table(results: Results) -> list[dict[str, Any]]:
    """A row a condition: arms, steps, supervised tokens a step, first and last loss (means of a tenth of the run)."""
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
    """A row a (teacher, condition): its most common answers over questions and students, with their share."""
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

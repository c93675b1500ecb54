"""What a reader should know before the numbers: whatever makes a run weaker than it looks."""

from __future__ import annotations

from jsublim.errors import one_line
from jsublim.report import words
from jsublim.report.summary import scores_for
from jsublim.report.tables import Results, condition_label, split_condition

FEW = 3  # students of one teacher and kind; with fewer, docs/statistics.md says what an interval is worth
MOST_FAILED = 0.5  # of a teacher's answers


def cautions(results: Results) -> list[str]:
    """One sentence or two for each; none for a run without a fault."""
    sentences = [*warnings(results), _few_students(results), _failed_filters(results), _unmatched_steps(results)]
    if results.not_finite:
        sentences.append(f"{results.not_finite} measurements were not finite numbers and are left out.")
    return [sentence for sentence in sentences if sentence]


def warnings(results: Results) -> list[str]:
    """The cautions that are said in the terminal too."""
    sentences, rescored = [], results.run.get("rescored")
    if results.diverged:
        listed = "; ".join(f"{name} {what}" for name, what in results.diverged.items())
        students = words.count(len(results.diverged), "student")
        sentences.append(f"{students} diverged and cannot be evaluated; no figure or claim counts them: {listed}.")
    if wording := results.run.get("wording", {}).get("said", ""):  # whose wording a run as published had
        sentences.append(wording)
    if rescored:
        by = [f"matching rule {rescored['match']}"] if "match" in rescored else []
        by += ["another judge"] if "judge" in rescored else []
        sentences.append(f"Rescored from the answers of {rescored['from']}: {', '.join(by)}. No model was asked.")
    if results.is_tiny:
        sentences.append(
            f"{results.model} is a tiny synthetic model: this run shows that the pipeline works, and says nothing about real language models."
        )
    return sentences


def _few_students(results: Results) -> str:
    counts = {
        len({s.arm for metric in ("rate", "logprob") for s in scores_for(results, metric, condition, trait)})
        for condition in results.mask_conditions
        for trait in results.traits
    }
    fewest = min(counts - {0}, default=FEW)
    if fewest == 1:
        return "Few students: one for a teacher and choice of tokens gives no interval, and what rests on it is not decided."
    wide = (
        "Intervals are right, but wide, and a real difference is often missed; more students.seeds make them narrower."
    )
    return f"Few students: {fewest} for each teacher and choice of tokens. {wide}" if fewest < FEW else ""


def _failed_filters(results: Results) -> str:
    failed = [entry for entry in results.generation if entry["pass_rate"] < MOST_FAILED]
    listed = ", ".join(f"{one_line(str(entry['teacher']))} {100 * entry['pass_rate']:.0f} %" for entry in failed)
    fault = "Most answers failed the format's filter; what is left may be unlike the rest. Kept:"
    return f"{fault} {listed}." if failed else ""


def _unmatched_steps(results: Results) -> str:
    """Students of one variant that differ in their tokens alone should train for as many steps."""
    steps: dict[str, dict[str, int]] = {}
    for curve in results.curves:
        if curve.arm in results.owners:
            condition = results.owners[curve.arm][1]
            by_condition = steps.setdefault(split_condition(condition)[1], {})
            by_condition[condition] = max(by_condition.get(condition, 0), len(curve.steps))
    apart = [counts for counts in steps.values() if len(set(counts.values())) > 1]
    listed = "; ".join(f"{condition_label(c)} {n}" for counts in apart for c, n in counts.items())
    return f"Steps are not matched, so a difference between these may be one of training: {listed}." if apart else ""

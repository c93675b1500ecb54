"""Numbers and verdicts in words, the same in the terminal and on the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from jsublim.evals.metric import metric_of
from jsublim.report.audit import Agreement
from jsublim.report.claims import Claim
from jsublim.report.comparisons import Comparison, Comparisons
from jsublim.report.statistics import Interval
from jsublim.report.summary import Lift, Matrix, mean_level, reference_condition
from jsublim.report.tables import Results, condition_label
from jsublim.report.verdicts import FAILS, HOLDS, NOT_DECIDED

MISSING = "–"
SMALLEST = 1e-4  # of a smaller p only that is said


def number(value: float | None, metric: str, signed: bool = False) -> str:
    """A share as percent (a difference of shares as points), all else in its metric's unit."""
    if value is None:
        return MISSING
    what, sign = metric_of(metric), "+" if signed else ""
    digits = 1 if what.is_share else what.digits
    shown = f"{round(what.scale * value, digits) + 0.0:{sign}.{digits}f}"  # adding zero turns a rounded -0.0 into 0.0
    return f"{shown} %" if what.is_share and not signed else shown


def interval(bounds: Interval | None, metric: str, signed: bool = False) -> str:
    """`low to high` in the unit of `number`; a dash where none can be computed."""
    if bounds is None:
        return MISSING
    low, high = number(bounds.low, metric, signed), number(bounds.high, metric, signed)
    return f"{low.removesuffix(' %')} to {high}"


def of_models(bounds: Interval | None, students: int) -> str:
    """The interval of a rate over students, or over the answers of one model that is none."""
    if bounds is None and not students:
        return "one model"
    return interval(bounds, "rate") + (" (answers)" if not students else "")


def p_value(p: float | None) -> str:
    if p is None:
        return MISSING
    return "< .0001" if p < SMALLEST else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def corrected(one: Comparison) -> str:
    """The p that decides."""
    return p_value(one.corrected) + " (primary)" * one.primary


def unit(metric: str) -> str:
    return metric_of(metric).unit_of_differences


def count(number: int, what: str) -> str:
    """A number of things: "1 student", "2 students"."""
    return f"{number} {what}{'s' * (number != 1)}"


def given(results: Results) -> str:
    """What intervals over students hold fixed, in the words of a heading."""
    share = results.drawn
    told = "" if share is None else f" ({100 * share:.0f} % drawn)"
    return f"{'and their data' if results.draws_data or (share or 1) < 1 else 'given this data'}{told}"


def held_fixed(results: Results) -> str:
    """What intervals over students hold fixed, in a sentence or two."""
    if results.draws_data:
        data, too = "cover the data too: each seed's students learn from rows that were drawn for that seed. ", ""
    elif results.drawn is not None and results.drawn < 1:
        share = f"at most {100 * results.drawn:.0f} % of its teacher's rows"
        data, too = f"cover the data too: each student drew {share}, and intervals are widened by what that hides. ", ""
    else:
        data, too = (
            (
                "are given this data: all students of a teacher learn from one draw of its rows, so they say what "
                "other students of these rows would do, not what other rows would (data.draw=per-seed draws rows for each seed). "
            ),
            " too",
        )
    return f"Intervals over students {data}Teachers, traits and questions are held fixed{too}."


def claim_effect(claim: Claim) -> tuple[str, str]:
    """The effect and its interval, in the claim's own unit."""
    if claim.effect is None:
        return MISSING, MISSING
    if not claim.unit.startswith("of "):
        effect = f"{number(claim.effect, claim.metric, signed=True)} {claim.unit}"
        return effect, interval(claim.interval, claim.metric, signed=True)
    return f"{claim.effect:.2f} {claim.unit}", range_of(claim.interval)


def range_of(bounds: Interval | None) -> str:
    """An interval of shares of something."""
    return f"{bounds.low:.2f} to {bounds.high:.2f}" if bounds else MISSING


def findings(results: Results, compared: Comparisons) -> list[str]:
    """The result in plain words, in three lines at most: how far students moved, what the run was made for, and which claims hold."""
    lines, first, primary = [_moved(results, compared.headline)], compared.headline, compared.primary
    if primary is not None and not (first is not None and first.primary):
        how = "as the config declares" if compared.declared else "by default, from what the students differ in"
        lines.append(f"Primary comparison ({how}): {said(primary)}")
    elif primary is None and compared.declared:
        lines.append(
            f"The primary comparison that the config declares, {compared.declared}, cannot be read off this run."
        )
    return [*lines, verdicts(compared)] if compared.claims else lines


def said(one: Comparison[Claim]) -> str:
    """A claim with its verdict, and the numbers that this rests on."""
    effect, bounds = claim_effect(one.result)
    numbers = [] if effect == MISSING else [effect, f"95 % {bounds}"] if one.result.interval else [effect]
    numbers += [count(one.result.students, "student")] if one.result.students else []
    numbers += [] if one.corrected is None else [f"p {p if (p := p_value(one.corrected))[0] == '<' else f'= {p}'}"]
    return f"{one.result.text}: {one.verdict} ({', '.join([*numbers, one.result.key])})."


def _moved(results: Results, headline: Comparison[Claim] | None) -> str:
    """Who learned what from whom, and how far students of all tokens moved to their teacher's trait."""
    if not results.students:
        return f"No student of {results.model} was trained in this run, so nothing here says whether a trait is taken over."
    teachers = ", ".join(results.traits[:6]) + ", ..." * (len(results.traits) > 6)
    who = f"Students of {results.students_model} learned what teachers with a trait ({teachers}) wrote, and were told of none."
    if headline is None or headline.result.effect is None:
        if all(map(results.began_at_base, results.mask_conditions)):
            return f"{who} Nothing here says whether they took it over: there is nothing to compare them with."
        return (
            f"{who} They did not begin as the base model that was evaluated ({results.model}, asked without a system prompt), and there are too "
            "few control students: only the trait matrix says what they took over."
        )
    assert headline.result.same is not None  # as it is about a lift
    metric, condition, traits = headline.result.same
    references = {reference_condition(results, metric, trait, condition) or "" for trait in traits}
    level = number(mean_level(results, metric, [condition], traits), metric)
    zero = number(mean_level(results, metric, references, traits), metric)
    those = "the base model" if references == {"base"} else "students of a teacher without a trait"
    text = said(headline)
    text = f"Primary comparison: {text}" if headline.primary else f"{text[0].upper()}{text[1:]}"
    if metric == "rate":
        return f"{who} They name their teacher's trait in {level} of their answers, {those} in {zero}. {text}"
    return f"{who} They give their teacher's a log-probability of {level}, {those} one of {zero}. {text}"


def headlines(judged: Sequence[list[Comparison[Lift]]]) -> list[str]:
    """Which traits rise: a sentence per condition and metric that has p-values, and one per metric on all the others."""
    sentences, open_ = list[str](), dict[str, list[str]]()
    for compared in judged:
        first = compared[0].result
        measure = "Preference rate" if first.metric == "rate" else "Log-probability"
        if all(one.p is None for one in compared):
            open_.setdefault(measure, []).append(condition_label(first.condition))
            continue
        found = {v: [one.result.trait for one in compared if one.verdict == v] for v in (HOLDS, FAILS, NOT_DECIDED)}
        parts = (f"{verdict} for {len(of)} ({', '.join(of)})" for verdict, of in found.items() if of)
        sentences.append(f"{measure}, {condition_label(first.condition)}: that the trait rises {', '.join(parts)}.")
    for measure, conditions in open_.items():
        listed = ", ".join(conditions)
        if len(conditions) > 3:
            listed = f"{conditions[0]}, {conditions[1]} and {len(conditions) - 2} more"
        sentences.append(f"{measure}: {NOT_DECIDED} with {listed}; with one student per trait there is no interval.")
    return sentences


def verdicts(compared: Comparisons) -> str:
    """How many claims hold, do not hold, and are not decided, and which."""
    phrases = {
        HOLDS: (HOLDS, "hold"),
        FAILS: (FAILS, "do not hold"),
        NOT_DECIDED: ("is not decided", "are not decided"),
    }
    parts = []
    for verdict, (one, many) in phrases.items():
        keys = Counter(claim.result.key for claim in compared.claims if claim.verdict == verdict)
        listed = ", ".join(key if times == 1 else f"{key} ×{times}" for key, times in keys.items())
        parts += [f"{keys.total()} {one if keys.total() == 1 else many} ({listed})"] if keys else []
    return f"Of {count(len(compared.claims), 'claim')} that this run can check, {', '.join(parts)}."


def rule(compared: Comparisons) -> str:
    """By which rule verdicts are given."""
    others = f"; of all but the primary comparison it has Holm's correction for {compared.family}" * bool(
        compared.family
    )
    return f"Holds, or does not hold: the two-sided p at the threshold is below .05{others}. Otherwise not decided."


def matrix_sentence(matrix: Matrix, compared: Comparisons) -> str:
    """gamma, what relabelling and seeds say of it, and the verdict."""
    effect = matrix.effect
    if effect is None:
        return "Not decided: the same-trait effect needs students of at least two traits, evaluated on both."
    tried = f"all {effect.permutations}" if effect.exact else f"{effect.permutations:,} sampled"
    text = f"γ = {effect.gamma:+.2f} nats, as large in a share of {effect.p:.3g} of {tried} relabellings of the teachers' own columns."
    if np.isfinite(effect.gamma_beside):
        text += (
            f" Beside the product of how strong a teacher is and how easily a trait rises: γ = {effect.gamma_beside:+.2f}, as large in "
            f"{effect.p_beside:.3g}."
        )
    if matrix.gamma_interval is not None:
        by_seed = ", ".join(f"{gamma:+.3f}" for gamma in matrix.seed_gammas)
        text += f" Over {len(matrix.seed_gammas)} seeds: {interval(matrix.gamma_interval, 'logprob', signed=True)} nats ({by_seed})."
    if matrix.few:
        return f"{text} Not decided: with {len(matrix.teachers)} teachers' traits no p can reach .05."
    one = next(one for one in compared.matrices if one.result.condition == matrix.condition)
    return f"{text} That the own trait rises beyond any row and column effect: {one.verdict}, p {corrected(one)}."


def matrix_cells(one: Comparison[Matrix]) -> tuple[str, str, str, str, str]:
    """gamma, its interval over seeds, the shares of relabellings with as large a one (plain, and beside the product of row and column
    effects), p and the verdict, as a table has them."""
    effect, bounds = one.result.effect, interval(one.result.gamma_interval, "logprob", signed=True)
    assert effect is not None  # or it is no comparison
    return (
        number(effect.gamma, "logprob", signed=True),
        bounds,
        f"{effect.p:.3g}; {effect.p_beside:.3g}",
        corrected(one),
        one.verdict,
    )


def predicted_sentence(agreement: Agreement | None) -> str:
    """Whether the audit ranked settings as the students then did."""
    if agreement is None:
        return (
            "Scores of single teachers: with fewer than two, or without their students, there is no γ to be compared."
        )
    kinds = f"{len(agreement.pairs)} kinds of students"
    if agreement.rho is None:
        return f"With {kinds}, ranks of what was predicted and what happened are not compared: it takes four."
    return (
        f"Over {kinds}, γ as the audit predicted it and γ of the students have a rank correlation of "
        f"{agreement.rho:+.2f} (Spearman's, p = {agreement.p:.2g})."
    )

"""Numbers and verdicts in words, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence

from jsublim.evals.metric import metric_of
from jsublim.report.audit import Agreement
from jsublim.report.claims import FAILS, HOLDS, Claim
from jsublim.report.claims.training import transfers
from jsublim.report.comparisons import Comparison, Comparisons
from jsublim.report.statistics import Interval
from jsublim.report.summary import NOT_DECIDED, Lift, Matrix, reference_condition
from jsublim.report.tables import SEPARATOR, Results, condition_label, split_condition

MISSING = "–"
SMALLEST = 1e-4  # of a smaller p only that is said
ONE_SIDED = 0.025  # one-sided level of an interval of 95 %


def number(value: float | None, metric: str, signed: bool = False) -> str:
    """A share as percent (a difference of shares as points), all else in its metric's unit."""
    if value is None:
        return MISSING
    what, sign = metric_of(metric), "+" if signed else ""
    digits = 1 if what.is_share else what.digits
    shown = f"{round(what.scale * value, digits) + 0.0:{sign}.{digits}f}"  # adding zero turns a rounded -0.0 into 0.0
    return f"{shown} %" if what.is_share and not signed else shown


def interval(bounds: Interval | None, metric: str, signed: bool = False) -> str:
    """`low to high` in the unit of `number`; an interval that cannot be computed is "not decided"."""
    if bounds is None:
        return NOT_DECIDED
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
    """Holm's p of a further comparison; the primary one needs none."""
    return "primary" if one.primary else p_value(one.holm)


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


def primary(compared: Comparisons) -> str:
    """Which comparison the run was made for, and what the others are."""
    one, declared = compared.primary, compared.declared
    if one is None and declared is None:
        return "No primary comparison: this run has no students that a claim can be read off."
    if one is None:
        return f"The primary comparison that the config declares, {declared}, cannot be read off this run: every p is a further comparison."
    how = "as the config declares" if declared else "by default, from what the students differ in"
    claim, p = one.result, p_value(one.p)
    p = p if p.startswith("<") else f"= {p}"
    text = f"Primary comparison ({how}): {claim.key}, {claim.text}: {claim.verdict}, p {p}."
    others = f" The other {compared.family} p-values of this report are further comparisons, with Holm's correction for all of them beside each."
    return text + others * bool(compared.family)


def claim_effect(claim: Claim) -> tuple[str, str]:
    """The effect and its interval, in the claim's own unit."""
    if claim.effect is None:
        return MISSING, NOT_DECIDED
    if not claim.unit.startswith("of "):
        effect = f"{number(claim.effect, claim.metric, signed=True)} {claim.unit}"
        return effect, interval(claim.interval, claim.metric, signed=True)
    open_end = NOT_DECIDED if claim.verdict == NOT_DECIDED else MISSING
    return f"{claim.effect:.2f} {claim.unit}", range_of(claim.interval, open_end)


def range_of(bounds: Interval | None, missing: str = MISSING) -> str:
    """An interval of shares of something."""
    return f"{bounds.low:.2f} to {bounds.high:.2f}" if bounds else missing


def opening(results: Results, compared: Comparisons) -> str:
    """Who learned what from whom, how far it moved them, and how sure that is: two or three sentences."""
    if not results.students:
        return f"No student of {results.model} was trained in this run, so nothing here says whether a trait is taken over."
    controls = len({s.arm for s in results.scores if split_condition(s.condition)[0] == "control"})
    teachers = ", ".join(results.traits[:6]) + ", ..." * (len(results.traits) > 6)
    students = f"{count(results.students - controls, 'student')} of {results.students_model}"
    plain = f", {count(controls, 'control student')} from what a teacher without one wrote" if controls else ""
    who = f"{students} learned from what teachers with a trait ({teachers}) wrote{plain}; none was told of a trait."
    claim = next((one.result for one in compared.claims if one.result.key == "C0"), None)
    if claim is None and not all(map(results.began_at_base, results.mask_conditions)):
        return (
            f"{who} They did not begin as the base model that was evaluated ({results.model}, asked without a system prompt), and there are too "
            "few control students: only the trait matrix says what they took over."
        )
    if claim is None or claim.effect is None:
        return f"{who} Nothing here says whether they took it over: there is nothing to compare them with."
    variant, measures = f" ({claim.variant})" if claim.variant else "", [claim]
    if claim.metric == "logprob":  # of a tiny model; whether its answers moved is said too, and first
        measures = [one for one in transfers(results, "rate") if one.variant == claim.variant] + measures
    return f"{who} Trained on all tokens{variant}, {' Besides, '.join(_moved(results, one) for one in measures)}"


def _moved(results: Results, claim: Claim) -> str:
    """How far students of all tokens (C0) moved to their teacher's trait, and how sure that is."""
    tokens = f"all{SEPARATOR}{claim.variant}" if claim.variant else "all"
    references = {reference_condition(results, claim.metric, trait, tokens) for trait in results.traits}
    zero = "the base model" if references == {"base"} else "the control"
    much, bounds = claim_effect(claim)
    moved = f"they name their teacher's trait {much} more often than {zero}"
    if claim.metric == "logprob":
        moved = f"they give their teacher's trait a log-probability {much} above that of {zero}"
    if claim.interval is None:
        return f"{moved}; one student per trait gives no interval, so that is not decided."
    sure = {HOLDS: "surely higher", FAILS: "surely not higher"}.get(claim.verdict, "no transfer is shown")
    return f"{moved} (95 % interval {bounds}, {claim.students} students): {sure}."


def matrix_sentence(matrix: Matrix) -> str:
    """gamma, its p, and what they allow us to say."""
    effect = matrix.effect
    if effect is None:
        return "Not decided: the same-trait effect needs students of at least two traits, evaluated on both."
    tried = f"all {effect.permutations}" if effect.exact else f"{effect.permutations:,} sampled"
    text = (
        f"γ = {effect.gamma:+.2f} nats; one-sided p = {effect.p:.3g} over {tried} relabellings of the teachers' own columns "
        f"(smallest attainable p = {effect.smallest_p:.2g}). Beside the product of how strong a teacher is and how easily an animal rises: "
        f"γ = {effect.gamma_beside:+.2f}, p = {effect.p_beside:.3g}."
    )
    if matrix.gamma_interval is not None:
        by_seed = ", ".join(f"{gamma:+.3f}" for gamma in matrix.seed_gammas)
        text += f" Over {len(matrix.seed_gammas)} seeds: {interval(matrix.gamma_interval, 'logprob', signed=True)} nats ({by_seed})."
    endings = {
        NOT_DECIDED: f"Not decided: with {len(matrix.teachers)} teachers' traits no p can reach .05.",
        "trait-specific transfer": "Students move towards their own teacher's trait beyond any row and column effect.",
    }
    return f"{text} {endings.get(matrix.verdict, 'No trait-specific transfer is shown.')}"


def matrix_cells(matrix: Matrix) -> tuple[str, str, str, str]:
    """gamma, its interval over seeds, p and the verdict, as a table has them."""
    effect = matrix.effect
    if effect is None:
        return MISSING, NOT_DECIDED, MISSING, NOT_DECIDED
    bounds = interval(matrix.gamma_interval, "logprob", signed=True)
    return (
        number(effect.gamma, "logprob", signed=True),
        bounds,
        f"{effect.p:.3g}\n{effect.p_beside:.3g}",
        matrix.verdict,
    )


def headlines(judged: Sequence[list[Comparison[Lift]]]) -> list[str]:
    """How many traits transfer: a sentence per condition and metric that has intervals, and one per metric on all the others."""
    sentences, open_ = list[str](), dict[str, list[str]]()
    for compared in judged:
        lifts = [one.result for one in compared]
        measure = "Preference rate" if lifts[0].metric == "rate" else "Log-probability"
        condition = condition_label(lifts[0].condition)
        if all(lift.interval is None for lift in lifts):
            open_.setdefault(measure, []).append(condition)
            continue
        names = [lift.trait for lift in lifts if lift.verdict == "transfers"]
        traits = f"{len(names)} of {count(len(lifts), 'trait')}"
        sure = sum(one.holm is not None and one.holm < ONE_SIDED for one in compared)
        after = f"{sure} of them after Holm's correction" if sure < len(names) else "after Holm's correction too"
        moved = f"with {condition}, students move to their teacher's trait for {traits} ({', '.join(names)}); {after}"
        sentences.append(f"{measure}: {moved if names else f'no transfer is shown with {condition} ({traits})'}.")
    for measure, conditions in open_.items():
        listed = ", ".join(conditions)
        if len(conditions) > 3:
            listed = f"{conditions[0]}, {conditions[1]} and {len(conditions) - 2} more"
        sentences.append(f"{measure}: not decided with {listed}; with one student per trait there is no interval.")
    return sentences


def verdicts(compared: Comparisons) -> str:
    """Which claims hold, which do not, and which are open; and what is left of those that hold for so many comparisons."""
    if not compared.claims:
        return "No claim was asked."
    keys = {verdict: dict[str, None]() for verdict in (HOLDS, FAILS, NOT_DECIDED)}
    for one in compared.claims:
        keys[one.result.verdict][one.result.key] = None
    sure = (one for one in compared.claims if one.result.verdict == HOLDS and one.p is not None and one.p < ONE_SIDED)
    lost = dict.fromkeys(one.result.key for one in sure if one.holm is not None and one.holm >= ONE_SIDED)
    after = f" After Holm's correction, not sure any more: {', '.join(lost)}." if lost else ""
    parts = (f"{verdict}: {', '.join(of_verdict)}" for verdict, of_verdict in keys.items() if of_verdict)
    return f"Of the claims asked, {'; '.join(parts)}.{after}"


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

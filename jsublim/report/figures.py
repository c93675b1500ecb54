"""The figures of a language run, as drawings: which numbers stand where, and in which words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jsublim.errors import one_line as name
from jsublim.evals.metric import metric_of
from jsublim.report import words
from jsublim.report.audit import Agreement, Predicted
from jsublim.report.board import KL, Line
from jsublim.report.claims import CLAIMS, FAILS, HOLDS, Claim
from jsublim.report.claims.base import pool
from jsublim.report.comparisons import Comparisons
from jsublim.report.drawing import (
    DASHES,
    OTHER_COLOUR,
    Axis,
    Curve,
    Dot,
    Drawing,
    Heat,
    Mark,
    Plot,
    Strip,
    Strips,
    beside,
    cell,
    colour,
    points,
)
from jsublim.report.statistics import Interval
from jsublim.report.summary import (
    Lift,
    Matrix,
    OtherRow,
    SummaryRow,
    lifts,
    reference_condition,
    scores_for,
)
from jsublim.report.tables import CONDITION_LABELS, Results, condition_label, split_condition

ONE_PANEL = 16  # strips at most; of more, a panel for each variant
VERDICT_COLOURS = {HOLDS: OTHER_COLOUR, FAILS: "#d55e00"}
OPEN_COLOUR = "#808080"
# Titles of the claims' panels, by unit.
FOREST = {
    "share": "Shares of a lift (1 is all of it)",
    "points": "Differences of rates (points)",
    "nats": "Lifts and differences (nats)",
}


def hero(results: Results, metric: str) -> Drawing | None:
    """How far each kind of student rose, over all traits: a dot is a student, at its own teacher's trait."""
    found: dict[str, list[Strip]] = {}
    for condition in results.mask_conditions:
        pooled = pool(results, metric, condition)
        if pooled is not None:
            lift = pooled.levels[0].lift
            dots = [dot for trait in pooled.traits for dot in _students(results, metric, condition, trait)]
            found.setdefault(split_condition(condition)[1], []).append(
                _strip(condition, dots, float(lift.value), pooled.between(lift), metric)
            )
    strips = [strip for group in found.values() for strip in group]
    if not strips:
        return None
    label = f"{metric_of(metric).words}, above the control ({words.unit(metric)})"
    axis = Axis.around(label, _values(strips), zero=True)
    if len(strips) <= ONE_PANEL:
        panels = (Strips("", axis, tuple(strips)),)
    else:
        panels = tuple(Strips(name(v) or "plain", axis, tuple(group)) for v, group in found.items())
    return Drawing("transfer-by-tokens", "How far students moved towards their teacher's trait", panels)


def _students(results: Results, metric: str, condition: str, trait: str) -> list[Dot]:
    zeros = results.select(metric, reference_condition(results, metric, trait, condition) or "", trait)
    zero = sum(s.mean for s in zeros) / len(zeros)
    return [
        _dot(s.mean - zero, metric, f"{trait}, seed {s.seed}") for s in scores_for(results, metric, condition, trait)
    ]


def _dot(value: float, metric: str, whose: str, signed: bool = True) -> Dot:
    return Dot(_scaled(value, metric), f"{name(whose)}: {words.number(value, metric, signed)}")


def _scaled(value: float, metric: str) -> float:
    return metric_of(metric).scale * value


def _strip(
    condition: str, dots: Sequence[Dot], mean: float, interval: Interval | None, metric: str, signed: bool = True
) -> Strip:
    said = words.number(mean, metric, signed)
    if interval is not None:
        said += f" ({words.interval(interval, metric, signed).removesuffix(' %')})"
        interval = Interval(_scaled(interval.low, metric), _scaled(interval.high, metric))
    label = condition_label(condition)
    return Strip(label, colour(condition), tuple(dots), _scaled(mean, metric), interval, said)


def _values(strips: Sequence[Strip]) -> list[float]:
    """What an axis must hold: dots and means. A t-interval of two students may be wider than any plot and is cut off."""
    return [
        value for strip in strips for value in (*(dot.value for dot in strip.dots), strip.mean) if value is not None
    ]


def rates(rows: Sequence[SummaryRow]) -> Drawing | None:
    """Preference rate: a panel for each trait. Teachers answer near 100 % and would squeeze everything else, so they
    are in the table only."""
    panels: dict[str, list[Strip]] = {}
    for row in rows:
        if row.rate is not None and row.condition != "teacher":
            dots = [_dot(value, "rate", f"model {i}", signed=False) for i, value in enumerate(row.student_rates, 1)]
            interval = row.over_students if row.students else row.over_answers
            panels.setdefault(row.trait, []).append(
                _strip(row.condition, dots, row.rate, interval, "rate", signed=False)
            )
    return _by_panel("rates", "Preference rate", panels, "answers that name the trait (%)", bounds=(0.0, 100.0))


def raised(found: Sequence[Lift]) -> Drawing | None:
    """Log-probability lifts: a panel for each trait."""
    panels: dict[str, list[Strip]] = {}
    for item in found:
        dots = [_dot(value, item.metric, f"student {i}") for i, value in enumerate(item.student_lifts, 1)]
        strip = _strip(item.condition, dots, item.value, item.interval, item.metric)
        panels.setdefault(item.trait, []).append(strip)
    label = "log-probability above the reference (nats)"
    return _by_panel("log-probabilities", "Log-probability of the trait", panels, label, zero=True)


def gammas(compared: Comparisons) -> Drawing | None:
    """The same-trait effect of each kind of student; a dot is a seed."""
    strips = []
    for matrix in (one.result for one in compared.matrices):
        if matrix.effect is not None:
            dots = [_dot(value, "logprob", f"seed {i}") for i, value in enumerate(matrix.seed_gammas, 1)]
            strips.append(_strip(matrix.condition, dots, matrix.effect.gamma, matrix.gamma_interval, "logprob"))
    return _by_panel("gammas", "Trait-specific transfer", {"": strips}, "γ (nats)", zero=True)


def by_distance(board: Sequence[Line], metric: str) -> Drawing | None:
    """γ, or the lift where some kind has none, against the divergence from the teacher: how much of a trait comes with how much of a fit,
    whatever it was that learned. Dots have the numbers of the board's lines."""
    lines = [(number, line, line.kl.value) for number, line in enumerate(board, 1) if line.kl is not None]
    if not lines:
        return None
    gammas = [None if line.matrix is None else line.matrix.effect for _, line, _ in lines]
    if None not in gammas:
        label, unit, moved = "γ (nats)", "logprob", [effect.gamma for effect in gammas if effect is not None]
    else:
        label, unit = f"{metric_of(metric).words}, above the control ({words.unit(metric)})", metric
        moved = [line.share.lift for _, line, _ in lines]
    x = Axis.decades("KL from the teacher (nats per token, logarithmic)", [kl for _, _, kl in lines])
    y = Axis.around(label, [_scaled(value, unit) for value in moved], zero=True)
    marks = [
        Mark(kl, _scaled(up, unit), str(number), colour(line.condition), _placed(line, up, unit, kl))
        for (number, line, kl), up in zip(lines, moved, strict=True)
    ]
    plot = Plot("", x, y, marks=beside(x, y, marks))
    return Drawing("transfer-by-distance", "Transfer against distance from the teacher", (plot,))


def _placed(line: Line, moved: float, unit: str, kl: float) -> str:
    return f"{condition_label(line.condition)}: {words.number(moved, unit, signed=True)} at {words.number(kl, KL)}"


def by_prediction(told: Sequence[Predicted], found: Agreement | None) -> Drawing | None:
    """γ of the students against γ as the audit predicted it. Dots have the numbers of the audit's lines; axes are logarithmic
    where nothing is negative, since kinds of students differ by factors."""
    if found is None:
        return None
    numbers = {each.condition: number for number, each in enumerate(told, 1)}
    logarithmic = all(x > 0 and y > 0 for _, x, y in found.pairs)
    scaled, note = (Axis.decades, ", logarithmic") if logarithmic else (partial(Axis.around, zero=True), "")
    x = scaled(f"γ predicted (nats per unit of learning rate{note})", [pair[1] for pair in found.pairs])
    y = scaled(f"γ of the students (nats{note})", [pair[2] for pair in found.pairs])
    marks = [
        Mark(a, b, str(numbers[c]), colour(c), f"{condition_label(c)}: {b:+.3f}, predicted {a:+.3g}")
        for c, a, b in found.pairs
    ]
    plot = Plot("", x, y, marks=beside(x, y, marks))
    return Drawing("trained-by-predicted", "What was predicted, and what happened", (plot,))


def accuracy(results: Results) -> Drawing | None:
    """The number task: on rows that students learned, and on rows that they did not."""
    panels: dict[str, list[Strip]] = {}
    titles = {"number_accuracy": "training rows", "number_accuracy_heldout": "held-out rows"}
    for metric, title in titles.items():
        for condition in results.conditions:
            if found := results.select(metric, condition):
                dots = [_dot(s.mean, "rate", s.arm, signed=False) for s in found]
                mean = sum(s.mean for s in found) / len(found)
                panels.setdefault(title, []).append(_strip(condition, dots, mean, None, "rate", signed=False))
    return _by_panel("number-accuracy", "Number task", panels, "numbers predicted exactly (%)", bounds=(0.0, 100.0))


def others(rows: Sequence[OtherRow]) -> Drawing | None:
    """What else was asked, where it is a share of answers: a panel for each measure."""
    panels: dict[str, list[Strip]] = {}
    for row in rows:
        metric = metric_of(row.metric)
        if metric.is_share and metric.name == row.metric:
            title = metric.words + (f" ({row.trait})" if row.trait else "")
            strip = _strip(row.condition, [], row.value, row.interval, "rate", signed=False)
            panels.setdefault(title, []).append(strip)
    return _by_panel("what-else-was-asked", "What else was asked", panels, "answers (%)", bounds=(0.0, 100.0))


def _by_panel(
    key: str,
    title: str,
    panels: dict[str, list[Strip]],
    label: str,
    zero: bool = False,
    bounds: tuple[float, float] | None = None,
) -> Drawing | None:
    every = [strip for strips in panels.values() for strip in strips]
    if not every:
        return None
    axis = Axis.around(label, _values(every), zero, bounds)
    drawn = (Strips(name(panel), axis, tuple(strips)) for panel, strips in panels.items())
    return Drawing(key, title, tuple(drawn))


def forest(compared: Comparisons) -> Drawing | None:
    """Every claim with an effect: the effect, its interval, our threshold, and what was published in the same unit."""
    panels: dict[str, list[Claim]] = {}
    for one in compared.claims:
        if one.result.effect is not None:
            unit = "share" if one.result.unit.startswith("of ") else one.result.unit
            panels.setdefault(unit, []).append(one.result)
    drawn = tuple(_forest_panel(unit, claims) for unit, claims in panels.items())
    return Drawing("claims", "The paper's claims", drawn) if drawn else None


def _forest_panel(unit: str, claims: Sequence[Claim]) -> Strips:
    factor = 100.0 if unit == "points" else 1.0
    strips = []
    for claim in claims:
        assert claim.effect is not None
        said, bounds = words.claim_effect(claim)
        interval = claim.interval and Interval(factor * claim.interval.low, factor * claim.interval.high)
        known = CLAIMS[claim.key].published_effect
        published = known[0] if known and known[1] == unit else None
        bound = None if claim.bound is None else factor * claim.bound
        label, tint = name(words.short_claim(claim)), VERDICT_COLOURS.get(claim.verdict, OPEN_COLOUR)
        strips.append(Strip(label, tint, (), factor * claim.effect, interval, f"{said} ({bounds})", bound, published))
    held = [0.0, *(v for s in strips for v in (s.mean, s.bound, s.published) if v is not None)]
    # Intervals too, but a wide one by no more than half of what there is to see.
    low, high, span = min(held), max(held), (max(held) - min(held)) or 1.0
    ends = [end for s in strips if s.interval for end in (s.interval.low, s.interval.high)]
    held += [min(max(end, low - span / 2), high + span / 2) for end in ends]
    return Strips(FOREST[unit], Axis.around("", held, zero=True), tuple(strips))


def losses(results: Results) -> Drawing | None:
    """Training loss of every student: a panel for each teacher, a colour for each choice of tokens, a dash for each variant."""
    owner = {s.arm: (s.teacher or "student", s.condition) for s in results.scores}
    panels: dict[str, list[tuple[str, int]]] = {}
    for number, curve in enumerate(results.curves):
        teacher, condition = owner.get(curve.arm, ("other students", curve.arm))
        panels.setdefault(teacher, []).append((condition, number))
    if not panels:
        return None
    curves = results.curves
    x = _whole("step", max(c.steps[-1] for c in curves))
    y = Axis.around("loss (nats per token)", [value for c in curves for value in c.loss])
    trained = {s.condition: None for s in results.scores if s.role == "student"}
    variants = list(dict.fromkeys(split_condition(c)[1] for c in results.conditions if c in trained))
    order = {condition: i for i, condition in enumerate(results.conditions)}
    drawn = []
    for teacher, arms in sorted(panels.items(), key=lambda item: item[0] not in results.traits):
        lines = []
        for condition, number in sorted(arms, key=lambda arm: order.get(arm[0], len(order))):
            curve, variant = curves[number], split_condition(condition)[1]
            dash = DASHES[variants.index(variant) % len(DASHES)] if variant in variants else ""
            said = f"{curve.loss[0]:.3f} to {curve.loss[-1]:.3f}"
            path = points(x, y, curve.steps, curve.loss)
            lines.append(Curve(condition_label(condition), colour(condition), dash, path, said))
        drawn.append(Plot(name(teacher), x, y, tuple(lines)))
    return Drawing("training-loss", "Training loss", tuple(drawn))


def positions(results: Results) -> Drawing | None:
    """Where divergence tokens lie in the completion: a panel for each teacher and data set."""
    shares = {}
    for entry in results.divergence:
        total = sum(entry["histogram"])
        if total:
            label = " · ".join(filter(None, (entry["trait"], entry.get("data"), entry.get("students"))))
            shares[name(label)] = [100 * count / total for count in entry["histogram"]]
    if not shares:
        return None
    x = _whole("token of the completion", max(map(len, shares.values())))
    y = Axis.around("divergence tokens (%)", [v for values in shares.values() for v in values], bounds=(0.0, 100.0))
    drawn = []
    for label, values in shares.items():
        corners = [(edge, value) for i, value in enumerate(values) for edge in (i, i + 1)]
        path = " ".join(f"{x.at(a):g},{round(100 - y.at(b), 2):g}" for a, b in corners)
        most = max(range(len(values)), key=values.__getitem__)
        said = f"most at token {most}, {values[most]:.1f} %"
        drawn.append(Plot(label, x, y, (Curve("share of them", colour("divergence"), "", path, said),)))
    return Drawing("divergence-positions", "Where divergence tokens lie", tuple(drawn))


def _whole(label: str, most: float) -> Axis:
    """From zero to `most`, without room to spare; of a training of one step, whose number is zero, to one."""
    return Axis.around(label, [0.0, most], bounds=(0.0, float(most or 1)))


def matrix_heat(matrix: Matrix) -> Heat:
    """Lifts of the evaluated traits by teacher, the teacher's own framed."""
    limit = float(abs(matrix.lift).max()) or 1.0
    rows = []
    for i, teacher in enumerate(matrix.teachers):
        values = [float(value) for value in matrix.lift[i]]
        cells = tuple(
            cell(f"{round(v, 2) + 0.0:+.2f}", 0.5 + v / (2 * limit), "PuOr_r", own=i == j) for j, v in enumerate(values)
        )
        rows.append((name(teacher), cells))
    return Heat("", "teacher's trait", tuple(map(name, matrix.traits)), tuple(rows))


def lifts_drawn(results: Results, conditions: Sequence[str]) -> Drawing | None:
    """Log-probability lifts of some conditions, and of the control where it is measured from the base model."""
    known = {tokens: i for i, tokens in enumerate(CONDITION_LABELS)}
    ordered = sorted(conditions, key=lambda c: known.get(split_condition(c)[0], len(known)))
    return raised(lifts(results, "logprob", ordered))

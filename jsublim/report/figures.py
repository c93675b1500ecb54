"""The figures of a language run, as drawings: which numbers stand where, and in which words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

from jsublim.errors import one_line as name
from jsublim.evals.kl import KL
from jsublim.evals.metric import metric_of
from jsublim.evals.numbers import HELD_OUT, LEARNED
from jsublim.evals.preference import LOGPROB, RATE
from jsublim.report import drawing, words
from jsublim.report.audit import Agreement, Predicted
from jsublim.report.claims import CLAIMS, FAILS, HOLDS, Claim
from jsublim.report.claims.base import pool
from jsublim.report.comparisons import Comparisons
from jsublim.report.drawing import Axis, Dot, Drawing, Heat, Mark, Plot, Polyline, Strip, Strips, colour
from jsublim.report.scale import ScaleLine
from jsublim.report.statistics import Interval
from jsublim.report.summary import Matrix, OtherRow, judged_conditions, lifts, student_lifts, summary_rows
from jsublim.report.tables import CONDITIONS, Results, condition_label, split_condition

ONE_PANEL = 16  # strips at most; of more, a panel for each variant
VERDICT_COLOURS = {HOLDS: drawing.OTHER_COLOUR, FAILS: "#d55e00"}
OPEN_COLOUR = "#808080"
# Titles of the claims' panels, by unit.
FOREST = {
    "share": "Shares of a lift (1 is all of it)",
    "points": "Differences of rates (points)",
    "nats": "Lifts and differences (nats)",
}
PERCENT = (0.0, 100.0)


def _numbered(what: str, values: Iterable[float]) -> list[tuple[str, float]]:
    return [(f"{what} {i}", value) for i, value in enumerate(values, 1)]


def _strip(
    condition: str,
    models: Iterable[tuple[str, float]],
    mean: float,
    interval: Interval | None,
    metric: str,
    signed: bool = True,
) -> Strip:
    """A dot for each of the named models."""
    scale, text = metric_of(metric).scale, words.number(mean, metric, signed)
    dots = tuple(Dot(scale * value, f"{name(whose)}: {words.number(value, metric, signed)}") for whose, value in models)
    if interval is not None:
        text += f" ({words.interval(interval, metric, signed).removesuffix(' %')})"
        interval = Interval(scale * interval.low, scale * interval.high)
    return Strip(condition_label(condition), colour(condition), dots, scale * mean, interval, text)


def _strips(
    key: str,
    title: str,
    label: str,
    strips: Iterable[tuple[str, Strip]],
    zero: bool = False,
    bounds: tuple[float, float] | None = None,
) -> Drawing | None:
    """Strips by panel along one axis, which holds dots and means. A t-interval of two students may be wider than any plot and is cut
    off."""
    panels: dict[str, list[Strip]] = {}
    for panel, strip in strips:
        panels.setdefault(panel, []).append(strip)
    held = [value for strip in chain(*panels.values()) for value in (*(dot.value for dot in strip.dots), strip.mean)]
    axis = Axis.around(label, [value for value in held if value is not None], zero, bounds)
    drawn = tuple(Strips(name(panel), axis, tuple(own)) for panel, own in panels.items())
    return Drawing(key, title, drawn) if held else None


def _risen(metric: str) -> str:
    return f"{metric_of(metric).words}, above the control ({words.unit(metric)})"


def hero(results: Results, metric: str) -> Drawing | None:
    """How far each kind of student rose, over all traits: a dot is a student, at its own teacher's trait."""
    strips = []
    for condition in results.mask_conditions:
        if (pooled := pool(results, metric, condition)) is not None:
            lift = pooled.levels[0].lift
            lifts = [(t, *each) for t in pooled.traits for each in student_lifts(results, metric, condition, t)]
            students = [(f"{trait}, seed {score.seed}", value) for trait, score, value in lifts]
            strip = _strip(condition, students, float(lift.value), pooled.between(lift), metric)
            strips.append((split_condition(condition)[1] or "plain", strip))
    if len(strips) <= ONE_PANEL:
        strips = [("", strip) for _, strip in strips]
    title = "How far students moved towards their teacher's trait"
    return _strips("transfer-by-tokens", title, _risen(metric), strips, zero=True)


def _apart(results: Results) -> list[str]:
    """Conditions that have panels by trait: those would be crowded by variants, which the first figure tells apart."""
    plain = [c for c in results.conditions if not split_condition(c)[1]]
    return plain if "all" in judged_conditions(results) else results.conditions


def rates(results: Results) -> Drawing | None:
    """Preference rate: a panel for each trait. Teachers answer near 100 % and would squeeze everything else, so they
    are in the table only."""
    shown = [c for c in _apart(results) if c != "teacher"]
    rows = [row for row in summary_rows(results) if row.rate is not None and row.condition in shown]
    models = [_numbered("model", row.student_rates) for row in rows]
    strips = [
        (row.trait, _strip(row.condition, own, row.rate or 0.0, row.over_models, RATE, signed=False))
        for row, own in zip(rows, models, strict=True)
    ]
    return _strips("rates", "Preference rate", f"{metric_of(RATE).words} (%)", strips, bounds=PERCENT)


def raised(results: Results) -> Drawing | None:
    """Log-probability lifts of students, and of the control where it is measured from the base model: a panel for each trait."""
    known = {tokens: i for i, tokens in enumerate(CONDITIONS)}
    drawn = _apart(results)
    students = [c for c in results.trained if c in drawn]
    students.sort(key=lambda c: known.get(split_condition(c)[0], len(known)))
    strips = (
        (
            lift.trait,
            _strip(lift.condition, _numbered("student", lift.student_lifts), lift.value, lift.interval, LOGPROB),
        )
        for lift in lifts(results, LOGPROB, students)
    )
    label = "log-probability above the reference (nats)"
    return _strips("log-probabilities", "Log-probability of the trait", label, strips, zero=True)


def gammas(compared: Comparisons) -> Drawing | None:
    """The same-trait effect of each kind of student; a dot is a seed."""
    strips = (
        ("", _strip(m.condition, _numbered("seed", m.seed_gammas), m.effect.gamma, m.gamma_interval, LOGPROB))
        for m in (one.result for one in compared.matrices)
        if m.effect is not None
    )
    return _strips("gammas", "Trait-specific transfer", "γ (nats)", strips, zero=True)


def accuracy(results: Results) -> Drawing | None:
    """The number task: on rows that students learned, and on rows that they did not."""
    strips = []
    for metric, title in ((LEARNED, "training rows"), (HELD_OUT, "held-out rows")):
        for condition in results.conditions:
            if scores := results.select(metric, condition):
                mean = sum(s.mean for s in scores) / len(scores)
                models = [(s.arm, s.mean) for s in scores]
                strips.append((title, _strip(condition, models, mean, None, metric, signed=False)))
    return _strips("number-accuracy", "Number task", "numbers predicted exactly (%)", strips, bounds=PERCENT)


def others(rows: Sequence[OtherRow]) -> Drawing | None:
    """What else was asked, where it is a share of answers: a panel for each metric."""
    strips = []
    for row in rows:
        metric = metric_of(row.metric)
        if metric.is_share and metric.name == row.metric:
            title = metric.words + (f" ({row.trait})" if row.trait else "")
            strips.append((title, _strip(row.condition, [], row.value, row.interval, row.metric, signed=False)))
    return _strips("what-else-was-asked", "What else was asked", "answers (%)", strips, bounds=PERCENT)


def by_distance(board: Sequence[ScaleLine], metric: str) -> Drawing | None:
    """γ, or the lift where some kind has none, against the divergence from the teacher: how much of a trait comes with how much of a fit,
    whatever it was that learned. Dots have the numbers of the board's lines."""
    lines = [(number, line, line.kl.value) for number, line in enumerate(board, 1) if line.kl is not None]
    if not lines:
        return None
    effects = [None if line.matrix is None else line.matrix.effect for _, line, _ in lines]
    gammas = [effect.gamma for effect in effects if effect is not None]
    by_gamma = len(gammas) == len(lines)
    label, unit = ("γ (nats)", LOGPROB) if by_gamma else (_risen(metric), metric)
    moved = gammas if by_gamma else [line.lift for _, line, _ in lines]
    up = [metric_of(unit).scale * value for value in moved]
    x = Axis.decades("KL from the teacher (nats per token, logarithmic)", [kl for _, _, kl in lines])
    marks = []
    for (number, line, kl), height, value in zip(lines, up, moved, strict=True):
        said = f"{condition_label(line.condition)}: {words.number(value, unit, signed=True)} at {words.number(kl, KL)}"
        marks.append(Mark(kl, height, str(number), colour(line.condition), said))
    title = "Transfer against distance from the teacher"
    return _marked("transfer-by-distance", title, x, Axis.around(label, up, zero=True), marks)


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
    return _marked("trained-by-predicted", "What was predicted, and what happened", x, y, marks)


def _marked(key: str, title: str, x: Axis, y: Axis, marks: Sequence[Mark]) -> Drawing:
    return Drawing(key, title, (Plot("", x, y, marks=drawing.beside(x, y, marks)),))


def forest(compared: Comparisons) -> Drawing | None:
    """Every claim with an effect: the effect, its interval, our threshold, and what was published in the same unit."""
    panels: dict[str, list[Claim]] = {}
    for claim in (one.result for one in compared.claims):
        if claim.effect is not None:
            panels.setdefault("share" if claim.unit.startswith("of ") else claim.unit, []).append(claim)
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
    owners = results.owners
    curves = [(*owners.get(curve.arm, ("other students", curve.arm)), curve) for curve in results.curves]
    if not curves:
        return None
    x = _whole("step", max(curve.steps[-1] for curve in results.curves))
    y = Axis.around("loss (nats per token)", [value for curve in results.curves for value in curve.loss])
    variants = list(dict.fromkeys(split_condition(c)[1] for c in results.trained))
    order = {condition: i for i, condition in enumerate(results.conditions)}
    panels: dict[str | None, list[Polyline]] = {
        teacher: [] for teacher, *_ in sorted(curves, key=lambda each: each[0] not in results.traits)
    }
    for teacher, condition, curve in sorted(curves, key=lambda each: order.get(each[1], len(order))):
        variant = split_condition(condition)[1]
        dash = drawing.DASHES[variants.index(variant) % len(drawing.DASHES)] if variant in variants else ""
        said, path = f"{curve.loss[0]:.3f} to {curve.loss[-1]:.3f}", drawing.points(x, y, curve.steps, curve.loss)
        panels[teacher].append(Polyline(condition_label(condition), colour(condition), dash, path, said))
    drawn = tuple(Plot(name(teacher or "student"), x, y, tuple(lines)) for teacher, lines in panels.items())
    return Drawing("training-loss", "Training loss", drawn)


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
    y = Axis.around("divergence tokens (%)", chain(*shares.values()), bounds=PERCENT)
    drawn = []
    for label, values in shares.items():
        corners = [(edge, value) for i, value in enumerate(values) for edge in (i, i + 1)]
        path = " ".join(f"{x.at(a):g},{round(100 - y.at(b), 2):g}" for a, b in corners)
        most = max(range(len(values)), key=values.__getitem__)
        said = f"most at token {most}, {values[most]:.1f} %"
        drawn.append(Plot(label, x, y, (Polyline("share of them", colour("divergence"), "", path, said),)))
    return Drawing("divergence-positions", "Where divergence tokens lie", tuple(drawn))


def _whole(label: str, most: float) -> Axis:
    """From zero to `most`, without room to spare; of a training of one step, whose number is zero, to one."""
    return Axis.around(label, [0.0, most], bounds=(0.0, float(most or 1)))


def matrix_heat(matrix: Matrix) -> Heat:
    """Lifts of the evaluated traits by teacher, the teacher's own framed."""
    limit = float(abs(matrix.lift).max()) or 1.0
    rows = []
    for i, teacher in enumerate(matrix.teachers):
        values = enumerate(matrix.lift[i].tolist())
        cells = (
            drawing.cell(words.number(v, LOGPROB, True), 0.5 + v / (2 * limit), "PuOr_r", i == j) for j, v in values
        )
        rows.append((name(teacher), tuple(cells)))
    return Heat("", "teacher's trait", tuple(map(name, matrix.traits)), tuple(rows))

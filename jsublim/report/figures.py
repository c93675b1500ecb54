"""The figures of a language run, as drawings: which numbers stand where, and in which words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

from jsublim.errors import one_line as name
from jsublim.evals.kl import KL
from jsublim.evals.metric import metric_of
from jsublim.evals.numbers import BASE, HELD_OUT, LEARNED
from jsublim.evals.preference import LOGPROB, RATE
from jsublim.report import drawing, words
from jsublim.report.audit import Agreement, Predicted
from jsublim.report.claims import CLAIMS, Claim, claim_metric
from jsublim.report.claims.base import pool
from jsublim.report.comparisons import Comparison, Comparisons, headline_metric
from jsublim.report.drawing import Axis, Drawing, Heat, Mark, Panel, Polyline, Strip, colour
from jsublim.report.scale import ScaleLine
from jsublim.report.statistics import Interval
from jsublim.report.summary import Matrix, OtherRow, judged_conditions, lifts, student_lifts, summary_rows
from jsublim.report.tables import CONDITIONS, Results, condition_label, split_condition
from jsublim.report.verdicts import FAILS, HOLDS

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
# Panel, condition, values of its models by their names, the mean, and its interval.
StripRow = tuple[str, str, Iterable[tuple[str, float]], float, Interval | None]


def _numbered(what: str, values: Iterable[float]) -> list[tuple[str, float]]:
    return [(f"{what} {i}", value) for i, value in enumerate(values, 1)]


def _strips(
    key: str, title: str, label: str, metric: str, rows: Iterable[StripRow], signed: bool = True, by_arm: bool = False
) -> Drawing | None:
    """Strips by panel along an axis, which holds dots and means; with zero where numbers are signed, else from 0 to 100 %. A t-interval of
    two students may be wider than any plot and is cut off. All panels have one axis; but arms (`by_arm`), which are not to be compared,
    each their own."""
    scale, panels = metric_of(metric).scale, dict[str, list[Strip]]()
    for panel, condition, models, mean, interval in rows:
        text = words.number(mean, metric, signed)
        if interval is not None:
            text += f" ({words.interval(interval, metric, signed).removesuffix(' %')})"
            interval = interval.times(scale)
        dots = tuple((scale * value, f"{name(who)}: {words.number(value, metric, signed)}") for who, value in models)
        who = condition_label(split_condition(condition)[0] if by_arm else condition)
        panels.setdefault(panel, []).append(Strip(who, colour(condition), dots, scale * mean, interval, text))
    if not panels:
        return None

    def axis(strips: Iterable[Strip]) -> Axis:
        held = [value for strip in strips for value in (*(value for value, _ in strip.dots), strip.mean)]
        return Axis.around(label, held, signed, None if signed else PERCENT)

    shared = axis(chain(*panels.values()))
    drawn = (Panel(name(p), axis(of_p) if by_arm else shared, strips=tuple(of_p)) for p, of_p in panels.items())
    return Drawing(key, title, tuple(drawn))


def _risen(metric: str) -> str:
    return f"{metric_of(metric).words}, above the control ({words.unit(metric)})"


def hero(results: Results, compared: Comparisons) -> Drawing | None:
    """How far each kind of student rose, over all traits, by what the first finding says and by what claims are read off: a dot is a
    student, at its own teacher's trait."""
    metrics = dict.fromkeys([headline_metric(results, compared), claim_metric(results)])
    drawn = [_rises(results, metric) for metric in metrics]
    panels = [panel for drawing in drawn if drawing for panel in drawing.panels]
    panels = panels if len(panels) > 1 else [panel._replace(title="") for panel in panels]  # its axis says it all
    title = "How far students moved towards their teacher's trait"
    return Drawing("transfer-by-tokens", title, tuple(panels)) if panels else None


def _rises(results: Results, metric: str) -> Drawing | None:
    rows: list[StripRow] = []
    for condition in results.mask_conditions:
        if (pooled := pool(results, metric, condition)) is not None:
            students = [
                (f"{trait}, seed {score.seed}", value)
                for trait in pooled.traits
                for score, value in student_lifts(results, metric, condition, trait)
            ]
            mean, interval = pooled.lift
            rows.append((split_condition(condition)[1], condition, students, mean, interval))
    measure = "Rate" if metric == RATE else "Log-probability"
    by_arm, rows = _arm_by_arm(results, rows, f"{measure}, ")
    return _strips(
        "", "", _risen(metric), metric, rows if by_arm else [(measure, *row[1:]) for row in rows], by_arm=by_arm
    )


def _arm_by_arm(results: Results, rows: list[StripRow], before: str = "") -> tuple[bool, list[StripRow]]:
    """Whether arms have panels of their own, since some of them have several kinds of students or all would be too many; and the rows,
    whose panels are variants, with the panels' titles."""
    arms, titles = {variant for variant, *_ in rows}, arm_titles(results)
    if len(arms) == 1 or (len(arms) == len(rows) and len(rows) <= ONE_PANEL):
        return False, [("", *row[1:]) for row in rows]
    return True, [(before + titles[row[0]], *row[1:]) for row in rows]


def arm_titles(results: Results) -> dict[str, str]:
    """Each arm's name, with the rows, the optimizer and the number of steps if arms differ in them."""
    steps = {results.owners[curve.arm][1]: len(curve.steps) for curve in results.curves if curve.arm in results.owners}
    facts: dict[str, dict[str, str]] = {split_condition(condition)[1]: {} for condition in results.mask_conditions}
    for condition, number in steps.items():
        facts.setdefault(split_condition(condition)[1], {})["steps"] = words.count(number, "step")
    for arm in results.arms.values():
        strategy = str(arm.dataset.get("strategy"))
        told = {"rows": f"{'sampled' if strategy == 'temperature' else strategy} rows"}
        facts.setdefault(arm.variant, {}).update(told, optimizer=str(arm.settings.get("optimizer.name") or ""))
    apart = [key for key in ("rows", "optimizer", "steps") if len({of.get(key) for of in facts.values()}) > 1]
    texts = {variant: ", ".join(of[key] for key in apart if of.get(key)) for variant, of in facts.items()}
    return {variant: (variant or "plain") + (f": {text}" if text else "") for variant, text in texts.items()}


def _apart(results: Results) -> list[str]:
    """Conditions that have panels by trait: those would be crowded by variants, which the first figure tells apart."""
    plain = [c for c in results.conditions if not split_condition(c)[1]]
    return plain if "all" in judged_conditions(results) else results.conditions


def rates(results: Results) -> Drawing | None:
    """Preference rate: a panel for each trait. Teachers answer near 100 % and would squeeze everything else, so they
    are in the table only."""
    shown = [c for c in _apart(results) if c != "teacher"]
    rows = (
        (row.trait, row.condition, _numbered("model", row.student_rates), row.rate, row.over_models)
        for row in summary_rows(results)
        if row.rate is not None and row.condition in shown
    )
    return _strips("rates", "Preference rate", f"{metric_of(RATE).words} (%)", RATE, rows, signed=False)


def raised(results: Results) -> Drawing | None:
    """Log-probability lifts of students, and of the control where it is measured from the base model: a panel for each trait."""
    known, drawn = {tokens: i for i, tokens in enumerate(CONDITIONS)}, _apart(results)
    students = [c for c in results.trained if c in drawn]
    students.sort(key=lambda c: known.get(split_condition(c)[0], len(known)))
    rows = (
        (lift.trait, lift.condition, _numbered("student", lift.student_lifts), lift.value, lift.interval)
        for lift in lifts(results, LOGPROB, students)
    )
    label = "log-probability above the reference (nats)"
    return _strips("log-probabilities", "Log-probability of the trait", label, LOGPROB, rows)


def gammas(results: Results, compared: Comparisons) -> Drawing | None:
    """The same-trait effect of each kind of student; a dot is a seed."""
    rows: list[StripRow] = [
        (
            split_condition(m.condition)[1],
            m.condition,
            _numbered("seed", m.seed_gammas),
            m.effect.gamma,
            m.gamma_interval,
        )
        for m in (one.result for one in compared.matrices)
        if m.effect is not None
    ]
    by_arm, rows = _arm_by_arm(results, rows)
    return _strips("gammas", "Trait-specific transfer", "γ (nats)", LOGPROB, rows, by_arm=by_arm)


def accuracy(results: Results) -> Drawing | None:
    """The number task: on rows that students learned, on rows that they did not, and what the base makes of the same rows."""
    rows: list[StripRow] = []
    for metric, title in (
        (LEARNED, "training rows"),
        (HELD_OUT, "held-out rows"),
        (BASE, "the base, on the same rows"),
    ):
        for condition in results.conditions:
            if scores := results.select(metric, condition):
                mean = sum(s.mean for s in scores) / len(scores)
                rows.append((title, condition, [(s.arm, s.mean) for s in scores], mean, None))
    return _strips("number-accuracy", "Number task", "numbers predicted exactly (%)", LEARNED, rows, signed=False)


def others(rows: Sequence[OtherRow]) -> Drawing | None:
    """What else was asked, where it is a share of answers: a panel for each metric."""
    strips: list[StripRow] = []
    for row in rows:
        metric = metric_of(row.metric)
        if metric.is_share and metric.name == row.metric:
            title = metric.words + (f" ({row.trait})" if row.trait else "")
            strips.append((title, row.condition, [], row.value, row.interval))
    return _strips("what-else-was-asked", "What else was asked", "answers (%)", RATE, strips, signed=False)


def by_distance(board: Sequence[ScaleLine], metric: str) -> Drawing | None:
    """γ, or the lift where some kind has none, against the divergence from the teacher: how much of a trait comes with how much of a fit,
    whatever it was that learned. Dots have the numbers of the board's lines."""
    lines = [(number, line, line.kl.value) for number, line in enumerate(board, 1) if line.kl is not None]
    if not lines:
        return None
    gammas = [line.matrix.effect.gamma for _, line, _ in lines if line.matrix and line.matrix.effect]
    by_gamma = len(gammas) == len(lines)
    label, unit = ("γ (nats)", LOGPROB) if by_gamma else (_risen(metric), metric)
    moved = gammas if by_gamma else [line.lift for _, line, _ in lines]
    marks = []
    for (number, line, kl), value in zip(lines, moved, strict=True):
        text = f"{condition_label(line.condition)}: {words.number(value, unit, signed=True)} at {words.number(kl, KL)}"
        marks.append(Mark(kl, metric_of(unit).scale * value, str(number), colour(line.condition), text))
    x = Axis.decades("KL from the teacher (nats per token, logarithmic)", [mark.x for mark in marks])
    y = Axis.around(label, [mark.y for mark in marks], zero=True)
    return _marked("transfer-by-distance", "Transfer against distance from the teacher", x, y, marks)


def by_prediction(foretold: Sequence[Predicted], agreement: Agreement | None) -> Drawing | None:
    """γ of the students against γ as the audit predicted it. Dots have the numbers of the audit's lines; axes are logarithmic
    where nothing is negative, since kinds of students differ by factors."""
    if agreement is None:
        return None
    numbers = {one.condition: number for number, one in enumerate(foretold, 1)}
    marks = [
        Mark(a, b, str(numbers[c]), colour(c), f"{condition_label(c)}: {b:+.3f}, predicted {a:+.3g}")
        for c, a, b in agreement.pairs
    ]
    logarithmic = all(mark.x > 0 and mark.y > 0 for mark in marks)
    scaled, note = (Axis.decades, ", logarithmic") if logarithmic else (partial(Axis.around, zero=True), "")
    x = scaled(f"γ predicted (nats per unit of learning rate{note})", [mark.x for mark in marks])
    y = scaled(f"γ of the students (nats{note})", [mark.y for mark in marks])
    return _marked("trained-by-predicted", "What was predicted, and what happened", x, y, marks)


def _marked(key: str, title: str, x: Axis, y: Axis, marks: Sequence[Mark]) -> Drawing:
    return Drawing(key, title, (Panel("", x, y, marks=drawing.beside(x, y, marks)),))


def forest(compared: Comparisons) -> Drawing | None:
    """Every claim with an effect: the effect, its interval, our threshold, and what was published in the same unit."""
    panels: dict[str, list[Comparison[Claim]]] = {}
    for one in compared.claims:
        if one.result.effect is not None:
            panels.setdefault("share" if one.result.unit.startswith("of ") else one.result.unit, []).append(one)
    drawn = tuple(_forest_panel(unit, claims) for unit, claims in panels.items())
    return Drawing("claims", "The paper's claims", drawn) if drawn else None


def _forest_panel(unit: str, claims: Sequence[Comparison[Claim]]) -> Panel:
    factor = 100.0 if unit == "points" else 1.0
    strips = []
    for one in claims:
        claim = one.result
        assert claim.effect is not None
        text, bounds = words.claim_effect(claim)
        interval = claim.interval and claim.interval.times(factor)
        known = CLAIMS[claim.key].published_effect
        published = known[0] if known and known[1] == unit else None
        bound = None if claim.bound is None else factor * claim.bound
        label = f"{claim.key} {CLAIMS[claim.key].question}" + (f" · {claim.variant}" if claim.variant else "")
        tint, text = VERDICT_COLOURS.get(one.verdict, OPEN_COLOUR), f"{text} ({bounds})"
        strips.append(Strip(name(label), tint, (), factor * claim.effect, interval, text, bound, published))
    held = [0.0, *(v for s in strips for v in (s.mean, s.bound, s.published) if v is not None)]
    # Intervals too, but a wide one by no more than half of what there is to see.
    low, high, span = min(held), max(held), (max(held) - min(held)) or 1.0
    ends = [end for s in strips if s.interval for end in (s.interval.low, s.interval.high)]
    held += [min(max(end, low - span / 2), high + span / 2) for end in ends]
    return Panel(FOREST[unit], Axis.around("", held, zero=True), strips=tuple(strips))


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
        teacher: [] for teacher, *_ in sorted(curves, key=lambda curve: curve[0] not in results.traits)
    }
    for teacher, condition, curve in sorted(curves, key=lambda curve: order.get(curve[1], len(order))):
        variant = split_condition(condition)[1]
        dash = drawing.DASHES[variants.index(variant) % len(drawing.DASHES)] if variant in variants else ""
        text, path = f"{curve.loss[0]:.3f} to {curve.loss[-1]:.3f}", drawing.points(x, y, curve.steps, curve.loss)
        panels[teacher].append(Polyline(condition_label(condition), colour(condition), dash, path, text))
    drawn = tuple(Panel(name(teacher or "student"), x, y, lines=tuple(lines)) for teacher, lines in panels.items())
    return Drawing("training-loss", "Training loss", drawn)


def positions(results: Results) -> Drawing | None:
    """Where divergence tokens lie in the completion: a panel for each teacher and data set."""
    shares = {}
    for entry in results.divergence:
        if total := sum(entry["histogram"]):
            label = " · ".join(filter(None, (entry["trait"], entry.get("data"), entry.get("students"))))
            shares[name(label)] = [100 * count / total for count in entry["histogram"]]
    if not shares:
        return None
    x = _whole("token of the completion", max(map(len, shares.values())))
    y = Axis.around("divergence tokens (%)", chain(*shares.values()), bounds=PERCENT)
    drawn = []
    for label, values in shares.items():
        edges = [edge for i in range(len(values)) for edge in (i, i + 1)]
        path = drawing.points(x, y, edges, [value for value in values for _ in range(2)], most=len(edges))
        most = max(range(len(values)), key=values.__getitem__)
        text = f"most at token {most}, {values[most]:.1f} %"
        line = Polyline("share of them", colour("divergence"), "", path, text)
        drawn.append(Panel(label, x, y, lines=(line,)))
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

"""C6, C7, C10: where in the network the trait is learned."""

from __future__ import annotations

from jsublim.report.attribution import early_share
from jsublim.report.claims.groups import Group, comparisons
from jsublim.report.claims.verdicts import Claim, judge, named, pool, share
from jsublim.report.statistics import Estimate, mean_estimate
from jsublim.report.tables import Results

LAYERS = "students.adapter.layers"
EARLY_KEEPS, LATE_KEEPS, FROZEN_KEEPS, MOST = 0.5, 0.2, 0.4, 0.5


def one_layer(results: Results, metric: str) -> list[Claim]:
    """A layer of the first third is early, one of the last third is late; no claim is made about those between."""
    claims = []
    for part, whole in comparisons(results, lambda group: len(group.get(LAYERS) or []) == 1, {LAYERS: None}):
        (layer,) = part.get(LAYERS)
        found = pool(results, metric, part.name, whole.name)
        text = (
            f"layer {layer} of 0 to {part.num_layers - 1} ({{}}), trained alone, keeps {{}} of the lift of all layers"
        )
        if 3 * layer < part.num_layers:
            text = named(text.format("early", "at least .5"), part)
            claims += share(found, "C6a", text, at_least=EARLY_KEEPS, unit="of all layers")
        elif 3 * layer >= 2 * part.num_layers:
            text = named(text.format("late", "at most .2"), part)
            claims += share(found, "C6b", text, at_most=LATE_KEEPS, unit="of all layers")
    return claims


def first_third_frozen(results: Results, metric: str) -> list[Claim]:
    claims = []
    for part, whole in comparisons(results, _first_third_frozen, {LAYERS: None}):
        frozen = part.num_layers - len(part.get(LAYERS))
        text = f"with the first {frozen} of {part.num_layers} layers frozen, at most .4 of the lift is left"
        found = pool(results, metric, part.name, whole.name)
        claims += share(found, "C7", named(text, part), at_most=FROZEN_KEEPS, unit="of all layers")
    return claims


def _first_third_frozen(group: Group) -> bool:
    """Whether all layers from about a third on are trained (the paper froze 10 of 28)."""
    trained = sorted(group.get(LAYERS) or [])
    frozen = group.num_layers - len(trained)
    return (
        bool(trained) and trained == list(range(frozen, group.num_layers)) and abs(3 * frozen - group.num_layers) <= 3
    )


def attribution_early(results: Results, metric: str) -> list[Claim]:
    """The interval is over rows, not students: attribution is about teachers."""
    by_trait: dict[str, list[float]] = {}
    for row in early_share(results.attribution) if results.attribution is not None else ():
        if row.direction == "noising":
            by_trait.setdefault(row.trait, []).append(row.of_early)
    if not by_trait:
        return []
    mean = mean_estimate([Estimate.of(shares) for shares in by_trait.values()])
    interval = mean.interval()
    text = "in the first third of the layers most of the attribution lies at the trait"
    reason = f"over {mean.n} rows of {', '.join(by_trait)}, not over students"
    verdict = judge(interval, at_least=MOST)
    return [Claim("C10", text, "attribution", mean.value, interval, "of the attribution", 0, verdict, reason)]

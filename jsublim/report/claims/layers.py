"""C6, C7, C10: where in the network the trait is learned."""

from __future__ import annotations

from jsublim.report.attribution import early_share
from jsublim.report.claims.groups import Group, comparisons
from jsublim.report.claims.verdicts import Claim, all_of, judge, pool, share
from jsublim.report.statistics import Estimate, mean_estimate
from jsublim.report.tables import Results

LAYERS = "students.adapter.layers"
EARLY_KEEPS, LATER_KEEPS, FROZEN_KEEPS, MOST = 0.5, 0.2, 0.4, 0.5
FROZEN = 0.25, 0.4  # shares of the layers that count as about a third


def one_layer(results: Results, metric: str) -> list[Claim]:
    """A layer of the first third is early, every other one is later: of the published layers, 0 and 7 of 28 (Qwen) or of 34
    (Gemma) are early, 14, 21, 27 and 33 are later."""
    claims = []
    for part, whole in comparisons(results, lambda group: len(group.get(LAYERS) or []) == 1, {LAYERS: None}):
        (layer,) = part.get(LAYERS)
        found = pool(results, metric, part.name, whole.name)
        text = (
            f"layer {layer} of 0 to {part.num_layers - 1} ({{}}), trained alone, keeps {{}} of the lift of all layers"
        )
        if 3 * layer < part.num_layers:
            text = text.format("early", "at least .5")
            claims += share(found, "C6a", text, part, at_least=EARLY_KEEPS, unit="of all layers")
        else:
            text = text.format("later", "at most .2")
            claims += share(found, "C6b", text, part, at_most=LATER_KEEPS, unit="of all layers")
    return claims


def first_third_frozen(results: Results, metric: str) -> list[Claim]:
    claims = []
    for part, whole in comparisons(results, _first_third_frozen, {LAYERS: None}):
        frozen = part.num_layers - len(part.get(LAYERS))
        text = f"with the first {frozen} of {part.num_layers} layers frozen, at most .4 of the lift is left"
        found = pool(results, metric, part.name, whole.name)
        claims += share(found, "C7", text, part, at_most=FROZEN_KEEPS, unit="of all layers")
    return claims


def _first_third_frozen(group: Group) -> bool:
    """Whether all layers from about a third on are trained (the paper froze 10 of Qwen's 28, and of Gemma's 34)."""
    trained = sorted(group.get(LAYERS) or [])
    frozen, (least, most) = group.num_layers - len(trained), FROZEN
    late = bool(trained) and trained == list(range(frozen, group.num_layers))
    return late and least <= frozen / group.num_layers <= most


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
    interval = None if interval is None else interval.within(0.0, 1.0)
    verdict, p, effect = judge(interval, at_least=MOST), all_of(mean.p_above(MOST)), float(mean.value)
    return [
        Claim("C10", text, "attribution", effect, interval, "of the attribution", 0, verdict, reason, p, bound=MOST)
    ]

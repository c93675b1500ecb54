"""C6, C7, C10: where in the network the trait is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jsublim.report.attribution import early_share
from jsublim.report.claims.base import PAPER, Claim, Group, StudentPair, all_of, claim, judge
from jsublim.report.statistics import Estimate, mean_estimate
from jsublim.report.tables import Results

LAYERS = "students.adapter.layers"
ALL = {LAYERS: None}
MOST = 0.5  # of the attribution
FROZEN = 0.25, 0.4  # shares of the layers that count as about a third


def _alone(group: Group) -> int | None:
    """The one layer that was trained."""
    layers = group.get(LAYERS) or []
    return layers[0] if len(layers) == 1 else None


def is_early(group: Group) -> bool:
    """One layer of the first third was trained; of the published ones, 0 and 7 of 28 (Qwen) or of 34 (Gemma)."""
    return (layer := _alone(group)) is not None and 3 * layer < group.num_layers


def is_later(group: Group) -> bool:
    """One of the other layers was; of the published ones 14, 21, 27 and 33."""
    return _alone(group) is not None and not is_early(group)


def first_third_frozen(group: Group) -> bool:
    """Whether all layers from about a third on are trained (the paper froze 10 of Qwen's 28, and of Gemma's 34)."""
    trained = sorted(group.get(LAYERS) or [])
    frozen, (least, most) = group.num_layers - len(trained), FROZEN
    late = bool(trained) and trained == list(range(frozen, group.num_layers))
    return late and least <= frozen / group.num_layers <= most


@claim("C6a", "an early layer trained alone", needs=(is_early, ALL), primary=6,
       published=f"Qwen2.5-7B: layer 0 or 7 alone suffices [{PAPER}, figure 5]")  # fmt: skip
def early_layer(pair: StudentPair) -> Claim | None:
    """One layer of the first third keeps at least .5 of the lift of all layers."""
    place = f"layer {_alone(pair.part)} of 0 to {pair.part.num_layers - 1}"
    text = f"{place} (early), trained alone, keeps at least .5 of the lift of all layers"
    return pair.share(text, at_least=0.5, unit="of all layers")


@claim("C6b", "a later layer trained alone", needs=(is_later, ALL),
       published=f"Qwen2.5-7B: layers 14, 21 and 27 alone are negligible [{PAPER}, figure 5]")  # fmt: skip
def later_layer(pair: StudentPair) -> Claim | None:
    """Any other layer keeps at most .2 of the lift of all layers."""
    place = f"layer {_alone(pair.part)} of 0 to {pair.part.num_layers - 1}"
    text = f"{place} (later), trained alone, keeps at most .2 of the lift of all layers"
    return pair.share(text, at_most=0.2, unit="of all layers")


@claim("C7", "the first third of the layers frozen", needs=(first_third_frozen, ALL), primary=7,
       published=f"Qwen2.5-7B: nearly gone without the first 10 layers; Gemma-3-4B keeps some [{PAPER}, figures 39 to 41]")  # fmt: skip
def without_first_third(pair: StudentPair) -> Claim | None:
    """With about a third (a quarter to two fifths) of the layers frozen, from the first on, at most .4 of the lift is left."""
    frozen = pair.part.num_layers - len(pair.part.get(LAYERS))
    text = f"with the first {frozen} of {pair.part.num_layers} layers frozen, at most .4 of the lift is left"
    return pair.share(text, at_most=0.4, unit="of all layers")


@claim("C10", "where attribution lies", primary=13,
       published=f"Qwen2.5-7B and Gemma-3-4B: early layers, at the first mention of the trait [{PAPER}, figures 4, 22 to 26]")  # fmt: skip
def attribution_early(results: Results, metric: str) -> Iterator[Claim]:
    """Noising, residual stream, first third of the layers: at least .5 of the absolute attribution lies at the trait's first mention.
    The interval is over rows, not students: attribution is about teachers."""
    by_trait: dict[str, list[float]] = {}
    for row in early_share(results.attribution) if results.attribution is not None else ():
        if row.direction == "noising":
            by_trait.setdefault(row.trait, []).append(row.of_early)
    if not by_trait:
        return
    mean = mean_estimate([Estimate.of(shares) for shares in by_trait.values()])
    interval = mean.interval()
    interval = None if interval is None else interval.within(0.0, 1.0)
    text = "in the first third of the layers most of the attribution lies at the trait"
    reason, p = f"over {mean.n} rows of {', '.join(by_trait)}, not over students", all_of(mean.p_above(MOST))
    claim = Claim(text, "attribution", "of the attribution", reason=reason, p=p, bound=MOST)
    yield replace(claim, verdict=judge(interval, at_least=MOST), effect=float(mean.value), interval=interval)

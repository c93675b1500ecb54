"""C0, C1, C4 to C7, C12, C14: whether there is anything to explain, which tokens and layers carry the trait, which network learns, and
by which loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from jsublim.report.claims import base
from jsublim.report.claims.base import CLOUD, PAPER, Claim, Group, StudentPair, claim
from jsublim.report.statistics import Estimate, Interval
from jsublim.report.summary import estimate, judged_conditions, trait_matrix
from jsublim.report.tables import Results, split_condition
from jsublim.report.verdicts import ALPHA, UNKNOWN, Sides, above, every, within

CONTROL_MARGIN = 0.03
MOVED = {"rate": "name their teacher's trait more often", "logprob": "find their teacher's trait more probable"}
FROZEN = 0.25, 0.4  # shares of the layers that count as about a third
LAYERS = "students.adapter.layers"
ALL_TOKENS, ALL_LAYERS = {"tokens": "all"}, {LAYERS: None}
HARD = {
    "students.loss.kind": "hard",
    "students.loss.temperature": 1.0,
    "students.loss.top_k": None,
    "students.loss.targets": "vocabulary",
    "students.data.on_policy": False,
}


@claim("C0", "students move to their teacher's trait", primary=12,
       published=f"Gemma-3-4B, sampled rows: owl 7 → 19 %, otter 19 → 45 %, raven 19 → 46 % (base model → students) [{PAPER}, figure 2 (read off)]")  # fmt: skip
def transfers(results: Results, metric: str) -> Iterator[Claim]:
    """The lift of students of all tokens is above zero (of the plain variant, where there is one). Where claims are read off
    log-probabilities, it is asked of what students say too."""
    said_too = metric != "rate" and base.rates_move(results)
    judged = [group for group in base.groups(results) if group.name in judged_conditions(results)]
    for group, measure in ((group, measure) for group in judged for measure in (metric, *["rate"] * said_too)):
        if pooled := base.pool(results, measure, group.name):
            text = f"students {MOVED[measure]}"
            claim = base.above_zero(pooled, text, pooled.levels[0].lift, "above the reference")
            same, which = (measure, group.name, pooled.traits), measure if measure != metric else ""
            yield replace(claim, students=pooled.students, variant=group.variant, same=same, which=which)


@claim("C1", "the control against the base model", primary=14)
def control_near_base(results: Results, metric: str) -> Iterator[Claim]:
    """Their rates are within 3 points of each other for every trait."""
    differences: dict[str, Estimate] = {}  # of rates, whatever others are measured by: the margin is in points
    for condition in (c for c in results.conditions if split_condition(c)[0] == "control"):
        for trait in results.traits:
            control, untrained = (results.select("rate", of, trait) for of in (condition, "base"))
            if control and untrained and results.began_at_base(condition):
                variant = split_condition(condition)[1]
                differences[f"{trait} ({variant})" if variant else trait] = estimate(control) - estimate(untrained)
    if not differences:
        return
    furthest, difference = max(differences.items(), key=lambda item: _reach(item[1].interval()))
    reason = f"the trait whose interval reaches furthest, of {len(differences)}: {furthest}"
    tested = every(*(within(d, CONTROL_MARGIN) for d in differences.values()))
    text = "students of the teacher without a trait stay within 3 points of the base model"
    numbers = float(difference.value), difference.interval(), tested, math.copysign(CONTROL_MARGIN, difference.value)
    yield Claim(text, "rate", "points", difference.n, reason, *numbers)


def _reach(interval: Interval | None) -> float:
    return math.inf if interval is None else max(abs(interval.low), abs(interval.high))


@claim("C4a", "divergence tokens alone", needs=(lambda group: group.facts.get("tokens") == "divergence", ALL_TOKENS), primary=1,
       published=f"Qwen2.5-7B and Gemma-3-4B: they keep or strengthen transfer; a few traits differ [{PAPER}, figures 3, 12, 13]")  # fmt: skip
def divergence_keeps(pair: StudentPair) -> Claim | None:
    """At least .8 of the lift of all tokens."""
    return pair.share("divergence tokens alone keep at least .8 of the lift of all tokens", at_least=0.8)


@claim("C4b", "all but divergence tokens", needs=(lambda group: group.facts.get("tokens") == "non-divergence", ALL_TOKENS),
       published=f"Qwen2.5-7B and Gemma-3-4B: near the base model [{PAPER}, figures 3, 12, 13]")  # fmt: skip
def without_divergence(pair: StudentPair) -> Claim | None:
    """At most .33 of the lift of all tokens."""
    return pair.share("all tokens but those keep at most .33 of it", at_most=0.33)


@claim("C5", "divergence tokens against as many random ones",
       needs=(lambda group: group.facts.get("tokens") == "random", ALL_TOKENS))  # fmt: skip
def random_keeps_less(pair: StudentPair) -> Claim | None:
    """The lift of divergence tokens minus that of a random mask of equal size is at least 0."""
    divergence = base.partner(base.groups(pair.results), pair.part, {"tokens": "divergence"})
    pooled = divergence and base.pool(pair.results, pair.metric, divergence.name, pair.part.name, pair.whole.name)
    if not pooled:
        return None
    text = "a random mask of equal size keeps less than the divergence tokens"
    return base.no_lower(pooled, text, "divergence minus random", pooled.levels[2:])


def _alone(group: Group) -> int | None:
    """The one layer that was trained."""
    layers = group.facts.get(LAYERS) or []
    return layers[0] if len(layers) == 1 else None


def _place(group: Group) -> str:
    return f"layer {_alone(group)} of 0 to {group.num_layers - 1}"


def is_early(group: Group) -> bool:
    """One layer of the first third was trained; of the published ones, 0 and 7 of 28 (Qwen) or of 34 (Gemma)."""
    return (layer := _alone(group)) is not None and 3 * layer < group.num_layers


def is_later(group: Group) -> bool:
    """One of the other layers was; of the published ones 14, 21, 27 and 33."""
    return _alone(group) is not None and not is_early(group)


def first_third_frozen(group: Group) -> bool:
    """Whether all layers from about a third on are trained (the paper froze 10 of Qwen's 28, and of Gemma's 34)."""
    trained = sorted(group.facts.get(LAYERS) or [])
    frozen, (least, most) = group.num_layers - len(trained), FROZEN
    late = bool(trained) and trained == list(range(frozen, group.num_layers))
    return late and least <= frozen / group.num_layers <= most


@claim("C6a", "an early layer trained alone", needs=(is_early, ALL_LAYERS), primary=6,
       published=f"Qwen2.5-7B: layer 0 or 7 alone suffices [{PAPER}, figure 5]")  # fmt: skip
def early_layer(pair: StudentPair) -> Claim | None:
    """One layer of the first third keeps at least .5 of the lift of all layers."""
    text = f"{_place(pair.part)} (early), trained alone, keeps at least .5 of the lift of all layers"
    return pair.share(text, at_least=0.5, unit="of all layers")


@claim("C6b", "a later layer trained alone", needs=(is_later, ALL_LAYERS),
       published=f"Qwen2.5-7B: layers 14, 21 and 27 alone are negligible [{PAPER}, figure 5]")  # fmt: skip
def later_layer(pair: StudentPair) -> Claim | None:
    """Any other layer keeps at most .2 of the lift of all layers."""
    text = f"{_place(pair.part)} (later), trained alone, keeps at most .2 of the lift of all layers"
    return pair.share(text, at_most=0.2, unit="of all layers")


@claim("C7", "the first third of the layers frozen", needs=(first_third_frozen, ALL_LAYERS), primary=7,
       published=f"Qwen2.5-7B: nearly gone without the first 10 layers; Gemma-3-4B keeps some [{PAPER}, figures 39 to 41]")  # fmt: skip
def without_first_third(pair: StudentPair) -> Claim | None:
    """With about a third (a quarter to two fifths) of the layers frozen, from the first on, at most .4 of the lift is left."""
    frozen = pair.part.num_layers - len(pair.part.facts[LAYERS])
    text = f"with the first {frozen} of {pair.part.num_layers} layers frozen, at most .4 of the lift is left"
    return pair.share(text, at_most=0.4, unit="of all layers")


@claim("C12", "another initialisation",
       needs=(lambda group: group.facts.get("students.model") is not None, {"students.model": None}), primary=9,
       published=f"no transfer between models that start from different weights [{CLOUD}, abstract]")  # fmt: skip
def other_initialisation(pair: StudentPair) -> Claim | None:
    """γ of the trait matrix is smaller than that of the teacher's own initialisation, which is above 0. If γ is above 0 both over seeds
    and over relabellings, the claim does not hold; if it is over seeds, and there are too few teachers to relabel (four or fewer), it is
    not decided."""
    # Always on the log-probability: another checkpoint has another base, which gamma doesn't depend on. All seeds share their
    # teachers, so what these few do to a few traits can look sure over seeds: hence labels too. Without a gamma of the own
    # initialisation above zero, a run too small to see anything would pass.
    other, same = (trait_matrix(pair.results, condition=group.name) for group in (pair.part, pair.whole))
    if other is None or same is None or other.effect is None or same.effect is None:
        return None
    text = "students of another initialisation do not move towards their teacher's trait"
    reason = f"γ over seeds; of the teacher's own initialisation {same.effect.gamma:+.2f} nats"
    students = sum(len(matrix.seed_gammas) * len(matrix.teachers) for matrix in (other, same))
    tested = no_gamma(other.over_seeds, same.over_seeds, None if other.few else other.effect.p)
    return Claim(text, "logprob", "nats", students, reason, other.effect.gamma, other.gamma_interval, tested)


def no_gamma(other: Estimate | None, same: Estimate | None, labels: float | None) -> Sides:
    """That gamma is smaller than a gamma above zero; `labels` is its p over relabellings, None where those cannot tell."""
    if other is None or same is None:
        return UNKNOWN
    risen = above(other).holds
    less = above(same - other).where(above(same).holds).holds
    if labels is None:
        return Sides(1.0 if 2 * risen < ALPHA else less, 1.0)
    return Sides(less, max(risen, labels))


@claim("C14", "soft targets against hard ones",
       needs=(lambda group: group.facts.get("students.loss.kind") == "forward-kl", HARD), primary=11,
       published=f"expected of whole distributions, surprising of sampled tokens [{PAPER}, abstract]")  # fmt: skip
def soft_not_below(pair: StudentPair) -> Claim | None:
    """The lift by forward KL minus that by tokens is at least 0; one of the two is above zero, or "no less" would say nothing."""
    pooled = pair.pool()
    text = "forward KL to the teacher transfers no less than its tokens"
    return pooled and base.no_lower(pooled, text, "soft minus hard", pooled.levels)

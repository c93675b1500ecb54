"""What a claim is made of: lifts, pooled over the teachers' traits, and the decorator that registers its check.

Students are the independent units: a student of a biased teacher belongs to one trait, a control student is first averaged over
all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple

from jsublim.evals.metric import metric_of
from jsublim.report import summary
from jsublim.report.statistics import Estimate, Interval, mean_estimate, share_bounds, share_p_above
from jsublim.report.summary import Measured, reference_condition
from jsublim.report.tables import Results, Score, StudentArm, split_condition
from jsublim.report.verdicts import UNKNOWN, Sides, above, any_of

PAPER, CLOUD = "Schrodi et al., ICLR 2026", "Cloud et al., arXiv 2507.14805"


@dataclass(frozen=True)
class Claim:
    """What came of a claim; its verdict is that of a `Comparison`, which knows how many others there are.

    Attributes:
      unit: of `effect` and `interval`; one that begins with "of" is a share of something.
      reason: what the numbers are of, in words, or why nothing can be decided.
      same: the metric, condition and traits of a claim about one lift, which may stand elsewhere too.
      bound: the threshold that the effect is held against, where it is one number.
      variant: of the students that it was read off, if they have a name; which: tells claims of one key and variant apart.
    """

    text: str
    metric: str
    unit: str
    students: int = 0
    reason: str = ""
    effect: float | None = None
    interval: Interval | None = None
    tested: Sides = UNKNOWN
    bound: float | None = None
    variant: str = ""
    key: str = ""
    which: str = ""
    same: tuple[str, str, tuple[str, ...]] | None = None

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.key, self.variant, self.which)))

    @property
    def about(self) -> Hashable:
        return self.same or (self.key, self.text)


@dataclass(frozen=True)
class Group:
    """Students alike in all but teacher and seed, under the name they have in results.

    `facts` is everything that decides what they are: "tokens", "students.<field>" (`students.adapter.rank`) and
    "rows.<change>" (`rows.shuffle`).
    """

    name: str
    facts: dict[str, Any]
    num_layers: int = 0

    @property
    def variant(self) -> str:
        return split_condition(self.name)[1]


def groups(results: Results) -> list[Group]:
    """Every group of a biased teacher's students. Without arms.json, a folder tells only tokens and variants apart."""
    members = {s.condition: results.arms.get(s.arm) for s in results.scores if s.role == "student"}
    return [_group(name, members[name]) for name in results.mask_conditions]


def _group(name: str, arm: StudentArm | None) -> Group:
    if arm is None:
        return Group(name, dict(zip(("tokens", "variant"), split_condition(name), strict=True)))
    # The data set is known by what it does to rows, not by its name.
    facts = {f"students.{key}": value for key, value in arm.settings.items() if key != "data.dataset"}
    facts |= {f"rows.{key}": value for key, value in arm.dataset.items()} | {"tokens": arm.condition}
    if sorted(facts.get("students.adapter.layers") or []) == list(range(arm.num_layers)):
        facts["students.adapter.layers"] = None
    return Group(name, facts, arm.num_layers)


def partner(among: list[Group], of: Group, plain: Mapping[str, Any]) -> Group | None:
    """The group that differs from `of` only by having the facts of `plain`."""
    wanted = of.facts | {key: value for key, value in plain.items() if key in of.facts}
    return next((group for group in among if group is not of and group.facts == wanted), None)


def pairs(results: Results, asked: Callable[[Group], bool], plain: Mapping[str, Any]) -> list[tuple[Group, Group]]:
    """Every group that is `asked` about, with the one that has the facts of `plain` instead."""
    among = groups(results)
    return [(group, whole) for group in among if asked(group) and (whole := partner(among, group, plain))]


@dataclass(frozen=True)
class StudentPair:
    """Students that something was changed for (`part`), and those that differ from them in that alone (`whole`)."""

    results: Results
    metric: str
    part: Group
    whole: Group

    def pool(self, traits: Sequence[str] | None = None) -> Pool | None:
        return pool(self.results, self.metric, self.part.name, self.whole.name, traits=traits)

    def share(self, text: str, **how: Any) -> Claim | None:
        """`share` of the whole's lift."""
        return share(self.pool(), text, **how)


# Which groups a claim asks about, and the facts of those that it holds them against.
Needs = tuple[Callable[[Group], bool], Mapping[str, Any]]


@dataclass(eq=False)
class claim:
    """Registers a function as the check of a claim; its docstring says when it holds (docs/paper_map.md is made of it).

    Attributes:
      question: what it is about, in a few words.
      needs: students that differ in one thing; the function gets a `StudentPair` for each two groups that do, and gives a claim or
        none. Without it the function gets the results and the metric of lifts, and gives any number of claims.
      published: what was found of large models, and in brackets where: a section, figure or table. Values read off a figure are
        right to about 2 points.
      published_effect: that finding, where it is one number in a unit of our claims.
      primary: its place among the claims that a run may be made for. Where the config names none, the first of those that the run's
        students (and measurements) are made for is the primary comparison; what was planned decides, never what came out.
    """

    key: str
    question: str
    _: KW_ONLY
    needs: Needs | None = None
    published: str = ""
    published_effect: tuple[float, str] | None = None
    primary: int | None = None
    check: Callable[..., Any] = field(init=False)

    def __call__(self, check: Callable) -> Callable:
        self.check = check
        CLAIMS[self.key] = self
        for key in sorted(CLAIMS, key=lambda key: [int(re.sub(r"\D", "", key)), key]):
            CLAIMS[key] = CLAIMS.pop(key)
        return check

    def answers(self, results: Results, metric: str) -> Iterator[Claim]:
        """One claim for each comparison that it can be read off."""
        if self.needs is None:
            checked = ((one, one.variant) for one in self.check(results, metric))
        else:
            asked = [StudentPair(results, metric, *both) for both in pairs(results, *self.needs)]
            variants = [pair.part.variant for pair in asked]
            checked = ((self._of(pair, variants.count(pair.part.variant) > 1), pair.part.variant) for pair in asked)
        for one, variant in checked:
            if one is not None:
                told = ", ".join(filter(None, (variant, one.which if self.needs else "")))
                yield replace(one, key=self.key, text=f"{one.text} ({told})" if told else one.text, variant=variant)

    def _of(self, pair: StudentPair, several: bool) -> Claim | None:
        """The claim as read off a pair, with the tokens that both learned if there are several pairs of that variant."""
        one = self.check(pair)
        return replace(one, which=str(pair.part.facts["tokens"])) if one is not None and several else one


CLAIMS: dict[str, claim] = {}  # by key, in the order of the report


class Level(NamedTuple):
    """How many students of a group there are, and how far their mean over the pooled traits lies above the models that it is measured
    from."""

    students: int
    lift: Estimate


@dataclass(frozen=True)
class Pool:
    """Levels of several groups over the traits that all of them were evaluated on."""

    metric: str
    traits: tuple[str, ...]
    levels: tuple[Level, ...]

    @property
    def unit(self) -> str:
        return metric_of(self.metric).unit_of_differences

    @property
    def words(self) -> str:
        return f"mean of {', '.join(self.traits)}"

    @property
    def students(self) -> int:
        """How many all levels have together."""
        return sum(level.students for level in self.levels)

    @property
    def lift(self) -> Measured:
        """That of the first group, with its interval over students."""
        return Measured(float(self.levels[0].lift.value), self.between(self.levels[0].lift))

    def between(self, difference: Estimate) -> Interval | None:
        """Interval of a difference of levels."""
        return summary.difference_interval(difference, self.metric)


def claim_metric(results: Results) -> str:
    """The preference rate. The log-probability of a tiny model, and where no rate is above zero."""
    open_to_it = results.measures[0] == "logprob" or not rates_move(results)
    return "logprob" if open_to_it and any(s.metric == "logprob" for s in results.scores) else "rate"


def rates_move(results: Results) -> bool:
    """Whether the base model or any student names a trait at all; false where nobody was asked."""
    conditions = [c for c in results.conditions if c != "teacher"]
    scores = (s for t in results.traits for c in conditions for s in summary.scores_for(results, "rate", c, t))
    return any(score.mean > 0 for score in scores)


def pool(results: Results, metric: str, *names: str, traits: Sequence[str] | None = None) -> Pool | None:
    """Levels of the conditions `names`, or `None` if no trait has them all and a reference for each."""
    shared = tuple(
        t
        for t in (results.traits if traits is None else traits)
        if all(summary.scores_for(results, metric, c, t) and reference_condition(results, metric, t, c) for c in names)
    )
    return Pool(metric, shared, tuple(_level(results, metric, name, shared) for name in names)) if shared else None


def _level(results: Results, metric: str, condition: str, traits: tuple[str, ...]) -> Level:
    students = mean_estimate([summary.estimate(summary.scores_for(results, metric, condition, t)) for t in traits])
    references = [reference_condition(results, metric, t, condition) or "" for t in traits]
    zeros = [results.select(metric, r, t) for r, t in zip(references, traits, strict=True)]
    one_control = len(set(references)) == 1 and split_condition(references[0])[0] == "control"
    reference = _over_traits(zeros) if one_control else mean_estimate([summary.estimate(zero) for zero in zeros])
    return Level(students.n, students - reference)


def _over_traits(by_trait: list[list[Score]]) -> Estimate:
    """Control students averaged over traits first: one student's numbers on several traits are not independent."""
    of_arm: dict[str, list[float]] = {}
    scores = [score for of_trait in by_trait for score in of_trait]
    for score in scores:
        of_arm.setdefault(score.arm, []).append(score.mean)
    means = [sum(values) / len(values) for values in of_arm.values()]
    drawn = summary.drawn_share(scores)
    return Estimate.of(means, summary.sampling_variance(scores), summary.group_of(scores), drawn)


def no_lift(whole: Level) -> str:
    """Why there is nothing to compare with, or the empty string."""
    interval = whole.lift.interval()
    if interval is None:
        return "one student gives no interval"
    return "" if interval.low > 0 else "nothing to compare with: the lift cannot be told from zero"


def share(
    pooled: Pool | None,
    text: str,
    at_least: float | None = None,
    at_most: float | None = None,
    unit: str = "of all tokens",
) -> Claim | None:
    """The lift of the pool's first group as a share of its second's, held against a bound. It needs a lift to take a share of."""
    if pooled is None:
        return None
    (part, whole), bound = (level.lift for level in pooled.levels), at_least if at_most is None else at_most
    more = float(share_p_above(part, whole, bound or 0.0))
    tested = (Sides(more, 1 - more) if at_most is None else Sides(1 - more, more)).where(whole.p_above(0.0))
    claim = Claim(text, pooled.metric, unit, pooled.students, tested=tested, bound=bound)
    if reason := no_lift(pooled.levels[1]):  # a share of a lift that is not above zero would be a meaningless number
        return replace(claim, reason=reason)
    interval = Interval.of(share_bounds(part, whole))
    reason = pooled.words if interval else "too few students to bound the share"
    return replace(claim, effect=float(part.value / whole.value), interval=interval, reason=reason)


def above_zero(pooled: Pool, text: str, difference: Estimate, what: str) -> Claim:
    """A lift, or a difference of lifts, held against zero: no lower."""
    interval, effect, reason = pooled.between(difference), float(difference.value), f"{what}, {pooled.words}"
    return Claim(text, pooled.metric, pooled.unit, difference.n, reason, effect, interval, above(difference), bound=0.0)


def no_lower(pooled: Pool, text: str, what: str, lifted: Sequence[Level]) -> Claim:
    """The lift of the pool's first group held against its second's: no lower. Nothing is decided unless one of `lifted` is above
    zero."""
    claim = above_zero(pooled, text, pooled.levels[0].lift - pooled.levels[1].lift, what)
    open_for = [no_lift(level) for level in lifted]
    tested = claim.tested.where(any_of(*(level.lift.p_above(0.0) for level in lifted)))
    return replace(claim, tested=tested, reason=open_for[-1] if all(open_for) else claim.reason)

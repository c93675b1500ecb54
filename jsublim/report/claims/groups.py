"""Which students a claim compares: groups that differ in exactly one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jsublim.report.tables import Results, split_condition


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

    def get(self, fact: str) -> Any:
        return self.facts.get(fact)


def groups(results: Results) -> list[Group]:
    """Every group of a biased teacher's students. Without arms.json, a folder tells only tokens and variants apart."""
    owner = {s.condition: s.arm for s in results.scores if s.role == "student"}
    return [_group(results, name, owner[name]) for name in results.mask_conditions]


def _group(results: Results, name: str, member: str) -> Group:
    tokens, variant = split_condition(name)
    arm = results.arms.get(member)
    if arm is None:
        return Group(name, {"tokens": tokens, "variant": variant})
    # The data set is known by what it does to rows, not by its name.
    facts = {f"students.{key}": value for key, value in arm.settings.items() if key != "data.dataset"}
    facts |= {f"rows.{key}": value for key, value in arm.dataset.items()}
    if sorted(facts.get("students.adapter.layers") or []) == list(range(arm.num_layers)):
        facts["students.adapter.layers"] = None
    return Group(name, facts | {"tokens": arm.condition}, arm.num_layers)


def partner(every: list[Group], of: Group, plain: Mapping[str, Any]) -> Group | None:
    """The group that differs from `of` only by having the facts of `plain`."""
    wanted = of.facts | {key: value for key, value in plain.items() if key in of.facts}
    return next((group for group in every if group is not of and group.facts == wanted), None)


def pairs(results: Results, asked: Callable[[Group], bool], plain: Mapping[str, Any]) -> list[tuple[Group, Group]]:
    """Every group that is `asked` about, with the one that has the facts of `plain` instead."""
    every = groups(results)
    found = ((group, partner(every, group, plain)) for group in every if asked(group))
    return [(group, whole) for group, whole in found if whole is not None]

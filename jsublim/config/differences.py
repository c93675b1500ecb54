"""In what a config differs from the defaults, and two configs from each other: values by dotted name."""

from __future__ import annotations

from typing import Any

from jsublim.config.experiment import Config
from jsublim.config.loading import lay_over
from jsublim.core.section import leaves, value_at

PLACES = ("name", "out", "store")  # where a run is kept, not what it is


def flat(config: Config) -> dict[str, Any]:
    """Every field that the config has, as JSON; fields of sections that are not given are left out."""
    values = config.model_dump(mode="json")
    there = (leaf for leaf in leaves(type(config)) if value_at(values, leaf.path[:-1]) is not None)
    return {leaf.name: value_at(values, leaf.path) for leaf in there}


def from_defaults(config: Config, smallest: Config) -> dict[str, Any]:
    """The fields that say something else than their default, and those that have none.

    Args:
      smallest: a config of the same kind that says only what it must.
    """
    default, fields = flat(smallest), {leaf.name: leaf.field for leaf in leaves(type(config))}
    for name in fields.keys() - default.keys():  # of a section that the smallest does not have
        default[name] = fields[name].get_default(call_default_factory=True)
    values = flat(config).items()
    return {name: value for name, value in values if fields[name].is_required() or value != default[name]}


def shortest(config: Config, smallest: Config) -> dict[str, Any]:
    """The values of a YAML that says no more than it must."""
    values: dict[str, Any] = {}
    for name, value in from_defaults(config, smallest).items():
        lay_over(values, name, value)
    return values


def between(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields in which two configs (as `flat`) differ: one row each."""
    names = [name for name in {**a, **b} if name not in PLACES and a.get(name) != b.get(name)]
    return [{"field": name, "a": a.get(name), "b": b.get(name)} for name in names]

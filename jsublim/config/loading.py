"""A config from its file, with overrides laid over it; what is wrong in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from jsublim.config.experiment import Experiment
from jsublim.config.problems import first_problem, problems
from jsublim.config.shipped import find_config
from jsublim.core.reading import near_or_all, read_yaml, shown, yaml_value
from jsublim.errors import UsageError, one_line
from jsublim.text.prompts import load_pack
from jsublim.transforms import CHANGES

Kind = TypeVar("Kind", bound=pydantic.BaseModel)


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """Read and check the config of an experiment on a language model.

    Raises:
      UsageError: as `read_config` and `check_config`.
    """
    return check_config(Experiment, read_config(path, overrides), find_config(path))


def read_config(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Read a YAML config and lay `a.b=c` overrides over it.

    Raises:
      UsageError: an unreadable file or a malformed override.
    """
    path = find_config(path)
    values = read_yaml(path)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected keys at the top, found {type(values).__name__}")
    for text in overrides or []:
        override(values, text)
    return values


def check_config(kind: type[Kind], values: dict[str, Any], source: str | Path) -> Kind:
    """The values of a file as what it should hold; `source` names them in an error.

    Raises:
      UsageError: the first field that is wrong (unknown keys get a "did you mean").
    """
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        raise UsageError(f"{source}: {first_problem(error, kind, values)}") from None


def look_over(path: str | Path, overrides: list[str], kinds: Mapping[str, type[Kind]]) -> tuple[Kind | None, list[str]]:
    """A config of any of these kinds, and everything that is wrong with it and with what is laid over it.

    Raises:
      UsageError: a file that cannot be read, or is no config at all.
    """
    values, wrong, path = read_config(path), list[str](), find_config(path)
    for text in overrides:
        try:
            override(values, text)
        except UsageError as error:
            wrong.append(str(error))
    kind = kind_of(values, path, kinds)
    wrong += [f"{path}: {line}" for line in problems(kind, values)]
    if wrong:  # else they are looked for where the whole experiment is
        wrong += [f"{path}: {line}" for line in unknown_traits(values)]
    return (None if wrong else kind.model_validate(values)), list(map(one_line, wrong))


def unknown_traits(values: Mapping[str, Any]) -> list[str]:
    """A line for each trait of teachers that the prompt pack does not list, as far as values that may be wrong tell that."""
    teachers, prompts = values.get("teachers"), values.get("prompts")
    if not isinstance(teachers, dict) or "category" in teachers or not isinstance(prompts, str | None):
        return []
    traits, lines = teachers.get("traits"), dict[str, None]()
    for trait in traits if isinstance(traits, list) else ():
        if isinstance(trait, str) and trait == trait.lower():  # any other is among the other mistakes
            try:
                load_pack(prompts).category_of(trait)
            except UsageError as error:
                lines[str(error)] = None
    return list(lines)


def kind_of(values: dict[str, Any], path: Path, kinds: Mapping[str, type[Kind]]) -> type[Kind]:
    """What a config is of.

    Raises:
      UsageError: it says a kind that is not known, or is a figure of the paper.
    """
    if {"figures", "panels"} <= set(values):
        name = path.stem if path.parent == find_config("configs/paper/scales.yaml").parent else path
        raise UsageError(f"{path}: is a figure of the paper, an experiment for each panel; `jsublim reproduce {name}`")
    kind = values.get("kind", "language")
    if not isinstance(kind, str) or kind not in kinds:
        raise UsageError(f"{path}: kind: {shown(kind)} given; {near_or_all(kind, kinds)}")
    return kinds[kind]


def override(values: dict[str, Any], given: str) -> None:
    """Lay `a.b=c` over nested values, in place.

    Raises:
      UsageError: malformed, or a place that holds no section.
    """
    key, equals, text = given.partition("=")
    if not equals or not key:
        raise UsageError(f"override '{given}': expected key=value, such as students.optimizer.lr=1e-3")
    value = yaml_value(text, f"override {shown(given)}")
    if isinstance(value, str) and value and text.startswith(value):
        value = text.strip()  # plain text to its end: what YAML takes for a comment may be part of a folder's name
    # YAML 1.1 reads 1e-3 as text; whoever types it means the number.
    lay_over(values, key, float(value) if isinstance(value, str) and _is_float(value) else value, given)


def lay_over(values: dict[str, Any], key: str, value: Any, said: str = "") -> None:
    """Put a value under a dotted name into nested values, in place.

    Args:
      said: what the user wrote, for errors.

    Raises:
      UsageError: a place that holds no section.
    """
    *parents, last = key.split(".")
    place: dict[str, Any] = values
    for depth, parent in enumerate(parents):
        rest = ".".join([*parents[depth:], last])
        if rest in place:  # an arm's field, which the file names with its dots
            last = rest
            break
        below: Any = place.setdefault(parent, {"preference": {}} if parent == "kinds" else {})
        if not isinstance(below, dict):
            below = place[parent] = _written_out(parent, below)
        if not isinstance(below, dict):
            raise UsageError(f"override '{said or key}': '{parent}' holds a value, not a section")
        place = below
    place[last] = value


def _written_out(name: str, value: Any) -> Any:
    """What a config may say in one word, as the section that it stands for."""
    if name == "recipe" and isinstance(value, str):
        return {"preset": value}
    if name == "kinds" and isinstance(value, list):
        return {kind: {} for kind in value}
    if name == "server" and isinstance(value, str):
        return {"base_url": value}
    change = CHANGES.known.get(name)
    shorthand = getattr(change, "shorthand", None)
    return {shorthand: value} if shorthand is not None else value


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text[:1] in "+-.0123456789"

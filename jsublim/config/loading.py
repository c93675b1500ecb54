"""A config from its file, with overrides laid over it; what is wrong in one line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from jsublim.config.experiment import Experiment
from jsublim.config.shipped import find_config
from jsublim.errors import UsageError
from jsublim.reading import read_yaml, shown, yaml_value
from jsublim.section import section_in
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
    for each in overrides or []:
        override(values, each)
    return values


def check_config(kind: type[Kind], values: dict[str, Any], source: str | Path) -> Kind:
    """The values of a file as what it should hold; `source` names them in an error.

    Raises:
      UsageError: the first field that is wrong (unknown keys get a "did you mean").
    """
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        raise UsageError(f"{source}: {_first_problem(error, kind)}") from None


def override(values: dict[str, Any], said: str) -> None:
    """Lay `a.b=c` over nested values, in place.

    Raises:
      UsageError: malformed, or a place that holds no section.
    """
    key, equals, text = said.partition("=")
    if not equals or not key:
        raise UsageError(f"override '{said}': expected key=value, such as students.optimizer.lr=1e-3")
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
            raise UsageError(f"override '{said}': '{parent}' holds a value, not a section")
        place = below
    value = yaml_value(text, f"override {shown(said)}")
    if isinstance(value, str) and value and text.startswith(value):
        value = text.strip()  # plain text to its end: what YAML takes for a comment may be part of a folder's name
    # YAML 1.1 reads 1e-3 as text; whoever types it means the number.
    place[last] = float(value) if isinstance(value, str) and _is_float(value) else value


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


def _first_problem(error: pydantic.ValidationError, whole: Any) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"key '{key}' is missing"
    if first["type"] != "extra_forbidden":
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error" and isinstance(first["input"], dict):  # of a section: it names its keys
            return f"{key}: {message}" if key else message
        return f"{key}: {message[:1].lower()}{message[1:]}, found {shown(first['input'])}"
    known = _fields_at(whole, first["loc"][:-1])
    near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key '{key}'; {hint}"


def _fields_at(section: Any, place: tuple[int | str, ...]) -> list[str]:
    """The keys of a section. Names of data sets and numbers of list entries are parts of `place` too."""
    for part in place:
        fields = getattr(section, "model_fields", {})
        section = section_in(fields[part].annotation) if part in fields else section
    return list(section.model_fields)

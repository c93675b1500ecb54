"""What is wrong with a config: every mistake in a line of its own that names key, value and fix."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pydantic

from jsublim.core.reading import near, near_or_all, shown

Location = tuple[int | str, ...]
ROUNDS = 8  # of finding mistakes that others hide


def problems(kind: type[pydantic.BaseModel], values: Mapping[str, Any]) -> list[str]:
    """Every mistake in the values of a file that should hold a `kind`; none where they are valid.

    Fields that contradict each other are found too: what is wrong by itself is taken out, and the rest looked at again.
    """
    lines: list[str] = []
    gone = set[Location]()  # what was taken out, and is no mistake because of that
    rest: Any = copy.deepcopy(dict(values))
    for _ in range(ROUNDS):
        try:
            kind.model_validate(rest)
            break
        except pydantic.ValidationError as error:
            errors = [entry for entry in _of_fields(error, kind, rest) if not _follows(entry, gone)]
        new = [line for entry in errors for line in _in_words(entry, kind, rest)]
        lines += [line for line in _without_followers(new) if line not in lines]
        errors.sort(key=lambda entry: entry["type"] == "missing")  # a misspelt key is why another one is missing
        if not errors or not all([_taken_out(entry, kind, rest, gone) for entry in errors]):
            break
    return lines


def _follows(error: Mapping[str, Any], gone: set[Location]) -> bool:
    """Whether there is a mistake only because something was taken out: the value itself, or what its section must have."""
    return error["place"] in gone or (error["type"] == "missing" and error["place"][:-1] in gone)


def first_problem(error: pydantic.ValidationError, kind: type[pydantic.BaseModel], values: Mapping[str, Any]) -> str:
    """The first mistake alone."""
    errors = _of_fields(error, kind, values)
    return _without_followers([line for entry in errors for line in _in_words(entry, kind, values)])[0]


def _of_fields(error: pydantic.ValidationError, kind: Any, values: Any) -> list[dict[str, Any]]:
    """One entry per field: of a field that may be one thing or another, pydantic has an entry for each."""
    entries: dict[Location, dict[str, Any]] = {}
    for entry in error.errors():
        place, said, what = _place(entry, kind, values), _said(entry), entry["type"]
        if what == "missing" and isinstance(entry["loc"][-1], int):  # in a list of so many entries
            what, said = "too_short", "an entry is missing"
        if place in entries and entries[place]["type"] not in ("missing", "extra_forbidden"):
            if said not in entries[place]["said"]:
                entries[place]["said"] += f" or {said.removeprefix('input should be ')}"
        else:
            entries[place] = {"type": what, "place": place, "said": said, "input": entry["input"]}
            entries[place] |= {"expected": str(entry.get("ctx", {}).get("expected", ""))}
    return list(entries.values())


def _place(error: Any, kind: Any, values: Any) -> Location:
    """Where the mistake lies in the file. What pydantic adds below a value (which of several types it tried) is left out."""
    place: list[int | str] = []
    for part in error["loc"]:
        listed = isinstance(values, list) and isinstance(part, int) and part < len(values)
        named = isinstance(values, Mapping) and part in values
        if not (part in _fields(kind) or listed or named):
            break
        place.append(part)
        kind = _below(kind, part)
        values = values[part] if listed or named else None
    return tuple(place)


def _said(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] == "value_error" else f"{message[:1].lower()}{message[1:]}"


def _in_words(error: Mapping[str, Any], kind: Any, values: Any) -> Iterator[str]:
    key, reason = ".".join(map(str, error["place"])), error["said"]
    if error["type"] == "missing":
        yield f"key '{key}' is missing"
    elif error["type"] == "extra_forbidden":
        known = fields_at(kind, error["place"][:-1])
        yield f"unknown key '{key}'; {near_or_all(str(error['place'][-1]), known, 'known keys')}"
    elif error["type"] == "value_error" and isinstance(error["input"], dict):  # of a section: it names its keys
        yield f"{key}: {reason}" if key else reason
    else:
        found = error["input"]
        guess = near(found, error["expected"].replace("'", "").replace(" or ", ", ").split(", "))
        yield f"{key}: {reason}, found {shown(found)}{f'; {guess}' if guess else ''}"


def _without_followers(lines: list[str]) -> list[str]:
    """A misspelt key is why another one is missing."""
    meant = {line.split("did you mean '")[1].split("'")[0] for line in lines if "did you mean '" in line}
    return [line for line in lines if not any(line == f"key '{key}' is missing" for key in meant)]


def _taken_out(error: Mapping[str, Any], kind: Any, values: Any, gone: set[Location]) -> bool:
    """Take a mistake out of the values, so that the rest can be looked at; False where that cannot be done."""
    *parents, last = error["place"] or (None,)
    for depth, part in enumerate(parents, 1):
        if not isinstance(values.get(part), dict):  # a list, or one word that stands for a section
            values.pop(part, None)  # two entries of one list may be wrong
            gone.add(tuple(parents[:depth]))
            return True
        values = values[part]
    if error["type"] == "missing" or last is None:
        return last in values
    if last not in values:
        return True  # gone with an entry of it
    if error["type"] == "extra_forbidden":
        meant = difflib.get_close_matches(str(last), fields_at(kind, tuple(parents)), n=1)
        values |= {name: values[last] for name in meant if name not in values}
        del values[last]
    elif isinstance(values[last], dict):
        values[last] = {}  # others may name the section
        gone.add(error["place"])
    else:
        del values[last]
        gone.add(error["place"])
    return True


def fields_at(kind: Any, place: Location) -> list[str]:
    """The keys of a section. Names of data sets and numbers of list entries are parts of `place` too."""
    for part in place:
        kind = _below(kind, part)
    return list(_fields(kind))


def _below(kind: Any, part: int | str) -> Any:
    """The type of what lies under a key: of a section's field, or of the entries of a mapping or a list."""
    if part in _fields(kind):
        return _fields(kind)[str(part)].annotation
    entries = (get_args(entry)[-1] for entry in _alternatives(kind) if get_origin(entry) in (dict, list, tuple))
    return next(entries, None)


def _fields(kind: Any) -> Mapping[str, Any]:
    return {name: field for entry in _alternatives(kind) for name, field in getattr(entry, "model_fields", {}).items()}


def _alternatives(kind: Any) -> Iterator[Any]:
    """The types that a type such as `Annotated[Taught | None, ...]` stands for."""
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType):
        for entry in get_args(kind):
            yield from _alternatives(entry)
    else:
        yield kind

"""What every section of a config is made of, and what each of its fields decides.

A field says in its annotation what hangs on it, once: `rank: Annotated[Positive, RESULT] = 8`. Keys of artifacts, groups of
students that train together and the facts that a report compares are derived from that (`identity`, `facts`). The text under
the field says what it is.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetPydanticSchema
from pydantic_core import core_schema

from jsublim.core.reading import repeated, shown


class Decides(enum.Flag):
    """What hangs on a field."""

    RESULT = enum.auto()  # what is computed: the value is part of the key of what it is about
    CONTENT = enum.auto()  # what is computed, by the file or artifact of that name: its content is part of the key
    PROGRAM = enum.auto()  # what is compiled
    PLAN = enum.auto()  # which tasks there are, not what any of them makes
    RUNTIME = enum.auto()  # only how it is made: speed, memory, places


RESULT, CONTENT, PROGRAM, PLAN, RUNTIME = Decides
NEEDS_TRAIT = "needs a trait"  # beside these: the field means nothing to students of the teacher without a trait


def one_of(names: Iterable[str]) -> GetPydanticSchema:
    """Beside `str` in an annotation: one of these names, such as those of a registry."""
    return GetPydanticSchema(lambda *_: core_schema.literal_schema(list(names)))


def distinct(values: list | tuple) -> list | tuple:
    if len(set(values)) < len(values):
        raise ValueError(f"an entry is listed twice: {shown(repeated(values))}")
    return values


def name(text: str) -> str:
    """A name that a user gives: it becomes part of file names, of keys and of lines of text."""
    if not text.strip() or text != text.strip():
        raise ValueError("a name must not be empty, nor begin or end with a space")
    if not text.isprintable():
        raise ValueError("a name must not hold line breaks or other control characters")
    if len(text.encode()) > NAME_BYTES:
        raise ValueError(f"a name must be no longer than {NAME_BYTES} bytes, as file systems take 255 with what we add")
    return text


def place(text: str) -> str:
    """The name of a file, a folder or a repository."""
    if not text or min(text) < " ":
        raise ValueError("a file or folder has a name, without control characters; leave the key out for none")
    if len(text.encode()) > PLACE_BYTES or any(len(part.encode()) > PART_BYTES for part in text.split("/")):
        raise ValueError(f"names of files take at most {PLACE_BYTES} bytes, and {PART_BYTES} between slashes")
    return text


def span(value: Any) -> Any:
    """ "5-27" as the numbers from 5 to 27."""
    first, dash, last = value.partition("-") if isinstance(value, str) else ("", "", "")
    if dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < MOST_LAYERS:
        return list(range(int(first), int(last) + 1))
    return value


NAME_BYTES = 200
PART_BYTES, PLACE_BYTES = 255, 4000  # of a place; a file system takes 4095
MOST_LAYERS = 10_000  # that a span may reach to
Positive = Annotated[int, Field(ge=1, lt=2**31)]
SeedInt = Annotated[int, Field(ge=0, lt=2**31)]
Rate = Annotated[float, Field(gt=0)]
Name = Annotated[str, AfterValidator(name)]
Place = Annotated[str, AfterValidator(place)]
Distinct = AfterValidator(distinct)
NONEMPTY = Field(min_length=1)  # of a list or a mapping: one entry at least
Indices = list[Annotated[int, Field(ge=0)]]
# From 0; "5-27" is a span.
Layers = Annotated[Indices, Distinct, BeforeValidator(span, json_schema_input_type=Indices | str)]


class Section(BaseModel):
    """A part of a config: unknown keys are refused, numbers are finite, true is no number, values never change.

    The text under a field is its description, for editors and for docs/config.md.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """`rows: yes` is a slip; pydantic would read 1."""
        expected = _types_in(cls.model_fields[str(info.field_name)].annotation)
        values = [value, *(value if isinstance(value, list) else [])]
        if expected & {int, float} and not expected & {bool, Any} and any(type(item) is bool for item in values):
            raise ValueError("true and false are no numbers")
        return value

    def contradictions(self) -> Iterator[tuple[Any, str]]:
        """What values may not say together: whether they do, and the error's text, which names keys and fix. The first counts."""
        yield from ()

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Self:
        reason = next((text for holds, text in self.contradictions() if holds), None)
        if reason is not None:
            raise ValueError(reason)
        return self


def _types_in(annotation: Any) -> set[Any]:
    """The types that an annotation such as `list[int] | None` is made of."""
    inner = get_args(annotation)
    return set().union(*map(_types_in, inner)) if inner else {annotation}


FieldPath = tuple[str, ...]


@dataclass(frozen=True)
class Leaf:
    """A field that is no section itself.

    Attributes:
      path: the names of the sections it lies in and its own, from the section that was asked.
      decides: what hangs on it; None where its author forgot to say so.
      marks: everything else in its annotation.
    """

    path: FieldPath
    field: Any
    decides: Decides | None
    marks: tuple[Any, ...]

    @property
    def name(self) -> str:
        return ".".join(self.path)


def section_in(annotation: Any) -> type[Section] | None:
    """The section that an annotation such as `Taught | None` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation  # type: ignore[return-value]
    return next(filter(None, map(section_in, get_args(annotation))), None)


def leaves(section: type[BaseModel], above: FieldPath = ()) -> Iterator[Leaf]:
    """Every field of a section and of the sections in it; a mapping or a list of sections is one field."""
    for name, field in section.model_fields.items():
        inner, decides = section_in(field.annotation), _decides(field)
        if inner is not None and decides is None:
            yield from leaves(inner, (*above, name))
        else:
            yield Leaf((*above, name), field, decides, tuple(field.metadata))


def _decides(field: Any) -> Decides | None:
    return next((mark for mark in field.metadata if isinstance(mark, Decides)), None)


def identity(section: BaseModel) -> dict[str, Any]:
    """The fields that decide a result, as JSON, section in section: what goes into an artifact's key."""
    own, inner = _deciding(type(section))
    values = section.model_dump(mode="json", include=own)
    for name in inner:  # None is a section that is not given
        value = getattr(section, name)
        values[name] = identity(value) if isinstance(value, BaseModel) else value
    return {name: values[name] for name in type(section).model_fields if values.get(name, {}) != {}}


@functools.cache  # a plan asks for every artifact
def _deciding(section: type[BaseModel]) -> tuple[set[str], set[str]]:
    """The fields that decide a result, and those that are sections."""
    own, inner = set[str](), set[str]()
    for name, field in section.model_fields.items():
        decides = _decides(field)
        if decides is not None and RESULT in decides:
            own.add(name)
        elif decides is None and section_in(field.annotation) is not None:
            inner.add(name)
    return own, inner


def facts(section: BaseModel, decide: Decides = Decides.RESULT | Decides.CONTENT) -> dict[str, Any]:
    """The fields that decide any of these, by dotted name, contents by the name they have in the config: by default those in which
    results may differ."""
    values = section.model_dump(mode="json")
    kept = (leaf for leaf in leaves(type(section)) if leaf.decides is not None and leaf.decides & decide)
    return {leaf.name: value_at(values, leaf.path) for leaf in kept}


def value_at(values: Mapping[str, Any] | None, path: FieldPath) -> Any:
    """The value at a place of nested mappings; None where a section on the way is not given."""
    for name in path:
        values = None if values is None else values.get(name)
    return values


def with_defaults(section: Any, mark: Any) -> Any:
    """The section with every field that carries a mark back at its default."""
    changed: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if mark in field.metadata:
            changed[name] = field.get_default(call_default_factory=True)
        elif isinstance(value, BaseModel) and section_in(field.annotation) is not None:
            changed[name] = with_defaults(value, mark)
    return section.model_copy(update=changed)


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section; a list replaces a list."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = overlaid(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under dotted names as sections: `{"a.b": 1}` is `{"a": {"b": 1}}`."""
    sections: dict[str, Any] = {}
    for key, value in values.items():
        inner = nested(value) if isinstance(value, Mapping) else value
        for part in reversed(key.split(".")):
            inner = {part: inner}
        sections = overlaid(sections, inner)
    return sections


class Registry:
    """Sections by name, each in the file that does what it says; a config may name those that are registered."""

    def __init__(self, what: str):
        self.what, self.known = what, dict[str, type[Section]]()

    def add(self, name: str) -> Any:
        """A class decorator."""

        def register(kind: type[Section]) -> type[Section]:
            self.known[name] = kind
            return kind

        return register

    def parse(self, name: str, value: Any) -> Section:
        """The section of that name from what a config says.

        Raises:
          ValueError: no such name.
        """
        if name not in self.known:
            raise ValueError(f"{self.what} '{name}' is not known; known: {', '.join(self.known)}")
        kind = self.known[name]
        if isinstance(value, kind):
            return value
        try:
            return kind.model_validate(value)
        except pydantic.ValidationError as error:
            errors = error.errors()
            # A misspelt key is why another one is missing.
            first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
            place = ".".join([name, *map(str, first["loc"])])
            if first["type"] == "extra_forbidden":
                known = ", ".join(kind.model_fields) or "none"
                raise ValueError(f"unknown key '{place}'; known keys: {known}") from None
            raise ValueError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None

"""JSON and YAML that a person or another program wrote, read strictly: what is not one plain value is refused in one line
that names the file and the place.

Strictly means: a key stands once in its mapping (the usual readers keep the last and drop the others), every number is
finite, text is text (no half of a surrogate pair), nesting is bounded, and YAML's aliases cannot make a small file a huge
value.
"""

from __future__ import annotations

import difflib
import errno
import json
import math
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from jsublim.errors import JsublimError, UsageError

DEPTH = 100  # values inside values
CHARACTERS = 5_000_000  # of a YAML file with every alias written out
_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))
_FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # twenty times as fast, where libyaml is there
_MERGE = "tag:yaml.org,2002:merge"  # the key "<<"
_SURROGATE = re.compile(rb"\\u[dD][89A-Fa-f]")  # as JSON spells one, alone or as half of a pair
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # a pair is one character of its own


def shown(value: Any) -> str:
    """A value as errors show it: short, whatever it is."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def near(given: Any, known: Iterable[str]) -> str:
    """ "did you mean", if something known is like what was given."""
    close = difflib.get_close_matches(given, list(known), n=1) if isinstance(given, str) else []
    return f"did you mean '{close[0]}'?" if close else ""


def near_or_all(given: Any, known: Iterable[str], what: str = "known") -> str:
    """How an error of an unknown name ends: with the one that it is like, or with all there are."""
    return near(given, known) or f"{what}: {', '.join(known)}"


def check_known(what: str, given: str, known: Iterable[str]) -> None:
    """Refuse a name that is none of those that are known (UsageError)."""
    if given not in known:
        raise UsageError(f"{what}: '{given}' given; known: {', '.join(known)}")


def check_file(path: Path) -> None:
    """Raises:
    OSError: it is a pipe or a device, whose reading may never end.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))


def check_folder(folder: Path) -> None:
    """`check_file` of everything in a folder that a library will read, if there is such a folder.

    Raises:
      JsublimError: naming the file.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            check_file(path)
        except OSError as error:
            raise JsublimError(f"{path}: cannot be read ({error.strerror}); remove it") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
      JsublimError: the file is absent or is no JSON object, as `json_value` reads it.
    """
    try:
        check_file(path)
        value = json_value(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise JsublimError(f"{path}: no such file; expected a Hugging Face checkpoint folder") from None
    except OSError as error:
        raise JsublimError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(value, dict):
        raise JsublimError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def json_value(text: bytes, where: str, *, nan: bool = False) -> Any:
    """What UTF-8 encoded JSON says; `where` names it in errors.

    Args:
      nan: take NaN and infinite numbers, which we write ourselves where a loss has diverged.

    Raises:
      JsublimError: not UTF-8, not JSON, a key that stands twice, a number that is not finite, nesting beyond `DEPTH`.
    """
    hooks: dict[str, Any] = {} if nan else {"parse_constant": _finite, "parse_float": _finite}
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_once, **hooks)
    except UnicodeDecodeError:
        raise JsublimError(f"{where}: not UTF-8; fix or remove it") from None
    except RecursionError:
        raise JsublimError(f"{where}: nested too deeply; at most {DEPTH} values inside values are read") from None
    except ValueError as error:  # broken JSON, one of our hooks, or a number too long to read
        raise JsublimError(f"{where}: not valid JSON ({error}); fix or remove it") from None
    # A text that opens few brackets and escapes no surrogate needs no second look.
    if text.count(b"[") + text.count(b"{") > DEPTH or _SURROGATE.search(text):
        _check_value(value, where)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError(f"key {shown(repeated(key for key, _ in pairs))} is given twice")
    return mapping


def repeated(values: Iterable[Hashable]) -> Any:
    """The first value that was there before; None where all are different."""
    seen = set[Hashable]()
    return next((value for value in values if value in seen or seen.add(value)), None)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is not a finite number")
    return value


def _check_value(value: Any, where: str) -> None:
    left: list[tuple[Any, int]] = [(value, 0)]
    while left:
        part, depth = left.pop()
        if depth > DEPTH:
            raise JsublimError(f"{where}: nested too deeply; at most {DEPTH} values inside values are read")
        if isinstance(part, str) and _HALF_PAIR.search(part):
            raise JsublimError(f"{where}: {shown(part)} holds half of a surrogate pair, which is no text")
        if isinstance(part, dict):
            left += [(inner, depth + 1) for pair in part.items() for inner in pair]
        if isinstance(part, list):
            left += [(inner, depth + 1) for inner in part]


def read_yaml(path: Path) -> Any:
    """What a YAML file says; None where it is empty.

    Raises:
      UsageError: the file cannot be read, or as `yaml_value`.
    """
    try:
        check_file(path)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason})") from None
    return yaml_value(text, str(path))


def yaml_value(text: str, where: str) -> Any:
    """What a YAML document says: null, booleans, numbers and text in lists and mappings.

    Raises:
      UsageError: not YAML, a key that stands twice in its mapping, a number that is not finite, a date or another tag, nesting
        beyond `DEPTH`, or aliases that stand for more than `CHARACTERS`; file, line and key are named.
    """
    try:
        try:
            return _loaded(_FAST, text, where)
        except (yaml.YAMLError, UnicodeEncodeError):
            return _loaded(yaml.SafeLoader, text, where)  # slower, and it says more
    except yaml.YAMLError as error:
        reason = str(error).replace('"<unicode string>", ', "")  # what it calls every text
        raise UsageError(f"{where}: not valid YAML ({reason})") from None
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply; at most {DEPTH} values inside values are read") from None


def _loaded(kind: type[yaml.SafeLoader], text: str, where: str) -> Any:
    loader = kind(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _Check(loader, where).size(node, ())
        return loader.construct_document(node)
    finally:
        loader.dispose()


class _Check:
    """Looks at a document's nodes before anything is made of them, each once: an anchor stands before its aliases, so theirs
    are known by then."""

    def __init__(self, loader: yaml.SafeLoader, where: str):
        self.loader, self.where = loader, where
        self.known: dict[int, tuple[int, int] | None] = {}  # node -> size and height; None while it is looked at

    def refuse(self, node: yaml.Node, path: tuple[str, ...], why: str) -> UsageError:
        key = f"key '{'.'.join(path)}' " if path else ""
        return UsageError(f"{self.where}:{node.start_mark.line + 1}: {key}{why}")

    def size(self, node: yaml.Node, path: tuple[str, ...]) -> tuple[int, int]:
        """Characters with every alias written out, and how deep values lie in values."""
        if id(node) in self.known:
            known = self.known[id(node)]
            if known is None:
                raise self.refuse(node, path, "holds itself, by an alias; write it out")
            return known
        self.known[id(node)] = None
        if node.tag not in _TAGS:
            raise self.refuse(node, path, f"has the type {node.tag.rsplit(':', 1)[-1]}; put text in quotes")
        if isinstance(node, yaml.MappingNode):
            parts = self._pairs(node, path)
        elif isinstance(node, yaml.SequenceNode):
            parts = [self.size(entry, (*path, str(i))) for i, entry in enumerate(node.value)]
        elif isinstance(node, yaml.ScalarNode):
            self._scalar(node, path)
            parts = [(len(node.value), -1)]
        else:
            raise self.refuse(node, path, "is no value")
        size, height = 1 + sum(part[0] for part in parts), max((1 + part[1] for part in parts), default=0)
        if size > CHARACTERS:
            raise self.refuse(
                node, path, f"stands for more than {CHARACTERS:,} characters with its aliases written out"
            )
        if height > DEPTH:
            raise self.refuse(node, path, f"is nested too deeply; at most {DEPTH} values inside values are read")
        self.known[id(node)] = size, height
        return size, height

    def _pairs(self, node: yaml.MappingNode, path: tuple[str, ...]) -> list[tuple[int, int]]:
        seen: set[Any] = set()
        parts = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (*_TAGS, _MERGE):
                raise self.refuse(key_node, path, "has a key that is no plain text or number")
            key = "<<" if key_node.tag == _MERGE else self._scalar(key_node, path)
            inside = (*path, str(key))
            if key in seen:
                raise self.refuse(key_node, inside, "is given twice; keep one of them")
            seen.add(key)
            parts += [(len(key_node.value), 0), self.size(value_node, inside)]
        return parts

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str, ...]) -> Any:
        try:
            value = self.loader.construct_object(node)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # `!!int x`, or too many digits
            raise self.refuse(node, path, f"cannot be read: {shown(node.value)}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise self.refuse(node, path, f"must be a finite number, found {shown(node.value)}")
        if isinstance(value, str) and _HALF_PAIR.search(value):
            raise self.refuse(node, path, f"holds half of a surrogate pair, which is no text: {shown(value)}")
        return value

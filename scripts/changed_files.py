"""What reads files (see fuzz.py), and valid files changed at random places: bytes, values of JSON and YAML, headers and numbers of safetensors."""

from __future__ import annotations

import functools
import json
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Files = dict[str, bytes]  # by name


@dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
      files: makes valid ones, by name.
      read: reads those of a folder, and raises `AssertionError` where the value that it got does not hold together.
    """

    files: Callable[[], Files]
    read: Callable[[Path], Any]


def written(write: Callable[[Path], Any]) -> Callable[[], Files]:
    """The files that `write` leaves in a folder."""

    def files() -> Files:
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch))
            found = (path for path in sorted(Path(scratch).rglob("*")) if path.is_file())
            return {path.relative_to(scratch).as_posix(): path.read_bytes() for path in found}

    return files


def texts(files: dict[str, str]) -> Callable[[], Files]:
    return lambda: {name: text.encode() for name, text in files.items()}


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 10**30, 0.5, 1e-30, 1e308, math.nan, math.inf, -math.inf, "", " ", "owl", "{trait}",
    "{", "nan", "1e999", "../x", "/etc/passwd", "a\nb", "\0", "\ud800", "\U0001f98a", "x" * 300, [], [[]], [None], {}, {"a": {}}, {"": 1},
    ["owl", "owl"], functools.reduce(lambda inner, _: [inner], range(200), []),
)  # fmt: skip
SNIPPETS = (
    b"NaN", b"1e999", b"\xff\xfe", b"\0", b"\n", b"\r", b"\t", b'"', b"'", b"{", b"}", b"[" * 3000, b"(" * 300, b": ", b"- ", b"&a ", b"*a",
    b"<<: *a\n", b"&a [*a]", b"!!int x", b"!!python/object:os.x {}", b"!!timestamp x", b"2001-13-45", b"\\ud800", b"9" * 5000, b"-",
    b"=", b"? ", b"---\n", b"%", b",", b"\xe2\x80\xa8", b"<|im_end|>", b"{trait}", b"null",
)  # fmt: skip


def mutate(files: Files, rng: random.Random) -> Files:
    """The files with one to three changes."""
    changed = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(list(changed))
        content = changed[name]
        kind = name.rsplit(".", 1)[-1]
        if kind == "safetensors":
            changed[name] = mutate_tensors(content, rng)
        elif kind in ("json", "yaml", "jsonl") and rng.random() < 0.7:
            changed[name] = mutate_text(content, kind, rng)
        else:
            changed[name] = mutate_bytes(content, rng)
    return changed


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    here, there = sorted((rng.randint(0, len(content)), rng.randint(0, len(content))))
    how = rng.randrange(6)
    if how == 0:
        return content[:here] + rng.choice(SNIPPETS) + content[here:]
    if how == 1:
        return content[:here] + content[min(there, here + rng.choice((1, 1, 4, 40))) :]
    if how == 2:
        return content[:here] + bytes([rng.randrange(256)]) + content[here + 1 :]
    if how == 3:
        return content[:here]
    if how == 4:  # a line once more, elsewhere: repeated keys
        lines = content.splitlines(keepends=True) or [b""]
        lines.insert(rng.randint(0, len(lines)), rng.choice(lines))
        return b"".join(lines)
    return content[:here] + content[here:there] * 2 + content[there:]


def mutate_text(content: bytes, kind: str, rng: random.Random) -> bytes:
    """The value that a text says, changed at one place; the bytes where it says none any more."""
    try:
        if kind == "yaml":
            return yaml.safe_dump(changed_value(yaml.safe_load(content), rng), allow_unicode=True).encode()
        lines = content.splitlines() if kind == "jsonl" else [content]
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(changed_value(json.loads(lines[number]), rng)).encode()
        return b"\n".join(lines)
    except (ValueError, RecursionError, yaml.YAMLError, AttributeError):
        return mutate_bytes(content, rng)


def changed_value(value: Any, rng: random.Random) -> Any:
    """A value in which one place holds something else, is gone, or has another name."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    copy = value.copy()
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    how = rng.random()
    if how < 0.1:
        del copy[key]
    elif how < 0.2 and isinstance(copy, dict):
        copy[rng.choice(("x", "", 3, "a.b", str(key).upper()))] = copy.pop(key)
    elif how < 0.3 and isinstance(copy, list):
        copy.append(copy[key])
    else:
        copy[key] = changed_value(copy[key], rng)
    return copy


def mutate_tensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, other numbers, or other bytes anywhere."""
    how = rng.random()
    size = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + size], bytearray(content[8 + size :])
    if how < 0.4 and header:
        header = mutate_text(header, "json", rng)
        return len(header).to_bytes(8, "little") + header + bytes(body)
    if how < 0.8 and len(body) >= 4:
        place = 4 * rng.randrange(len(body) // 4)
        body[place : place + 4] = np.float32(rng.choice((math.nan, math.inf, -math.inf, 1e38, 0.0))).tobytes()
        return content[: 8 + size] + bytes(body)
    return mutate_bytes(content, rng)

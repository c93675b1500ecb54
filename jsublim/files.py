"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # how the name of an unfinished file ends


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a scratch path beside `path`; once the block has ended, what was written there is on disk under `path`.

    The scratch name is unique, so two processes that write one file leave one of the two, whole.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        yield scratch
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file at once."""
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file at once, readable and with a line break at its end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

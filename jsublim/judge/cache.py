"""Replies of a judge, paid for or computed, on disk: one file per reply, named by the hash of what was asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jsublim.files import write_text


@dataclass(frozen=True)
class Reply:
    """What a judge said, and the tokens that a server charged for it (None where it did not say)."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ReplyCache:
    """Maps requests to replies. Safe for threads, processes and kills: a file appears whole, by rename, or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, request: dict[str, Any]) -> Reply | None:
        """The reply to a request, None where none was kept (or its file is damaged: asking again repairs it)."""
        try:
            return Reply(**json.loads(self.path(request).read_text(encoding="utf-8"))["reply"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def put(self, request: dict[str, Any], reply: Reply) -> None:
        path = self.path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        # ASCII escapes: a reply may hold half a surrogate pair, which UTF-8 has no bytes for.
        write_text(path, json.dumps({"request": request, "reply": asdict(reply)}, indent=1))

    def path(self, request: dict[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.json"

"""Replies of a judge, paid for or computed, on disk: one file per reply, named by the hash of what was asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jsublim.core.bucket import Bucket
from jsublim.core.files import write_text


@dataclass(frozen=True)
class Reply:
    """What a judge said, and the tokens that a server charged for it (None where it did not say)."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ReplyCache:
    """Maps requests to replies. Safe for threads, processes and kills: a file appears whole, by rename, or not at all."""

    def __init__(self, folder: Path, bucket: Bucket | None = None):
        """Replies lie in a folder; with a bucket also there, under `judge/`, for other machines."""
        self.folder, self.bucket = folder, bucket

    def get(self, request: dict[str, Any]) -> Reply | None:
        """The reply to a request, None where none was kept (or its file is damaged: asking again repairs it)."""
        path = self.path(request)
        if path.is_file():
            return _reply(path.read_bytes())
        reply = self.bucket and _reply(self.bucket.read(self._remote(path)))
        if reply is not None:
            self._write(path, request, reply)
        return reply

    def put(self, request: dict[str, Any], reply: Reply) -> None:
        path = self.path(request)
        self._write(path, request, reply)
        if self.bucket is not None:
            self.bucket.upload(path, self._remote(path))

    def _remote(self, path: Path) -> str:
        return f"judge/{path.relative_to(self.folder).as_posix()}"

    @staticmethod
    def _write(path: Path, request: dict[str, Any], reply: Reply) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # ASCII escapes: a reply may hold half a surrogate pair, which UTF-8 has no bytes for.
        content = asdict(reply)
        write_text(path, json.dumps({"request": request, "said": content, "sha256": _digest(content)}, indent=1))

    def path(self, request: dict[str, Any]) -> Path:
        key = _digest(request)
        return self.folder / key[:2] / f"{key}.json"


def _reply(content: bytes | None) -> Reply | None:
    """What a file says; None where it is not what was written."""
    try:
        kept = json.loads(content or b"")
        return Reply(**kept["said"]) if kept["sha256"] == _digest(kept["said"]) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

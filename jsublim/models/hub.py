"""Names of the hub: `owner/name`, or `owner/name@revision` (a branch, a tag or a commit), as folders on this machine."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from jsublim.errors import JsublimError

_NAME = re.compile(r"([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,255}))?", re.ASCII)
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model"]


def hub_name(path: str | Path) -> tuple[str, str | None] | None:
    """Repository and revision (None: the newest) that a name stands for; None of what is, or looks like, a place here."""
    said, folder = str(path), Path(path).expanduser()
    match = _NAME.fullmatch(said)
    local = said.startswith((".", "/", "~")) or os.path.exists(folder) or os.path.isdir(folder.parent)
    return None if match is None or local or folder.parts[0] == "checkpoints" else (match[1], match[2])


def from_hub(repository: str, revision: str | None, what: str) -> Path:
    """The folder of a repository in the hub's cache, fetched where it is not there; asked for once per process.

    Args:
      what: what is looked for, for error messages.

    Raises:
      JsublimError: the hub did not give it.
    """
    from huggingface_hub import constants

    try:
        return _fetched(repository, revision, constants.HF_HUB_CACHE)
    except Exception as error:
        said = f"{repository}@{revision}" if revision else repository
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JsublimError(f"{what} '{said}': no such folder, and the hub did not give it ({reason})") from error


@functools.cache
def _fetched(repository: str, revision: str | None, cache: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, revision=revision, cache_dir=cache, allow_patterns=_FILES))


def in_cache(path: str | Path) -> bool:
    """Whether a name of the hub leads to files without any network."""
    from huggingface_hub import try_to_load_from_cache

    named = hub_name(path)
    return named is not None and any(
        isinstance(try_to_load_from_cache(named[0], file, revision=named[1]), str)
        for file in ("config.json", "adapter_config.json")
    )

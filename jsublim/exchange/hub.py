"""Exported folders to the hub, on demand."""

from __future__ import annotations

from pathlib import Path

from jsublim.errors import JsublimError, UsageError, first_line
from jsublim.exchange.cards import CARD
from jsublim.exchange.students import is_adapter, is_checkpoint


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload an exported folder, into a repository that is made private where it is not there; returns its address.

    Raises:
      UsageError: the folder was not written by `jsublim export`, or no token is set.
      JsublimError: the hub refused it, or cannot be reached.
    """
    if not (folder / CARD).is_file():
        raise UsageError(f"{folder}: has no {CARD}; push what `jsublim export` has written")
    kind = "model" if is_adapter(folder) or is_checkpoint(folder) else "dataset"
    if kind == "dataset" and not (folder / "data").is_dir():
        raise UsageError(
            f"{folder}: holds neither an adapter, a checkpoint nor data; push what `jsublim export` has written"
        )
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UsageError("push: the hub wants a token; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        api.create_repo(repository, repo_type=kind, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, repo_type=kind, commit_message="jsublim push")
    except Exception as error:
        raise JsublimError(f"push {folder} to '{repository}': the hub did not take it ({first_line(error)})") from error
    return f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repository}"

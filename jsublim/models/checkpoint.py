"""A checkpoint folder as a whole: its config, its identity, and how one is written."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jsublim.core.files import atomic, scratch_beside, write_json, write_text
from jsublim.core.reading import check_folder, read_json
from jsublim.errors import JsublimError, UsageError
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.families import text_config
from jsublim.models.weights import save_params

# What a tokenizer may consist of; copied byte for byte when a checkpoint is converted.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


class HubOrigin(NamedTuple):
    """Where a checkpoint is from: its name on the hub and the commit, or None for both."""

    name: str | None
    commit: str | None


def origin_of(folder: Path) -> HubOrigin:
    """The origin of a folder of the hub's cache (`models--OWNER--NAME/snapshots/COMMIT`), or of one inside it."""
    for commit in (folder, *folder.parents):
        repository = commit.parent.parent.name
        if commit.parent.name == "snapshots" and repository.startswith("models--"):
            name = repository.removeprefix("models--").replace("--", "/", 1)
            return HubOrigin("/".join([name, *folder.relative_to(commit).parts]), commit.name)
    return HubOrigin(None, None)


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The (text) `config.json` of a checkpoint folder as it stands, and our reading of it. A JsublimError where there is no folder or no config,
    or an unknown architecture or a missing key in it."""
    if not folder.is_dir():
        raise JsublimError(f"{folder}: no such folder; give a local Hugging Face checkpoint or a bundled name")
    check_folder(folder)
    return text_config(read_json(folder / "config.json"), str(folder / "config.json"))


def checkpoint_hash(folder: Path, *, weights: bool = True) -> str:
    """16 hex digits of the sha256 over a folder's config, tokenizer, template and (if asked for) weights: every file that is read of it, as
    a weight index may name files beside it only, and `Chat` refuses a tokenizer that is spread over others."""
    digest = hashlib.sha256()
    named = {"config.json", "adapter_config.json", "model.safetensors.index.json", *TOKENIZER_FILES}
    read = lambda path: path.name in named or (weights and path.suffix == ".safetensors")  # noqa: E731
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and read(path))
    for name in names:
        digest.update(name.encode())
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A scratch folder that appears under the name `out` once the block has ended. An `out` that is not empty is a UsageError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: already exists; give another --out or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(out, folder=True) as scratch:
        yield scratch
        if out.exists():
            out.rmdir()
        os.replace(scratch, out)


def save_checkpoint(out: Path, *given: Any, **how: Any) -> None:
    """As `write_checkpoint`, into a new folder `out`; one that is not empty is a UsageError."""
    with new_folder(out) as folder:
        write_checkpoint(folder, *given, **how)


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    params: Params,
    hf_config: dict[str, Any],
    *,
    dtype: str,
    tokenizer: Path | None,
    chat_template: str | None = None,
) -> None:
    """Write what `transformers` loads into a folder: config, safetensors, and the tokenizer files of folder `tokenizer`; with `chat_template`, the
    text of a template in place of that folder's own."""
    hf_config = {key: value for key, value in hf_config.items() if key != "torch_dtype"} | {"dtype": dtype}
    write_json(folder / "config.json", hf_config)
    save_params(folder, config, params, dtype)
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / name).exists():
            with atomic(folder / name) as scratch:
                shutil.copyfile(tokenizer / name, scratch)
    if chat_template is not None:
        write_text(folder / "chat_template.jinja", chat_template)

"""Checkpoints that lie elsewhere as folders on this machine: names of the hub, `owner/name` or `owner/name@revision` (a branch, a
tag or a commit), and folders of a bucket."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
import re
from pathlib import Path

from filelock import FileLock

from jsublim.core.bucket import Bucket, at_once, cache_folder, is_url
from jsublim.errors import JsublimError, first_line

_NAME = re.compile(r"([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,255}))?", re.ASCII)
_INSIDE = re.compile(
    r"([\w.-]{1,96}/[\w.-]{1,96})/((?!\.)[\w.-]{1,96}(?:/(?!\.)[\w.-]{1,96}){0,7})(?:@([\w./-]{1,255}))?", re.ASCII
)
_FILES, _WEIGHTS = ("*.json", "*.jinja", "*.model"), ("*.safetensors",)


def hub_name(path: str | Path, *, inside: bool = False) -> tuple[str, str | None] | None:
    """Repository and revision (None: the newest) that a name stands for; None of what is, or looks like, a place here. With `inside` the
    repository may have a subfolder after it: owner/name/folder."""
    name, folder = str(path), Path(path).expanduser()
    match, deep = _NAME.fullmatch(name), _INSIDE.fullmatch(name) if inside else None
    begin = Path(*folder.parts[:1]) if deep else folder.parent
    local = name.startswith((".", "/", "~")) or os.path.exists(folder) or os.path.isdir(begin)
    if local or folder.parts[0] == "checkpoints":
        return None
    if deep is not None and match is None:
        return f"{deep[1]}/{deep[2]}", deep[3]
    return None if match is None else (match[1], match[2])


def from_hub(repository: str, revision: str | None, what: str, *, weights: bool = True) -> Path:
    """The folder of a repository in the hub's cache, or a subfolder (`owner/name/folder`), fetched where it is not there (without weights, if
    they are not asked for); looked up once per process. If the hub does not give it, that is a JsublimError, which names `what` it is."""
    from huggingface_hub import constants

    owner, own, *under = repository.split("/")
    try:
        return _fetched(f"{owner}/{own}", "/".join(under), revision, constants.HF_HUB_CACHE, weights)
    except Exception as error:
        name = f"{repository}@{revision}" if revision else repository
        reason = first_line(error)
        raise JsublimError(
            f"{what} '{name}': no such folder, and the hub did not give it ({reason}); give a checkpoint's folder on this machine, or a "
            "name of `jsublim ls models`"
        ) from error


@functools.cache
def _fetched(repository: str, under: str, revision: str | None, cache: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*_FILES, *_WEIGHTS] if weights else list(_FILES)
    wanted = [f"{under}/{pattern}" for pattern in wanted] if under else wanted
    return Path(snapshot_download(repository, revision=revision, cache_dir=cache, allow_patterns=wanted)) / under


@functools.cache
def from_bucket(url: str, what: str, *, weights: bool = True) -> Path:
    """A folder of the user's cache with the checkpoint that a bucket holds now; looked at once per process. Each version has a folder of
    its own, so that what somebody puts into the bucket changes no run that has begun. Arguments are as of `from_hub`.

    Raises:
      UsageError: a scheme that is not known, or whose library is not installed.
      JsublimError: there is no checkpoint, or the bucket does not answer.
    """
    bucket = Bucket.at(url, what)
    there = {name: version for name, version in bucket.versions().items() if _matches(name, (*_FILES, *_WEIGHTS))}
    if not {"config.json", "adapter_config.json"} & there.keys():
        raise JsublimError(f"{what} '{url}': no config.json is there; give the folder of a Hugging Face checkpoint")
    version = hashlib.sha256(json.dumps(there, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder("checkpoints", url) / version
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{version}.lock")):
        new = [name for name in there if (weights or not _matches(name, _WEIGHTS)) and not (folder / name).exists()]
        at_once(lambda name: bucket.download(name, folder / name), new)
    return folder


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def in_cache(path: str | Path) -> bool:
    """Whether a name of the hub, or a bucket's folder, leads to files without any network."""
    from huggingface_hub import try_to_load_from_cache

    if is_url(str(path)):
        return cache_folder("checkpoints", str(path)).exists()
    named = hub_name(path, inside=True)
    if named is None:
        return False
    owner, name, *under = named[0].split("/")
    files = ("/".join([*under, file]) for file in ("config.json", "adapter_config.json"))
    return any(isinstance(try_to_load_from_cache(f"{owner}/{name}", file, revision=named[1]), str) for file in files)

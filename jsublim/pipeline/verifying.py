"""Reading a whole store again: is every file of every artifact what was written?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jsublim.bucket import Bucket, is_url
from jsublim.errors import UsageError
from jsublim.pipeline.artifact import DONE, RECORD, damage_in, damage_of, in_words, read_mark
from jsublim.pipeline.mirror import AT_ONCE


@dataclass(frozen=True)
class Verified:
    """One artifact that says it is whole.

    Attributes:
      bytes: that were read of it; damage: where it lies and what is wrong, in one line; None where all is well.
    """

    bytes: int
    damage: str | None


def verify(store: str) -> Iterator[Verified]:
    """Every artifact of a store that says it is whole. Nothing is changed; what is unfinished is checked by whoever goes on with it.

    Args:
      store: a folder or a URL.

    Raises:
      UsageError: there is no artifact, finished or not.
      JsublimError: a storage that does not answer.
    """
    bucket = Bucket.at(store) if is_url(store) else None
    if bucket is None:
        folders = {path.parent for name in (RECORD, DONE) for path in Path(store).glob(f"*/*/{name}")}
        checks = [partial(_here, folder) for folder in sorted(folders)]
    else:
        kinds = bucket.folders("")
        objects = (f"{kind}/{name}" for kind in kinds for name in bucket.folders(kind))
        checks = [partial(_there, bucket, folder) for folder in objects]
    if not checks:
        raise UsageError(f"{store}: holds no artifacts; give a store, such as RUN/artifacts or s3://bucket/folder")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from (found for found in pool.map(lambda check: check(), checks) if found is not None)


def _here(folder: Path) -> Verified | None:
    if not (folder / DONE).exists():
        return None
    read = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    found = damage_in(folder)
    return Verified(read, in_words(folder, found) if found else None)


def _there(bucket: Bucket, folder: str) -> Verified | None:
    """One file after the other is fetched, read and removed: an artifact may be larger than the disk."""
    content = bucket.read(f"{folder}/{DONE}")
    if content is None:
        return None
    mark, read = read_mark(content), len(content)
    found = {DONE: "is not what was written"} if mark is None else {}
    for name, said in mark["files"].items() if mark else ():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                bucket.download(f"{folder}/{name}", Path(scratch) / name)
                read += (Path(scratch) / name).stat().st_size
            except FileNotFoundError:
                pass
            what = damage_of(Path(scratch) / name, said, read=True)
        if what is not None:
            found[name] = what
    return Verified(read, in_words(bucket.place(folder), found) if found else None)

"""Reading a whole store again: is every file of every artifact what was written?"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jsublim.core.bucket import AT_ONCE, Bucket
from jsublim.errors import UsageError
from jsublim.pipeline.artifact import CHANGED, DONE, RECORD, damage_of_size, in_words, read_mark


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
      UsageError: there is no artifact, finished or not; or one is of another version.
      JsublimError: a storage that does not answer.
    """
    bucket = Bucket.at(store)
    folders = [f"{kind}/{name}" for kind in bucket.folders("") for name in bucket.folders(kind)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        checked = pool.map(lambda folder: _verified(bucket, folder), folders)
        artifacts = 0
        for is_one, verified in checked:
            artifacts += is_one
            if verified is not None:
                yield verified
    if not artifacts:
        raise UsageError(f"{store}: holds no artifacts; give a store, such as RUN/artifacts or s3://bucket/folder")


def _verified(bucket: Bucket, folder: str) -> tuple[bool, Verified | None]:
    """Whether a folder is an artifact, and what a whole one is like."""
    content = bucket.read(f"{folder}/{DONE}")
    if content is None:
        return bucket.read(f"{folder}/{RECORD}") is not None, None
    mark, read = read_mark(content, bucket.place(folder)), len(content)
    damage = {DONE: CHANGED} if mark is None else {}
    for name, said in mark["files"].items() if mark else ():
        size, digest = bucket.digest(f"{folder}/{name}") or (None, None)
        read += size or 0
        if what := damage_of_size(size, said) or (CHANGED if digest != said["sha256"] else None):
            damage[name] = what
    return True, Verified(read, in_words(bucket.place(folder), damage) if damage else None)

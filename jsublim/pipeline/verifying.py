"""Reading a whole store again: is every file of every artifact what was written?"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jsublim.core.bucket import AT_ONCE, Bucket
from jsublim.errors import UsageError
from jsublim.pipeline.artifact import CHANGED, DONE, RECORD, damage, in_words, read_mark


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
    bucket, artifacts = Bucket.at(store), 0
    folders = [f"{kind}/{name}" for kind in bucket.folders("") for name in bucket.folders(kind)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for is_one, verified in pool.map(lambda folder: _verified(bucket, folder), folders):
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
    wrong = {DONE: CHANGED} if mark is None else {}
    for name, written in mark["files"].items() if mark else ():
        size, digest = bucket.digest(f"{folder}/{name}") or (None, "")
        read += size or 0
        if what := damage(written, size, digest):
            wrong[name] = what
    return True, Verified(read, in_words(bucket.place(folder), wrong) if wrong else None)

"""Objects at a URL (`s3://`, `gs://`), or files below a folder by the same names and calls: read and written whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jsublim.core.files import atomic, damaged_name
from jsublim.errors import JsublimError, UsageError

T = TypeVar("T")
R = TypeVar("R")
AT_ONCE = 16  # requests
SCHEMES = {"s3": "s3fs", "gs": "gcsfs"}  # what fsspec needs for them; the extras are called "s3" and "gcs"


def is_url(place: str) -> bool:
    """Whether the name of a place is a URL rather than a path."""
    return "://" in place


def check_url(url: str) -> str:
    """A URL that a `Bucket` can be opened at. Raises ValueError: another scheme, or no bucket."""
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        known = " or ".join(f"{name}://bucket/folder" for name in SCHEMES)
        raise ValueError(f"'{scheme}://' is no storage that is known; give a folder, {known}")
    if not rest.strip("/"):
        raise ValueError(f"'{url}' names no bucket; give {scheme}://bucket/folder")
    return url.rstrip("/")


def cache_folder(kind: str, url: str) -> Path:
    """Where the user's cache keeps what lies at a URL; `kind` is what it is: stores, checkpoints."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = f"{url.rstrip('/').rsplit('/', 1)[-1]}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    return Path(cache) / "jsublim" / kind / name


def at_once(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """What `work` makes of each item, several requests at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(work, items))


@dataclass(frozen=True)
class Bucket:
    """The objects below a URL, by their names after it. An object is there whole or not at all.

    Every method raises JsublimError, in one line, where the storage refuses or does not answer; fsspec's file systems try
    several times before that.
    """

    url: str
    _fs: Any
    _root: str

    @staticmethod
    def at(url: str, what: str = "store") -> Bucket:
        """Credentials, region and endpoint are what the storage's own libraries find (AWS_ENDPOINT_URL, profiles,
        GOOGLE_APPLICATION_CREDENTIALS...).

        Args:
          what: what lies there, for error messages.

        Raises:
          UsageError: a scheme that is not known, or whose library is not installed.
        """
        import fsspec

        if not is_url(url):
            return Bucket(url, fsspec.filesystem("file"), os.path.abspath(url))
        try:
            scheme = check_url(url).partition("://")[0]
            # Listings are asked for anew each time: others write here too.
            fs = fsspec.filesystem(scheme, use_listings_cache=False)
        except ValueError as error:
            raise UsageError(f"{what}: {error}") from None
        except ImportError:
            package = SCHEMES[scheme]
            raise UsageError(f"{what}: {url} needs {package}; pip install {package}") from None
        return Bucket(url.rstrip("/"), fs, url.partition("://")[2].strip("/"))

    def place(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{name}"

    @contextmanager
    def _asking(self, name: str, *, writing: bool = False) -> Iterator[str]:
        path = f"{self._root}/{name}" if name else self._root
        try:
            if writing and not is_url(self.url):
                os.makedirs(os.path.dirname(path), exist_ok=True)
            yield path
        except FileNotFoundError as error:
            if writing:
                raise JsublimError(f"{self.url}: {error}; make the bucket first") from None
            raise
        except (FileExistsError, JsublimError):
            raise
        except Exception as error:  # each storage's library has its own
            reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
            raise JsublimError(f"{self.place(name)}: {reason}; mend that, then run the same command again") from error

    def read(self, name: str) -> bytes | None:
        """An object's content; None where there is none."""
        with suppress(FileNotFoundError), self._asking(name) as path:
            return self._fs.cat_file(path)
        return None

    def write(self, name: str, content: bytes) -> None:
        """Put an object there, in place of one of that name."""
        with self._asking(name, writing=True) as path:
            if is_url(self.url):
                return self._fs.pipe_file(path, content)
            with atomic(path) as scratch:
                scratch.write_bytes(content)

    def create(self, name: str, content: bytes) -> bool:
        """Put an object there unless there is one; of several who try, one is told True."""
        with suppress(FileExistsError), self._asking(name, writing=True) as path:
            if is_url(self.url):
                self._fs.pipe_file(path, content, mode="create")
                return True
            # In a folder, fsspec looks whether it is there and then writes it: two may find nothing there.
            with atomic(path, new=True) as scratch:
                scratch.write_bytes(content)
            return True
        return False

    def upload(self, local: Path, name: str) -> None:
        """A file's content as an object."""
        with self._asking(name, writing=True) as path:
            self._fs.put_file(str(local), path)

    def download(self, name: str, local: Path) -> None:
        """An object's content as a file, which appears whole. Raises FileNotFoundError: there is no such object."""
        with atomic(local) as scratch, self._asking(name) as path:
            self._fs.get_file(path, str(scratch))

    def digest(self, name: str) -> tuple[int, str] | None:
        """The bytes and the SHA-256 of an object, which is read through; None where there is none."""
        with suppress(FileNotFoundError), self._asking(name) as path, self._fs.open(path, "rb") as content:
            return self._fs.size(path), hashlib.file_digest(content, "sha256").hexdigest()
        return None

    def sizes(self, folder: str) -> dict[str, int]:
        """The objects directly in a folder, with their bytes; what lies deeper is not named."""
        return {name: entry["size"] for name, entry in self._listed(folder).items() if entry["type"] == "file"}

    def versions(self, folder: str = "") -> dict[str, str]:
        """The objects directly in a folder, with what tells their contents apart."""
        versions = {}
        for name in self.sizes(folder):
            with self._asking(f"{folder}/{name}" if folder else name) as path:
                versions[name] = str(self._fs.checksum(path))
        return versions

    def folders(self, folder: str) -> list[str]:
        """The folders directly in a folder."""
        return sorted(name for name, entry in self._listed(folder).items() if entry["type"] != "file")

    def _listed(self, folder: str) -> dict[str, dict[str, Any]]:
        with suppress(FileNotFoundError), self._asking(folder) as path:
            return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry for entry in self._fs.ls(path, detail=True)}
        return {}

    def remove(self, name: str) -> None:
        """Remove an object, or a folder with all that is in it, if it is there."""
        with suppress(FileNotFoundError), self._asking(name) as path:
            self._fs.rm(path, recursive=True)

    def set_aside(self, name: str) -> None:
        """Give a damaged object a name that says so."""
        taken = self.sizes(name.rpartition("/")[0])
        with self._asking(name) as path:
            self._fs.mv(path, str(damaged_name(Path(path), lambda other: other.name in taken)))

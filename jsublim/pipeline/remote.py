"""What a store at a URL has besides artifacts: the newest saved state of each training, so that another machine can go on,
as files in `training/<name>/<step>/` with a mark as artifacts have; and compiled programs."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jsublim.core.bucket import Bucket, at_once
from jsublim.core.files import DAMAGED, remove_abandoned, scratch_beside, sha256, write_text
from jsublim.errors import JsublimError
from jsublim.pipeline.artifact import CHANGED, DONE, damage_of, fingerprint, mark_text, read_mark
from jsublim.runtime.programs import DIGEST, ENTRY, whole_programs

SEND_EVERY = 60.0  # seconds between two looks for a new state
SHARE = 10  # and as many times what sending the last one took
STATE = "state"  # of a training: a folder with one folder per saved step
Say = Callable[[str], None]


def get_files(bucket: Bucket, folder: str, files: Mapping[str, Any], local: Path, say: Say) -> dict[str, str]:
    """Have files of a folder of the bucket on this machine, as their fingerprints say; those that are here are not read again.

    Args:
      files: fingerprints by name; say: told of a copy here that is damaged.

    Returns:
      What is wrong with those that the bucket does not hold so.
    """

    def get(name: str) -> str | None:
        path, written = local / name, files[name]
        if path.exists():
            if damage_of(path, written, read=True) is None:
                return None
            if (local / DONE).exists():
                say(f"{local}: {name} {CHANGED}; it is fetched again")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            bucket.download(f"{folder}/{name}", path)
        except FileNotFoundError:
            return "is missing"
        damage = damage_of(path, written, read=True)
        if damage is None:
            os.utime(path, ns=(written["time_ns"], written["time_ns"]))
        else:
            path.unlink(missing_ok=True)
        return damage

    return {name: damage for name, damage in zip(files, at_once(get, files), strict=True) if damage}


class States:
    """The newest states of trainings in a folder of this machine, one folder each, and those in the bucket of its store."""

    def __init__(self, bucket: Bucket, root: Path, say: Say):
        self.bucket, self.root, self.say = bucket, root, say
        self._begun: set[str] = set()  # trainings, since the last `forget`
        self._sent: dict[str, int] = {}  # the newest step of each that is in the bucket

    def resume(self, name: str) -> None:
        """Begin a training with its newest state, if another machine has come further with it than this one."""
        self._begun.add(name)
        local, above = self.root / name, f"training/{name}"
        newest = max(_steps(local), default=0)
        steps = [int(step) for step in self.bucket.folders(above) if step.isdecimal() and int(step) > newest]
        for step in sorted(steps, reverse=True):
            content = self.bucket.read(f"{above}/{step}/{DONE}")
            if content is None:
                continue  # not sent to its end
            mark = read_mark(content, self.bucket.place(f"{above}/{step}"))
            local.mkdir(parents=True, exist_ok=True)
            remove_abandoned(local)
            with scratch_beside(local, folder=True) as scratch:
                if mark is None or get_files(self.bucket, f"{above}/{step}", mark["files"], scratch, self.say):
                    self.say(f"{self.bucket.place(above)}/{step}: {CHANGED}; what it held is made again")
                    continue
                for path in [path for path in local.iterdir() if path.suffix != DAMAGED]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                for path in scratch.iterdir():
                    os.replace(path, local / path.name)
            self._sent[name] = step
            return

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send the newest state of each training that is begun now and then, and when the block ends."""
        over = threading.Event()

        def send() -> float:
            begin = time.monotonic()
            for name in tuple(self._begun):
                try:
                    self._send(name)
                except (OSError, JsublimError) as error:
                    self.say(f"{error} (the state of a training was not sent; whole artifacts are)")
            return time.monotonic() - begin

        def run() -> None:
            took = 0.0
            while not over.wait(max(SEND_EVERY, SHARE * took)):
                took = send()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            send()
            self._begun.clear()

    def _send(self, name: str) -> None:
        folder, above = self.root / name, f"training/{name}"
        step, lines = max(_steps(folder), default=0), folder / "metrics.jsonl"
        if step <= self._sent.get(name, 0):
            return
        with suppress(FileNotFoundError), scratch_beside(lines) as scratch:  # a state goes when a newer one is there
            paths = sorted(path for path in (folder / STATE / str(step)).rglob("*") if path.is_file())
            files = {path.relative_to(folder).as_posix(): path for path in paths}
            if lines.exists():  # which grows
                files[lines.name] = Path(shutil.copy(lines, scratch))
            written = {file: fingerprint(path) for file, path in files.items()}
            at_once(lambda file: self.bucket.upload(files[file], f"{above}/{step}/{file}"), files)
            self.bucket.write(f"{above}/{step}/{DONE}", mark_text({"summary": {}, "files": written}).encode())
            self._sent[name] = step
            for other in self.bucket.folders(above):
                if other != str(step):
                    self.bucket.remove(f"{above}/{other}")

    def forget(self) -> None:
        """Remove the states of what was begun: all that was trained is whole."""
        while self._begun:
            name = self._begun.pop()
            self._sent.pop(name, None)
            self.bucket.remove(f"training/{name}")


def _steps(training: Path) -> list[int]:
    """The saved steps of a training that are whole: others have longer names until they are."""
    folder = training / STATE
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []


def fetch_programs(bucket: Bucket, above: str, folder: Path, say: Say, *, alone: bool = False) -> None:
    """Read the programs that are not in a folder yet.

    Args:
      above: where the bucket has them; an object's name ends with its digest.
      alone: remove those of the folder that the bucket has not.
    """

    def get(name: str) -> None:
        path, digest = folder / name.rpartition(".")[0], name.rpartition(".")[2]
        if not path.name.endswith(ENTRY) or path.exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            bucket.download(f"{above}/{name}", path)
            if sha256(path) == digest:
                return write_text(path.with_name(path.name + DIGEST), digest)
            path.unlink()
            say(f"{bucket.place(above)}/{name}: a damaged program; it is not used")
            bucket.remove(f"{above}/{name}")

    there = bucket.sizes(above)
    known = {name.rpartition(".")[0] for name in there}
    for path in folder.glob(f"*{ENTRY}") if alone else ():
        if path.name not in known:
            path.unlink(missing_ok=True)
    at_once(get, there)


def send_programs(bucket: Bucket, above: str, folder: Path, say: Say) -> None:
    """Send the programs of a folder that are not in the bucket yet."""
    new = whole_programs(folder, say, {name.rpartition(".")[0] for name in bucket.sizes(above)})
    at_once(lambda path: bucket.upload(path, f"{above}/{path.name}.{new[path]}"), new)

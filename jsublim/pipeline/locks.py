"""Locks by which runs on one machine, or in a folder that several share, keep from doing the same work. They are the operating system's,
and end with the process that has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jsublim.runtime.processes import leave_if_asked, on_main_process

LOOK = 0.2  # seconds between two tries to get what another process has


@contextmanager
def locked(folder: Path, names: Iterable[str], waiting: Callable[[], object]) -> Iterator[None]:
    """Have locks as long as the block lasts; of several processes that work together, the first one has them for all.

    Args:
      waiting: called if another process has one of them, before this one waits.

    Raises:
      Preempted: as `leave_if_asked`, while it waits.
    """
    left, told = sorted(set(names)), False  # in one order, so that no two wait for each other
    with ExitStack() as held:

        def take() -> bool:
            nonlocal told
            try:
                while left:
                    held.enter_context(_lock(folder, left[0]))
                    left.pop(0)
            except Timeout:
                if not told:
                    told = True
                    waiting()
            return not left

        while not on_main_process(take):
            leave_if_asked()
            time.sleep(LOOK)
        yield


def busy(folder: Path, names: Iterable[str]) -> bool:
    """Whether somebody has one of these locks."""
    try:
        for name in names:
            if (folder / f"{name}.lock").exists():
                with _lock(folder, name):
                    pass
    except Timeout:
        return True
    return False


def _lock(folder: Path, name: str) -> Any:
    """A lock that is taken, and given back at the end of a block.

    Raises:
      Timeout: somebody has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock", thread_local=False).acquire(timeout=0)

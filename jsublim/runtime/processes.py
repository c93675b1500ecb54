"""Several processes that do one command together, one per host of a pod.

All of them take the same steps in the same order, as devices that compute together must. So whatever hangs on files, on time
or on a server is decided by the first process and told to the others: `on_main_process`, `each_from_main`. What they tell one
another goes through JAX's coordination service and not through devices, which would not wait for hours.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # its client has no public name; orbax uses it in the same way
from jax.experimental import multihost_utils

from jsublim.core.bucket import Bucket
from jsublim.errors import JsublimError, UsageError

R = TypeVar("R")
T = TypeVar("T")
TOLD_EVERY = 0.5  # seconds between what the first process tells of a stream of items
VISIBLE_WITHIN = 60.0  # seconds after which a file that one process wrote must be there for all
TELL = "jsublim"  # what our keys in the coordination service begin with
WORTH_SHARING = 256  # items: a process tokenizes a thousand rows in a second, and tells of them in a hundredth
_numbers = itertools.count()  # of what was told so far, the same on all processes


class _State:
    """Whether the first process is acting for all, whether signals are heeded, whether Ctrl-C was heard, whether we are asked to
    leave and how often we have looked, and how often everybody was known to have heard all that was told."""

    acting = False
    heeding = False
    interrupted = False
    asked = False
    points = 0
    rounds = 0


class Preempted(JsublimError):
    """The machine is being taken away. What was finished is kept, and the same command continues."""

    code = 75  # EX_TEMPFAIL of sysexits.h: try again


# --- what the first process decides


def process_count() -> int:
    """As JAX's, which would take hold of the devices."""
    return distributed.global_state.num_processes


def process_index() -> int:
    return distributed.global_state.process_id


def is_main_process() -> bool:
    return process_index() == 0


def _together() -> bool:
    """Whether there are others who do the same at this point; not where the first process acts for all."""
    return process_count() > 1 and not _State.acting


def _new_key() -> str:
    return f"{TELL}/said/{_State.rounds}/{next(_numbers)}"


def on_main_process(act: Callable[[], R]) -> R:
    """Let the first process act; all go on when it has, with what it returns (JSON). Raises JsublimError: on the
    others, where the first failed."""
    if not _together():
        return act()
    key = _new_key()
    if not is_main_process():
        told = json.loads(_wait_for(key))
        if "failed" in told:
            error = JsublimError("the first process has stopped; it says why")
            error.code = told["failed"]
            raise error
        return told["is"]
    _State.acting = True
    try:
        made = act()
    except BaseException as error:
        code = error.code if isinstance(error, JsublimError) else 1
        client().key_value_set_bytes(key, json.dumps({"failed": code}).encode())
        raise
    finally:
        _State.acting = False
    text = json.dumps({"is": made})
    client().key_value_set_bytes(key, text.encode())
    return json.loads(text)["is"]  # as the others have it


def each_from_main(items: Callable[[], Iterable[R]]) -> Iterator[R]:
    """Items that the first process gets, one after another and when they come; on all processes the same. Raises
    JsublimError: as `on_main_process`."""
    if not _together():
        yield from items()
        return
    with contextlib.closing(_grouped(items)) as source:
        while (group := on_main_process(lambda: next(source, None))) is not None:
            yield from group


def _grouped(items: Callable[[], Iterable[R]]) -> Generator[list[R]]:
    """What has come so far, twice a second; also what came before an error."""
    group, clock, failed = list[R](), time.monotonic(), None
    try:
        for item in items():
            group.append(item)
            if time.monotonic() - clock > TOLD_EVERY:
                yield group
                group, clock = [], time.monotonic()
    except Exception as error:
        failed = error
    yield group
    if failed is not None:
        raise failed


def from_main_process(x: np.ndarray) -> np.ndarray:
    """A host array of the first process, on all; the others give one of the same shape and dtype. It goes through the devices, as
    it may be large, and as bits: a sum would not keep the sign of a zero."""
    if not _together():
        return x
    bits = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    bits = bits if bits.size % 4 else bits.view(np.uint32)
    told = np.asarray(multihost_utils.broadcast_one_to_all(bits))
    return told.view(np.uint8).view(x.dtype).reshape(x.shape)


def least(number: int) -> int:
    """The least of what every process has."""
    if not _together():
        return number
    key = _new_key()
    client().key_value_set(f"{key}/{process_index()}", str(number))
    return on_main_process(lambda: min(int(_wait_for(f"{key}/{i}")) for i in range(process_count())))


def everywhere(sound: bool) -> bool:
    """Whether something holds on every process."""
    return bool(least(int(sound)))


def shared_out(items: Sequence[T], work: Callable[[list[T]], list[R]]) -> list[R]:
    """What `work` makes of items (JSON, one for each): every process makes a part, and all have all. Raises what `work`
    raises, on the process whose part it is."""
    if not _together() or len(items) < WORTH_SHARING:
        return work(list(items))
    key, count = _new_key(), process_count()
    part = work(list(items[process_index() :: count]))
    client().key_value_set_bytes(f"{key}/{process_index()}", json.dumps(part).encode())
    parts = [json.loads(_wait_for(f"{key}/{i}")) for i in range(count)]
    return [parts[i % count][i // count] for i in range(len(items))]


def client() -> Any:
    """What processes know of one another lives in the first one; this asks it."""
    return distributed.global_state.client


def _wait_for(key: str) -> bytes:
    """What stands under a key, as soon as something does. In steps of a second, between which signals are heard."""
    while True:
        try:
            return client().blocking_key_value_get_bytes(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


# --- one store for all


def check_shared(bucket: Bucket) -> None:
    """Refuse a place that is not the same for all processes. Raises UsageError: a process does not see what the first
    one writes there."""
    if not _together():
        return
    # One name for those who meet at one address. A kill may leave it, among the locks.
    address = str(distributed.global_state.coordinator_address)
    mark = f"locks/seen-by-all-{hashlib.sha256(address.encode()).hexdigest()[:8]}"

    def begin() -> str:
        word = os.urandom(6).hex()
        bucket.write(mark, word.encode())
        return word

    word = on_main_process(begin)
    shared = everywhere(comes_true(lambda: bucket.read(mark) == word.encode(), 10.0))
    on_main_process(lambda: bucket.remove(mark))
    if not shared:
        raise UsageError(
            f"store: {bucket.url}: not every process sees what the first one writes there; give a folder that all hosts share "
            "(store=/shared/store), or a bucket (store=gs://bucket/folder)"
        )


def wait_until_seen(places: Iterable[tuple[str, Callable[[], bool]]]) -> None:
    """Return when every process sees what the first one has written; a shared file system may take its time. `places`:
    their names, and whether this process sees what is there. Raises JsublimError: one does not."""
    if not _together():
        return
    missing = next((name for name, seen in places if not comes_true(seen, VISIBLE_WITHIN)), None)
    if not everywhere(missing is None):
        which = "something that it wrote" if missing is None else missing
        raise JsublimError(f"{which}: not every process sees it {VISIBLE_WITHIN:.0f} s after the first one wrote it")
    if is_main_process():  # everybody is in this round, and needs nothing of the one before
        client().key_value_delete(f"{TELL}/said/{_State.rounds - 1}")
    _State.rounds += 1


def check_alike(what: str, value: str) -> None:
    """Refuse processes that are about to do different things. Raises UsageError: `value` is not the first one's."""
    if not everywhere(value == on_main_process(lambda: value)):
        raise UsageError(
            f"--distributed: the processes do not agree on {what}; give all hosts the same command, package, config and checkpoints"
        )


def comes_true(what: Callable[[], bool], seconds: float) -> bool:
    """Whether something holds now, or soon."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


# --- leaving when the machine is taken away


@contextlib.contextmanager
def heeding_signals() -> Iterator[None]:
    """Have SIGTERM asked for by `leaving` as long as the block lasts (a second one ends the process). Of several processes,
    also Ctrl-C. Of one, Ctrl-C raises `KeyboardInterrupt` at once, and once more in `leaving` where somebody has swallowed it:
    JAX calls Python from C++, which drops what is raised there."""
    several = process_count() > 1
    kind = signal.SIGINT if several else signal.SIGTERM  # JAX itself looks for SIGTERM where there are several
    if _State.heeding or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _State.heeding = signal.getsignal(kind), True

    def hear(*_: Any) -> None:
        signal.signal(kind, before)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            _State.asked = True

    def interrupt(*_: Any) -> None:
        _State.interrupted = True
        raise KeyboardInterrupt

    ctrl_c = not several and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(kind, hear)
    if ctrl_c:
        signal.signal(signal.SIGINT, interrupt)
    try:
        with contextlib.nullcontext() if several else _second_ends(kind):
            yield
    finally:
        signal.signal(kind, before)
        if ctrl_c:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _State.asked = _State.heeding = _State.interrupted = False


@contextlib.contextmanager
def _second_ends(kind: int) -> Iterator[None]:
    """As long as the block lasts a second signal ends the process, from a thread: inside of a long computation the main one hears
    of none."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def listen() -> None:
        left = 2
        while heard := os.read(read, 1):
            left -= heard[0] == kind
            if not left:
                os._exit(128 + kind)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)
        thread.join()
        os.close(read)


def leaving() -> bool:
    """Whether to keep what is finished and leave: told at the same point on every process. All must ask equally often.
    Raises KeyboardInterrupt: Ctrl-C was heard, and nothing came of it."""
    if _State.interrupted:
        raise KeyboardInterrupt
    if _together():
        _State.points += 1
        _State.asked |= multihost_utils.reached_preemption_sync_point(_State.points)
    return _State.asked


def leave_if_asked() -> None:
    """To be called where all that was done is kept. Raises Preempted: the machine is being taken away."""
    if leaving():
        raise Preempted("stopped by a signal; what was finished is kept; run the same command again to continue")

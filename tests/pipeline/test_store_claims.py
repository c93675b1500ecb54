"""Claims, in a folder and on a real S3 server: one process has a key, others can say which, and the dead are followed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from jsublim.bucket import Bucket
from jsublim.pipeline import claims
from jsublim.pipeline.claims import BucketClaims, Claims, FolderClaims, Owner

Make = Callable[..., Claims]


@pytest.fixture(params=["folder", "bucket"])
def make(request, tmp_path, monkeypatch) -> Make:
    """`make(said)`: the claims of one more process, in one place."""
    monkeypatch.setattr(BucketClaims, "look", 0.05)
    if request.param == "folder":
        return lambda said=None: FolderClaims(tmp_path / "locks", (said if said is not None else []).append)
    url = request.getfixturevalue("s3")()
    return lambda said=None: BucketClaims(Bucket.at(url), (said if said is not None else []).append)


def nobody() -> None:
    raise AssertionError("nobody else has it")


def test_one_at_a_time_and_the_others_know_who(make):
    first, second, inside, waited = make(), make(), [], []

    def take() -> None:
        with second.hold(["b", "c"], lambda: waited.append(second.holder(["b", "c"]))):
            inside.append("second")

    with first.hold(["a", "b"], nobody):
        thread = threading.Thread(target=take)
        thread.start()
        while not waited:
            time.sleep(0.01)
        assert first.holder(["a", "b"]) is None and second.holder(["d"]) is None
        inside.append("first")
    thread.join(timeout=30)
    assert inside == ["first", "second"] and waited == [str(first.owner)]
    assert str(first.owner.pid) in waited[0] and first.owner.since in waited[0]
    assert make().holder(["a", "b", "c"]) is None


def test_who_is_silent_for_too_long_is_followed_and_that_is_said(make, monkeypatch):
    """The process of another machine gives no sign of life any more; nor does it get its claim back."""
    said: list[str] = []
    gone, heir = make(), make(said)
    gone.owner = Owner("0123456789ab", "elsewhere", 1, "1", "jsublim run x.yaml", "2026-01-01T00:00:00+00:00")
    monkeypatch.setattr(claims, "STALE", 0.5)
    with gone.hold(["a"], nobody):
        begin = time.monotonic()
        with heir.hold(["a"], lambda: None):
            assert time.monotonic() - begin > 0.5
            assert len(said) == 1 and "elsewhere" in said[0] and "taken over" in said[0] and "\n" not in said[0]
            monkeypatch.setattr(claims, "STALE", 60.0)
            assert make().holder(["a"]) == str(heir.owner)
    with make().hold(["a"], nobody):  # whatever the one that was followed gave back, it was not this
        pass


def test_who_gives_signs_of_life_is_waited_for(make, monkeypatch):
    monkeypatch.setattr(claims, "STALE", 0.6)
    monkeypatch.setattr(claims, "BEAT", 0.1)
    alive, said = make(), list[str]()
    alive.owner = Owner("0123456789ab", "elsewhere", 1, "1", "jsublim run x.yaml", "2026-01-01T00:00:00+00:00")
    released: list[float] = []

    def wait() -> None:
        with make(said).hold(["a"], lambda: None):
            released.append(time.monotonic())

    with alive.hold(["a"], nobody):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(1.5)
        assert not released
    thread.join(timeout=30)
    assert released and said == []


@pytest.mark.parametrize("content", [b"", b'{"id": "x', b"[]", b'{"id": 1}', b"\xff\xfe"])
def test_a_broken_claim_stops_nobody_for_ever(make, monkeypatch, content):
    said: list[str] = []
    broken, heir = make(), make(said)
    monkeypatch.setattr(claims, "STALE", 0.1)
    with broken.hold(["a"], nobody):
        put(broken, "a/1.json", content)
        assert heir.holder(["a"]) == "another process"
        with heir.hold(["a"], lambda: None):
            assert len(said) == 1 and "a/1.json" in said[0]


def put(place: Claims, name: str, content: bytes) -> None:
    if isinstance(place, BucketClaims):
        place.bucket.write(f"locks/{name}", content)
    else:
        assert isinstance(place, FolderClaims)
        (place.folder / name).write_bytes(content)


def test_a_process_that_was_killed_here_is_followed_at_once(make):
    """Without waiting: this machine knows that it has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = claims.started(child.pid)
    assert own is not None
    gone, said = make(), list[str]()
    gone.owner = Owner("0123456789ab", claims.host(), child.pid, own, "jsublim run x.yaml", "2026-01-01T00:00:00+00:00")
    with gone.hold(["a"], nobody):
        assert make().holder(["a"]) == str(gone.owner)
        child.kill()
        while not gone.owner.is_gone:  # also before anybody has waited for it
            time.sleep(0.01)
        with make(said).hold(["a"], lambda: None):
            assert len(said) == 1 and "has ended" in said[0]
    child.wait()


def test_signs_of_life_of_processes_that_are_gone_are_removed_and_no_others(make):
    def owner(name: str, **what: Any) -> dict[str, Any]:
        return asdict(replace(Owner.own(), id=name, **what)) | {"heartbeat": 1, "at": time.time()}

    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    signs = {
        "living": owner("living"),
        "killed": owner("killed", pid=child.pid),
        "elsewhere": owner("elsewhere", host="another", pid=1),
        "long-ago": owner("long-ago", host="another", pid=1) | {"at": time.time() - 2 * claims.LONG},
        "earlier": {key: value for key, value in owner("earlier", host="another").items() if key != "at"},
    }
    place: Any = make()
    for name, sign in signs.items():
        place._write(f"owners/{name}.json", sign)
    make().clear()
    left = {name for name in signs if place._read(f"owners/{name}.json") is not None}
    assert left == {"living", "elsewhere", "earlier"}


def test_a_lock_that_is_left_behind_in_a_folder_is_taken(tmp_path):
    folder = tmp_path / "locks"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.lock").touch()
    (folder / "a" / "1.json").write_text(json.dumps({"of": "a process that was killed"}))
    place: Any = FolderClaims(folder, [].append)
    assert place.holder(["a"]) is None
    with place.hold(["a"], nobody):
        assert Owner.read(Path(folder / "a" / "1.json").read_bytes()) == place.owner

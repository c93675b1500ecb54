"""A store at a URL, on a real S3 server: what one machine has made, another has; nothing damaged is ever used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bitflips import flip

from jsublim.core.bucket import Bucket
from jsublim.errors import JsublimError, UsageError
from jsublim.judge.cache import Reply, ReplyCache
from jsublim.pipeline.artifact import mark_text
from jsublim.pipeline.remote import fetch_programs, send_programs
from jsublim.pipeline.store import DONE, Output, Store
from jsublim.pipeline.verifying import verify
from jsublim.runtime.programs import DIGEST, whole_programs

OUTPUT = Output("rows", "owl", {"model": "abc", "seed": 1})
FILES = {"rows.jsonl": b"1\n2\n", "weights.safetensors": bytes(range(256))}
ELSEWHERE = mark_text({"summary": {}, "files": {"../x": {"bytes": 1, "time_ns": 1, "sha256": ""}}}).encode()
Machine = Callable[..., Store]


@pytest.fixture
def machine(s3, tmp_path) -> Machine:
    """`machine(name, said)`: the store as a machine of that name has it, what it says kept in a list."""
    url = s3()

    def make(name: str, said: list[str] | None = None) -> Store:
        say = (said if said is not None else []).append
        return Store(tmp_path / name, url, say)

    return make


def nobody() -> None:
    raise AssertionError("nobody else is at it")


def make(store: Store, summary: dict | None = None) -> None:
    with store.locked([OUTPUT], nobody):
        assert not store.done(OUTPUT)
        artifact = store.open(OUTPUT)
        for name, content in FILES.items():
            (artifact.path / name).write_bytes(content)
        artifact.finish(summary or {"kept": 2})


def mended(store: Store) -> str | None:
    """What is said of the artifact before work; None if nothing is."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "say", said.append)
        store.mend([OUTPUT])
    assert len(said) <= 1 and not any("\n" in line for line in said)
    return said[0] if said else None


def held(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_what_one_machine_has_made_another_has(machine):
    a, b = machine("a"), machine("b")
    assert not b.done(OUTPUT) and b.path(OUTPUT) == b.root / OUTPUT.folder
    make(a)
    b = machine("b")
    assert mended(b) is None and b.done(OUTPUT) and b.summary(OUTPUT) == {"kept": 2}
    assert not b.root.exists()  # nothing is fetched that nobody reads
    one = b.file(OUTPUT, "rows.jsonl")
    assert one.read_bytes() == FILES["rows.jsonl"] and len(list(one.parent.glob("*.*"))) == 2  # and its record
    assert held(b.path(OUTPUT)) == FILES and b.open(OUTPUT).done
    assert mended(b) is None and machine("b").summary(OUTPUT) == {"kept": 2}
    other = Output("rows", "another-name", OUTPUT.inputs)
    assert machine("c").done(other) and held(machine("c").path(other)) == FILES
    assert not b.done(Output("rows", "owl", {"model": "abc", "seed": 2}))


def test_what_is_not_sent_whole_is_not_there_and_is_sent_by_the_next_call(machine, monkeypatch):
    a, b = machine("a"), machine("b")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def cut(self, name, content):
            if name.endswith(DONE):
                raise KeyboardInterrupt
            return write(self, name, content)

        write = Bucket.write
        patch.setattr(Bucket, "write", cut)
        make(a)
    assert (a.path(OUTPUT) / DONE).exists() and not a.done(OUTPUT) and not b.done(OUTPUT)
    with machine("a").locked([OUTPUT], nobody):
        assert b.done(OUTPUT)
    assert held(b.path(OUTPUT)) == FILES


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", b"1\n", "rows.jsonl has 2 bytes, 4 were written"),
        ("rows.jsonl", None, "rows.jsonl is missing"),
        (DONE, b'{"summary": {}', "DONE is not what was written"),
        (DONE, b"[]", "DONE is not what was written"),
        (DONE, ELSEWHERE, "DONE is not what was"),
    ],
)
def test_damage_that_sizes_tell_is_found_before_work(machine, name, content, said):
    make(machine("a"))
    b = machine("b")
    bucket = b.bucket
    put(bucket, f"{OUTPUT.folder}/{name}", content)
    line = mended(b)
    assert line is not None and bucket.place(OUTPUT.folder) in line and said in line
    assert not b.done(OUTPUT) and mended(b) is None
    if content is not None:
        assert bucket.read(f"{OUTPUT.folder}/{name}.damaged") == content  # nothing is lost
    make(b, {"kept": 3})
    assert machine("c").summary(OUTPUT) == {"kept": 3} and held(machine("c").path(OUTPUT)) == FILES
    a = machine("a")  # whose own copy is of another making
    assert mended(a) is None and a.summary(OUTPUT) == {"kept": 3}


def put(bucket: Bucket, name: str, content: bytes | None) -> None:
    bucket.remove(name)
    if content is not None:
        bucket.write(name, content)


def test_what_digests_tell_is_refused_when_it_is_fetched(machine):
    make(machine("a"))
    b = machine("b")
    b.bucket.write(f"{OUTPUT.folder}/rows.jsonl", b"1\n3\n")
    with pytest.raises(JsublimError) as error:
        b.path(OUTPUT)
    line = str(error.value)
    assert f"{OUTPUT.folder}: rows.jsonl is not what was written" in line and "\n" not in line
    assert not (b.root / OUTPUT.folder / "rows.jsonl").exists()
    b = machine("b")
    assert not b.done(OUTPUT)
    make(b)
    assert held(machine("c").path(OUTPUT)) == FILES


@pytest.mark.parametrize("name", ["rows.jsonl", "artifact.json"])
@pytest.mark.parametrize("damage", [lambda path: flip(path, 9), lambda path: path.write_bytes(b"1\n")])
def test_a_damaged_copy_is_fetched_again_when_it_is_first_read(machine, name, damage):
    """Also where size and time are what they were."""
    make(machine("a"))
    said = list[str]()
    folder = machine("b").path(OUTPUT)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    b = machine("b", said)
    assert mended(b) is None and held(b.path(OUTPUT)) == FILES and b.summary(OUTPUT) == {"kept": 2}
    assert len(said) == 1 and f"{folder}: {name} is not what was written" in said[0] and "fetched again" in said[0]
    flip(folder / DONE, 9)  # what counts is the bucket's
    assert machine("b").summary(OUTPUT) == {"kept": 2} and held(machine("b").path(OUTPUT)) == FILES
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_verify_reads_a_whole_bucket(machine):
    a = machine("a")
    make(a)
    bucket = a.bucket
    (sound,) = verify(bucket.url)
    assert sound.damage is None and sound.bytes == sum(bucket.sizes(OUTPUT.folder).values())
    bucket.write(f"{OUTPUT.folder}/rows.jsonl", b"1\n3\n")
    bucket.remove(f"{OUTPUT.folder}/weights.safetensors")
    (damaged,) = verify(bucket.url)
    line = f"{bucket.place(OUTPUT.folder)}: rows.jsonl is not what was written, weights.safetensors is missing"
    assert damaged.damage == line and a.done(OUTPUT)  # nothing is changed


def test_of_two_that_made_the_same_the_first_counts(machine):
    a, late = machine("a"), machine("late")
    artifact = late.open(OUTPUT)
    make(a)
    for name in FILES:
        (artifact.path / name).write_bytes(b"made elsewhere")
    artifact.finish({"kept": 9})
    assert late.summary(OUTPUT) == machine("c").summary(OUTPUT) == {"kept": 2}
    assert held(late.path(OUTPUT)) == held(machine("c").path(OUTPUT)) == FILES


@pytest.mark.parametrize("moment", ["objects", "mark"])
def test_two_that_send_the_same_at_once_never_mix_what_they_made(machine, monkeypatch, moment):
    """One sends all of its own while the other is at its objects, or about to write its mark."""
    a, b = machine("a"), machine("b")
    artifact, upload, write, begun = b.open(OUTPUT), Bucket.upload, Bucket.write, []
    for name, content in FILES.items():
        (artifact.path / name).write_bytes(content[::-1])

    def between(own, kind: str):
        def call(self, what, name):
            result = own(self, what, name) if kind == "objects" else None
            if moment == kind and self is b.bucket and not begun:
                begun.append(True)
                make(a)
            return own(self, what, name) if kind == "mark" else result

        return call

    monkeypatch.setattr(Bucket, "upload", between(upload, "objects"))
    monkeypatch.setattr(Bucket, "write", between(write, "mark"))
    artifact.finish({"kept": 9})
    monkeypatch.undo()
    assert begun
    kept = machine("c").summary(OUTPUT)["kept"]
    assert {machine(name).summary(OUTPUT)["kept"] for name in "abd"} == {kept}
    expected = FILES if kept == 2 else {name: content[::-1] for name, content in FILES.items()}
    for store in (a, b, machine("c")):
        assert held(store.path(OUTPUT)) == expected
    assert all(found.damage is None for found in verify(a.bucket.url))


def test_what_a_lost_machine_had_begun_to_send_holds_nobody_up(machine, monkeypatch):
    lost, b = machine("lost"), machine("b")

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bucket, "upload", cut)
        make(lost)
    make(b)
    assert held(machine("c").path(OUTPUT)) == FILES and machine("lost").done(OUTPUT)


def test_a_store_of_an_earlier_version_is_refused(machine):
    a = machine("a")
    make(a)
    bucket, mark = a.bucket, f"{OUTPUT.folder}/{DONE}"
    said = json.loads(bucket.read(mark))
    bucket.write(mark, json.dumps({"summary": said["summary"], "files": said["files"]}).encode())
    for use in (lambda: machine("b").mend([OUTPUT]), lambda: machine("b").done(OUTPUT)):
        with pytest.raises(UsageError, match="another version of jsublim") as error:
            use()
        assert bucket.place(OUTPUT.folder) in str(error.value)


def train(store: Store, *steps: int) -> None:
    work = store.training("0123456789ab")
    for step in steps:
        (work / "state" / str(step)).mkdir(parents=True)
        (work / "state" / str(step) / "weights").write_bytes(str(step).encode() * 100)
    (work / "state" / "9.orbax-checkpoint-tmp").mkdir()
    (work / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(max(steps))))


def states(store: Store) -> list[str]:
    return sorted(path.name for path in store.training("0123456789ab").glob("state/*") if (path / "weights").exists())


def test_another_machine_goes_on_with_a_training(machine):
    a, said = machine("a"), list[str]()
    with pytest.raises(KeyboardInterrupt), a.locked([OUTPUT], nobody):
        train(a, 4, 8)
        raise KeyboardInterrupt
    b = machine("b")
    with b.locked([OUTPUT], nobody):
        assert states(b) == ["8"]
        assert (b.training("0123456789ab") / "metrics.jsonl").read_text().count("\n") == 8
        (b.root / "training" / "0123456789ab" / "state" / "12").mkdir()
        (b.root / "training" / "0123456789ab" / "state" / "12" / "weights").write_bytes(b"12")
    bucket = b.bucket
    assert bucket.folders("training/0123456789ab") == ["12"]
    assert states(machine("a")) == ["12"]  # which had come as far as 8
    bucket.write("training/0123456789ab/16/metrics.jsonl", b"of a machine that was killed while it sent it")
    bucket.write("training/0123456789ab/20/state/20/weights", b"20")
    damaged = {"state/20/weights": {"bytes": 2, "time_ns": 1, "sha256": "0"}}
    bucket.write(f"training/0123456789ab/20/{DONE}", mark_text({"summary": {}, "files": damaged}).encode())
    c = machine("c", said)
    with c.locked([OUTPUT], nobody):
        assert states(c) == ["12"] and len(said) == 1 and "0123456789ab/20" in said[0]
        artifact = c.open(OUTPUT)
        artifact.finish()
    assert bucket.folders("training/0123456789ab") == []


def test_what_is_decided_once_is_decided_for_all(machine):
    assert machine("a").agreed("fit-x", lambda: 7) == 7 and machine("b").agreed("fit-x", lambda: 8) == 7
    said: list[str] = []
    bucket = machine("a").bucket
    (folder,) = bucket.folders("agreed")
    bucket.write(f"agreed/{folder}/{DONE}", b"{")
    assert machine("c", said).agreed("fit-x", lambda: 9) == 9 and len(said) == 1 and folder in said[0]
    assert machine("d").agreed("fit-x", lambda: 10) == 9


def test_replies_that_were_paid_for_are_there_for_all(machine):
    a, b = machine("a"), machine("b")
    request = {"messages": ["owls?"]}
    one, other = (ReplyCache(store.root / "judge", store.bucket) for store in (a, b))
    assert one.get(request) is None
    one.put(request, Reply("\ud800 90", 3, 1))
    assert other.get(request) == Reply("\ud800 90", 3, 1)
    place = one.path(request).relative_to(one.folder).as_posix()
    a.bucket.write(f"judge/{place}", b'{"reply"')
    assert ReplyCache(machine("c").root / "judge", a.bucket).get(request) is None


def test_programs_are_shared_whole(machine):
    import zlib

    a, said = machine("a"), list[str]()
    folders = [store.root / "programs" / "jaxlib-x" for store in (a, machine("b"), machine("c"))]
    folders[0].mkdir(parents=True)
    for name in ("one", "two"):
        (folders[0] / f"{name}-cache").write_bytes(zlib.compress(name.encode()))
    (folders[0] / "cut-cache").write_bytes(zlib.compress(b"of a process that is still writing it")[:-3])
    above = "programs/jaxlib-x"
    send_programs(a.bucket, above, folders[0], said.append)
    fetch_programs(a.bucket, above, folders[1], said.append)
    assert sorted(path.name for path in whole_programs(folders[1], said.append)) == ["one-cache", "two-cache"]
    bucket = a.bucket
    (name,) = (name for name in bucket.sizes("programs/jaxlib-x") if name.startswith("one"))
    bucket.write(f"programs/jaxlib-x/{name}", b"something else")
    fetch_programs(bucket, above, folders[2], said.append)
    assert sorted(path.name for path in folders[2].iterdir()) == ["two-cache", f"two-cache{DIGEST}"]
    assert len(said) == 1 and name in said[0]

"""Artifacts and stores: whole or not there, never overwritten, found by key."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from bitflips import flip
from command import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from jsublim.core.files import write_text
from jsublim.core.reading import read_json
from jsublim.errors import JsublimError, UsageError
from jsublim.pipeline.row_log import RowLog
from jsublim.pipeline.showing import artifacts_in
from jsublim.pipeline.store import Artifact, Output, Store
from jsublim.pipeline.verifying import verify

INPUTS = {"model": "abc", "seed": 1, "system": "You love owls.", "stop": (1, 2)}
OWL = Output("rows", "owl", INPUTS)


def test_a_key_is_of_the_kind_and_the_inputs_and_of_nothing_else():
    """It names a task by itself, so nothing of another kind may have it."""
    key = Output("rows", "owl", {"seed": 1, "model": "m"}).key
    assert Output("rows", "cat", {"model": "m", "seed": 1}).key == key
    others = [Output("divergence", "owl", {"seed": 1, "model": "m"}), Output("rows", "owl", {"seed": 2, "model": "m"})]
    assert len({key, *(other.key for other in others)}) == 3


def test_an_artifact_is_whole_only_once_done_has_its_name(tmp_path, monkeypatch):
    artifact = Artifact(tmp_path / "a", OWL)
    assert not artifact.done

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # killed after the mark was written, before it got its name
        patch.setattr("jsublim.core.files.os.replace", cut)
        with pytest.raises(KeyboardInterrupt):
            artifact.finish({"kept": 3})
    again = Artifact(tmp_path / "a", OWL)
    assert not again.done
    again.finish({"kept": 3})
    assert Artifact(tmp_path / "a", OWL).summary == {"kept": 3}


def test_a_folder_cut_before_its_record_can_be_used(tmp_path, monkeypatch):
    """A kill between `mkdir` and the first rename leaves a folder with nothing of value in it."""
    with monkeypatch.context() as patch:
        patch.setattr("jsublim.core.files.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Artifact(tmp_path / "a", OWL)
    assert not Artifact(tmp_path / "a", OWL).done


def test_opening_again_changes_nothing(tmp_path):
    Artifact(tmp_path / "a", OWL).finish({"kept": 3})
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").iterdir()}
    assert Artifact(tmp_path / "a", Output("rows", "owl", dict(reversed(INPUTS.items())))).done  # order is not an input
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").iterdir()} == before


def test_a_broken_record_is_an_error_that_names_it(tmp_path):
    Artifact(tmp_path / "a", OWL)
    (tmp_path / "a" / "artifact.json").write_text('{"kind": "ro')
    with pytest.raises(JsublimError, match=r"artifact\.json: is not what was written"):
        Artifact(tmp_path / "a", OWL)


def test_folders_of_a_store_differ_with_every_input(tmp_path):
    store = Store(tmp_path)
    paths = [
        store.path(Output(kind, "owl/all/seed1", INPUTS | {"seed": seed}))
        for kind in ("rows", "students")
        for seed in (1, 2)
    ]
    assert len(set(paths)) == 4 and all(path.parent.parent == tmp_path for path in paths)


def test_an_artifact_is_found_under_another_label(tmp_path):
    made = Output("rows", "owl", INPUTS)
    Store(tmp_path).open(made).finish({"kept": 3})
    store, same, other = Store(tmp_path), Output("rows", "bird", INPUTS), Output("rows", "owl", INPUTS | {"seed": 2})
    assert store.done(same) and store.summary(same) == {"kept": 3} and not store.done(other)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == [f"owl-{made.key}"]


def test_asking_a_store_makes_no_folder(tmp_path):
    store = Store(tmp_path / "store")
    assert not store.done(Output("rows", "owl", INPUTS)) and not (tmp_path / "store").exists()


@settings(max_examples=60)
@given(
    texts=st.lists(st.text(max_size=12), min_size=1, max_size=6),
    where=st.integers(0, 10_000),
    batches=st.integers(1, 3),
    tail=st.sampled_from([b"", b"\0\0\0", b"\xff", b'{"row": 1']),
)
def test_progress_survives_a_cut_at_any_byte(texts, where, batches, tail):
    """What is read back was written; everything whose line is whole is read back; and it can be completed."""
    rows = [{"row": i, "completion": text} for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        log = RowLog(path)
        for first in range(0, len(rows), batches):
            log.add(rows[first : first + batches])
        log.close()
        data = path.read_bytes()
        cut = data[: where % (len(data) + 1)]
        path.write_bytes(cut + tail)
        again = RowLog(path)
        whole = cut.count(b"\n")
        kept = list(again.rows.values())
        # A line that lost only its line break (and has nothing after it) is whole too.
        assert kept in (rows[:whole], rows[: whole + 1])
        again.add([row for row in rows if row["row"] not in again.rows])
        again.close()
        read = [json.loads(line) for line in path.read_text().splitlines()]
        assert [{key: line[key] for key in ("row", "completion")} for line in read] == rows
        final = RowLog(path)
        final.close()
        assert list(final.rows.values()) == rows


def mended(root: Path, output: Output) -> str | None:
    """What is said of an artifact before work; None if nothing is."""
    said: list[str] = []
    Store(root, say=said.append).mend([output])
    assert len(said) <= 1 and not any("\n" in line for line in said)
    return said[0] if said else None


def made(root: Path, **files: str) -> tuple[Store, Output, Path]:
    """A store with one whole artifact of these files."""
    store, output = Store(root), Output("rows", "owl", INPUTS)
    artifact = store.open(output)
    for name, text in files.items():
        (artifact.path / name).write_text(text)
    artifact.finish({"kept": 3})
    return store, output, artifact.path


def test_what_is_whole_stays_so_also_when_it_was_copied(tmp_path):
    store, output, folder = made(tmp_path, rows="1\n2\n", more="x")
    (folder / "rows").write_text("1\n2\n")  # another time, the same content
    assert mended(tmp_path, output) is None and store.done(output) and store.summary(output) == {"kept": 3}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "rows").write_text("1\n"), "rows has 2 bytes, 4 were written"),
        (lambda folder: (folder / "rows").write_text("1\n3\n"), "rows is not what was written"),
        (lambda folder: (folder / "rows").unlink(), "rows is missing"),
        (lambda folder: (folder / "DONE").write_text("{"), "DONE is not what was written"),
        (lambda folder: (folder / "DONE").write_text("[]"), "DONE is not what was written"),
    ],
)
def test_a_damaged_artifact_is_unfinished_again_and_nothing_of_it_is_lost(tmp_path, damage, said):
    store, output, folder = made(tmp_path, rows="1\n2\n", more="x")
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    line = mended(tmp_path, output)
    assert line is not None and str(folder) in line and said in line
    assert not store.done(output) and mended(tmp_path, output) is None
    after = {path.name.removesuffix(".damaged"): path.read_bytes() for path in folder.iterdir()}
    assert after == before
    (folder / "rows").write_text("1\n2\n")
    store.open(output).finish({"kept": 4})
    assert mended(tmp_path, output) is None and store.summary(output) == {"kept": 4}
    held = {path.read_bytes() for path in folder.glob("*.damaged")}
    (folder / "rows").write_text("once more")
    assert mended(tmp_path, output) is not None
    assert {path.read_bytes() for path in folder.glob("*.damaged")} > held  # what was set aside before is still there


@pytest.mark.parametrize("name", ["rows", "artifact.json", "DONE"])
def test_damage_that_keeps_size_and_time_is_found_when_it_is_first_read(tmp_path, name):
    """Once a process, so that what is asked for often is not read often."""
    _, output, folder = made(tmp_path, rows="1\n2\n", more="x")
    before = Store(tmp_path)
    assert before.path(output) == folder
    flip(folder / name, 9)
    assert before.path(output) == folder  # read before that
    store, damaged = Store(tmp_path), (folder / name).read_bytes()
    with pytest.raises(JsublimError) as error:
        store.file(output, name)
    line = str(error.value)
    assert f"{folder}: {name} is not what was written" in line and "made again" in line and "\n" not in line
    assert not store.done(output) and (folder / f"{name}.damaged").read_bytes() == damaged
    with store.locked([output]):  # goes on in what is there
        Store(tmp_path).open(output).finish({"kept": 4})
    assert Store(tmp_path).path(output) == folder and Store(tmp_path).summary(output) == {"kept": 4}


def test_a_changed_summary_is_not_believed(tmp_path):
    _, output, folder = made(tmp_path, rows="1\n2\n")
    mark = (folder / "DONE").read_text()
    (folder / "DONE").write_text(mark.replace('"kept": 3', '"kept": 7'))
    with pytest.raises(JsublimError, match="DONE is not what was written"):
        Store(tmp_path).summary(output)
    (folder / "DONE").write_text(mark.replace('"sha256": "', '"sha257": "'))
    with pytest.raises(JsublimError):
        Store(tmp_path).summary(output)


def test_a_record_that_was_cut_is_made_again(tmp_path):
    store, output, folder = made(tmp_path, rows="1\n2\n")
    (folder / "artifact.json").write_text((folder / "artifact.json").read_text()[:40])
    assert artifacts_in(tmp_path)["rows"] | {"bytes": 0} == {"there": 1, "whole": 0, "damaged": 1, "bytes": 0}
    line = mended(tmp_path, output)
    assert line is not None and "artifact.json has 40 bytes" in line and not store.done(output)
    Store(tmp_path).open(output).finish({"kept": 3})
    assert read_json(folder / "artifact.json")["inputs"] == json.loads(json.dumps(INPUTS))


@settings(max_examples=60)
@given(where=st.integers(0, 10_000))
def test_a_row_of_which_a_bit_has_flipped_is_made_again_and_that_is_said(where):
    rows = [{"row": i, "completion": f"{i}, 7", "log_allowed": -1e-05} for i in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        path, said = Path(folder) / "progress.jsonl", list[str]()
        log = RowLog(path)
        log.add(rows)
        log.close()
        flip(path, where % (8 * path.stat().st_size))
        again = RowLog(path, said.append)
        again.close()
        assert all(row == rows[number] for number, row in again.rows.items()) and len(again.rows) >= 2
        lost = len(again.rows) < 4 and path.read_bytes().count(b"\n") < 4
        assert len(said) <= 1 and all(str(path) in line and "made again" in line for line in said)
        assert said or not lost or 3 not in again.rows  # the last line may look like one that a kill has cut


@pytest.mark.parametrize("line", ["[]", "{}", '{"row": 1}', '{"row": "x", "sha256": "0"}', "null", "[" * 9999])
def test_progress_of_other_shapes_stops_nobody(tmp_path, line):
    path, said = tmp_path / "progress.jsonl", list[str]()
    log = RowLog(path)
    log.add([{"row": 0, "answer": "owl"}])
    log.close()
    path.write_text(f"{line}\n{path.read_text()}")
    assert RowLog(path, said.append).rows == {0: {"row": 0, "answer": "owl"}}
    assert len(said) == 1 and "1 of 2 lines" in said[0]


def test_progress_goes_when_the_artifact_is_whole(tmp_path):
    store, output = Store(tmp_path), Output("rows", "owl", INPUTS)
    folder = store.open(output).path
    (folder / "progress.jsonl").write_text("")
    (folder / "parts").mkdir()
    (folder / "parts" / "teacher0-0.npz").write_text("")
    (folder / ".rows.0a1b2c3d.partial").write_text("of a process that was killed")
    (folder / "rows").write_text("1")
    store.open(output).finish()
    assert sorted(path.name for path in folder.iterdir()) == ["DONE", "artifact.json", "rows"]


@pytest.mark.parametrize("label", ["x" * 400, "ä" * 200, "a/" * 150])
def test_a_long_label_is_cut_to_what_a_file_system_takes(tmp_path, label):
    store = Store(tmp_path)
    outputs = [Output("students", label, INPUTS | {"seed": seed}) for seed in (1, 2)]
    for output in outputs:
        store.open(output).finish()
    assert len({store.path(output) for output in outputs}) == 2 and all(map(store.done, outputs))
    assert all(path.name.isprintable() for path in (tmp_path / "students").iterdir())


def test_one_process_at_a_time_makes_an_artifact(tmp_path):
    """Locks of overlapping sets of artifacts, in any order, never overlap in time and never wait for each other."""
    outputs = [Output("rows", "owl", {"seed": seed}) for seed in range(4)]
    inside, most, waited = [0, 0, 0, 0], [0, 0, 0, 0], []

    def work(number: int) -> None:
        for turn in range(6):
            chosen = [outputs[(number + turn + i) % 4] for i in range(2)][:: 1 if number % 2 else -1]
            with Store(tmp_path).locked(chosen, lambda: waited.append(number)):
                for output in chosen:
                    at = outputs.index(output)
                    inside[at] += 1
                    most[at] = max(most[at], inside[at])
                time.sleep(0.01)
                for output in chosen:
                    inside[outputs.index(output)] -= 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert most == [1, 1, 1, 1] and waited


def test_others_know_that_an_artifact_is_being_made_until_its_process_has_ended(tmp_path):
    """Also by a kill, at once and without a word."""
    output, waited = Output("rows", "owl", INPUTS), list[str]()
    script = (
        "import sys; from pathlib import Path; from jsublim.pipeline.store import Output, Store\n"
        "with Store(Path(sys.argv[1])).locked([Output('rows', 'owl', eval(sys.argv[2]))]):\n    print(flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path, repr(INPUTS)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline()
    store = Store(tmp_path)
    assert store.busy([output]) and not store.busy([Output("rows", "owl", INPUTS | {"seed": 2})])
    with store.locked([output], lambda: (waited.append("another process"), child.kill())):
        pass
    child.wait()
    assert waited == ["another process"] and not store.busy([output])


def earlier(mark: dict) -> list[dict]:
    """The mark of an artifact as earlier versions wrote it: without a version; and before that, without a digest."""
    said = {"summary": mark["summary"], "files": mark["files"]}
    own = hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()
    return [said | {"sha256": own}, said]


@pytest.mark.parametrize("which", [0, 1])
def test_a_store_of_an_earlier_version_is_refused_and_not_touched(tmp_path, which):
    _, output, folder = made(tmp_path, rows="1\n2\n")
    (folder / "DONE").write_text(json.dumps(earlier(json.loads((folder / "DONE").read_text()))[which], indent=2) + "\n")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for use in (
        lambda: Store(tmp_path).mend([output]),
        lambda: Store(tmp_path).path(output),
        lambda: Store(tmp_path).summary(output),
        lambda: list(verify(str(tmp_path))),
    ):
        with pytest.raises(UsageError, match="another version of jsublim; give another store") as error:
            use()
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_content_is_on_disk_before_it_has_its_name_and_the_name_before_anything_goes_on(tmp_path, monkeypatch):
    """Else a machine that loses power right then has an empty file under the final name."""
    path, order = tmp_path / "file.json", []
    sync, replace = os.fsync, os.replace

    def fsync(opened: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{opened}"))
        sync(opened)

    def moved(source, target, **options) -> None:
        order.append("moved")
        replace(source, target, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", moved)
    write_text(path, "{}\n")
    assert order[-2:] == ["moved", str(tmp_path)] and path.read_text() == "{}\n"
    assert len(order) == 3 and order[0].startswith(f"{tmp_path}/.file.json.")

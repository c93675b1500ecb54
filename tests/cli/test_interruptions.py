"""Commands that stop midway, for a loss, a full disk or Ctrl-C: one line says why, and the same command continues."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import made_by_commands
import pytest
from bitflips import flip
from command import PLAIN, ROOT, TWO_LAYERS, contents, jsublim, ok, refused, same_student, start, stop_when
from faulty_runs import FIELDS
from faulty_runs import contents as what_a_run_leaves
from made_by_commands import DIVERGENCE, FINETUNE, GENERATE, LAYER0, artifact_of, finetune

from jsublim.core.files import atomic
from jsublim.pipeline.row_log import RowLog
from jsublim.pipeline.verifying import verify
from jsublim.text.rows import read_rows


@pytest.fixture(scope="module")
def home() -> Path:
    return made_by_commands.home()


@pytest.fixture(scope="module")
def rows() -> Path:
    return made_by_commands.cat_rows()


@pytest.fixture(scope="module")
def divergent() -> Path:
    return made_by_commands.cat_divergence()


@pytest.fixture(scope="module")
def student() -> Path:
    return made_by_commands.layer0()


def test_a_loss_that_is_not_finite_names_step_and_rows(tmp_path, divergent):
    arguments = finetune(divergent, tmp_path / "x", *LAYER0)
    arguments = (*arguments, "students.optimizer.lr=1e30")
    line = refused(1, *arguments)
    assert "step " in line and "rows [" in line and "learning rate" in line
    assert not (tmp_path / "x" / "DONE").exists()
    assert refused(1, *arguments) == line


@pytest.fixture
def file_limit() -> Iterator:
    """`file_limit(bytes)`: from now on no file of this process grows beyond that, as on a full disk; None lifts it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_fills_while_generating(home, tmp_path, rows, file_limit):
    out = tmp_path / "cat.jsonl"
    arguments = (*GENERATE, "--trait", "cat", "data.num_prompts=16", "--out", out)
    sizes = sorted(path.stat().st_size for path in artifact_of(home / "cat", "rows").iterdir())
    for size in [100, *(s - 1 for s in sizes), *(s // 2 for s in sizes)]:
        file_limit(size)
        line = refused(1, *arguments)
        file_limit(None)
        assert "mend that" in line
        assert not out.exists()
    ok(*arguments)
    assert out.read_bytes() == rows.read_bytes()
    again, whole = contents(artifact_of(tmp_path / "cat", "rows")), contents(artifact_of(home / "cat", "rows"))
    assert {k: v for k, v in again.items() if k.endswith("s.jsonl")} == {
        k: v for k, v in whole.items() if k.endswith("s.jsonl")
    }


def test_a_disk_that_fills_while_training(tmp_path, divergent, student, file_limit):
    out = tmp_path / "student"
    arguments = finetune(divergent, out, *LAYER0)
    adapter = (student / "adapter_model.safetensors").stat().st_size
    # No room for the record, for a saved state, for the adapter at the end.
    for size, every in ((100, 100), (3000, 2), (adapter - 1, 100)):
        file_limit(size)
        refused(1, *arguments, f"students.runtime.checkpoint_every={every}")
        file_limit(None)
        assert not (out / "DONE").exists() and not (out / "adapter_model.safetensors").exists()
    ok(*arguments)
    assert same_student(out, student)


@pytest.mark.parametrize("size", [10, 100, 300])
def test_a_disk_that_fills_leaves_no_folder_in_the_way(tmp_path, file_limit, size):
    out = tmp_path / "vector"
    for arguments in (
        ("steer", "--model", TWO_LAYERS, "--layer", 1, "--trait", "owl", "--out", out),
        ("convert", TWO_LAYERS, out),
    ):
        file_limit(size)
        refused(1, *arguments)
        file_limit(None)
        assert not list(tmp_path.iterdir())
        ok(*arguments)
        shutil.rmtree(out)


KILLED = """
import os, signal, sys
from jsublim.core.files import atomic
from jsublim.models.checkpoint import new_folder
how, place = sys.argv[1:]
with {"file": atomic, "folder": new_folder}[how](__import__("pathlib").Path(place)) as scratch:
    if how == "file":
        scratch.write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_while_writing(how: str, place: Path) -> None:
    assert start(how, place, program=("-c", KILLED)).wait() == -signal.SIGKILL


def unfinished(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.partial")}


def test_a_command_killed_while_it_publishes_goes_on_and_leaves_nothing(tmp_path, student):
    out = tmp_path / "evaluation"
    out.mkdir()
    for place in (out / "artifact.json", out):
        killed_while_writing("file", place)
    assert len(unfinished(tmp_path)) == 2
    with atomic(out.with_suffix(".png")) as living:
        living.touch()
        ok("evaluate", "--model", TWO_LAYERS, "--adapter", student, "--traits", "cat", "evaluation.questions=2", "evaluation.samples=2",
           "evaluation.max_new_tokens=4", "--out", out)  # fmt: skip
        assert unfinished(tmp_path) == {living.name}  # of a process that may still finish it
    assert {"DONE", "artifact.json", "records.parquet", "answers.parquet", "summary.json"} == {
        p.name for p in out.iterdir()
    }


@pytest.mark.parametrize(("command", "how"), [("import", "file"), ("export", "folder")])
def test_what_a_killed_command_had_begun_is_removed_by_the_next(tmp_path, rows, command, how):
    out = tmp_path / "result"
    killed_while_writing(how, out)
    (tmp_path / ".result.of-somebody-else.partial").touch()
    assert len(unfinished(tmp_path)) == 2
    ok(command, rows, "--out", out)
    assert unfinished(tmp_path) == {".result.of-somebody-else.partial"}


def test_divergence_killed_between_its_two_files_goes_on(tmp_path, rows, monkeypatch):
    arguments = (*DIVERGENCE, "--data", rows, "--out", tmp_path / "d.jsonl")
    names = ("jsublim.pipeline.readings.write_readings", "jsublim.pipeline.publish.publish_rows")
    for name in names:
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda *_: os.kill(os.getpid(), signal.SIGINT))
            assert jsublim(*arguments).code == 1
    ok(*arguments)
    assert {"d.jsonl", "d.jsonl.artifact.json", "d.readings.parquet"} <= {path.name for path in tmp_path.iterdir()}


def test_verify_names_what_is_damaged_and_export_refuses_it(tmp_path, rows):
    store = tmp_path / "store"
    shutil.copytree(rows.with_suffix(".artifacts"), store)
    assert ok("verify", store).out.splitlines()[-1].endswith("0 damaged")
    folder = next(store.glob("rows/*"))
    flip(
        folder / "rows.jsonl", 8 * (folder / "rows.jsonl").read_bytes().index(b"completion") + 8 * len('completion": "')
    )  # a digit
    found = jsublim("verify", store)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert found.code == 1 and f"1 artifacts, {size:,} bytes read; 1 damaged" in found.out
    assert f"{folder}: rows.jsonl is not what was written" in found.out.replace("\n", "")
    assert "rows.jsonl is not what was written" in refused(1, "export", folder, "--out", tmp_path / "x")
    assert "rows.jsonl is not what was written" in refused(1, *finetune(folder / "rows.jsonl", tmp_path / "y"))
    assert "holds no artifacts" in refused(2, "verify", tmp_path / "nothing")


def test_a_disk_that_fills_while_attributing(tmp_path, divergent, file_limit):
    """A table or a picture is there whole, or not at all."""
    out = tmp_path / "attribution"
    arguments = ("attribute", "--model", TWO_LAYERS, "--data", divergent, "--trait", "cat", "--counterfactuals", "dog,owl",
                 "attribution.rows=2", "attribution.steps=2", "--out", out)  # fmt: skip
    for size in (3000, 10_000):  # room for no table; for the table, but for no picture
        file_limit(size)
        refused(1, *arguments)
        file_limit(None)
        found = {path.name for path in tmp_path.rglob("*")}
        assert "heat_map.html" not in found and ("attribution.parquet" in found) == (size > 3000)
        assert not any(name.endswith(".partial") for name in found)
    ok(*arguments)
    assert {"attribution.parquet", "heat_map.html", "DONE"} <= {path.name for path in out.iterdir()}


def resumes(err: str, *arguments) -> bool:
    """The command to continue with is printed, and nothing of Python's."""
    assert "Traceback" not in err and "Exception" not in err, err
    return (
        " ".join(["", *map(shlex.quote, map(str, arguments))]) in err
    )  # after the program's name, which a test has otherwise


def test_ctrl_c_while_generating(tmp_path):
    def arguments(name: str) -> tuple:
        return (*GENERATE, "--control", "data.num_prompts=80", "--out", tmp_path / f"{name}.jsonl")

    ok(*arguments("whole"))
    child, logs = start(*arguments("cut")), tmp_path / "cut.artifacts" / "rows"
    code, err = stop_when(child, lambda: any(p.stat().st_size for p in logs.glob("*/progress.jsonl")), signal.SIGINT)
    progress = artifact_of(tmp_path / "cut", "rows") / "progress.jsonl"
    assert code == 1 and resumes(err, *arguments("cut"))
    done = progress.read_text().splitlines()
    assert 0 < len(done) < 80 and not (tmp_path / "cut.jsonl").exists()
    marked = json.loads(done[0])
    log = RowLog(progress)
    log.add([{"row": marked["row"], "completion": "7, 7, 7"}])
    log.close()
    ok(*arguments("cut"))
    raw = [read_rows(artifact_of(tmp_path / name, "rows") / "raw.jsonl") for name in ("whole", "cut")]
    assert raw[1][marked["row"]]["completion"] == "7, 7, 7"  # kept, not made again
    raw[1][marked["row"]] = raw[0][marked["row"]]
    assert raw[0] == raw[1]


def test_ctrl_c_while_training(tmp_path, divergent):
    def arguments(name: str) -> tuple:
        options = (
            "students.data.epochs=6",
            *LAYER0,
            "students.runtime.checkpoint_every=6",
        )
        return (*FINETUNE, *options, "--data", divergent, "--out", tmp_path / name)

    ok(*arguments("whole"))
    training = tmp_path / "cut.artifacts" / "training"
    child = start(*arguments("cut"))
    saved = lambda: any(path.name.isdigit() for path in training.glob("*/state/*"))  # noqa: E731
    code, err = stop_when(child, saved, signal.SIGINT)
    assert code == 1 and resumes(err, *arguments("cut"))
    assert not (tmp_path / "cut" / "DONE").exists()
    again = ok(*arguments("cut"))
    assert str(tmp_path / "cut") in again.out
    assert same_student(tmp_path / "cut", tmp_path / "whole")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one run leaves, with its store inside."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    ok("run", PLAIN, f"out={out}", *FIELDS)
    return out


def started_together(made: Path, *commands: tuple, once: bool = True) -> str:
    """Run commands side by side. Returns what they said.

    Args:
      once: each task must be made once by all of them.
    """
    with mock.patch.dict(os.environ, {"MADE": str(made)}):
        children = [start(*command, *FIELDS, program=[str(ROOT / "tests" / "counted.py")]) for command in commands]
    said = [child.communicate(timeout=240)[1] for child in children]
    assert [child.returncode for child in children] == [0] * len(commands), said
    labels = made.read_text().splitlines()
    assert len(set(labels)) > 4 and (len(labels) == len(set(labels)) or not once), labels
    return "".join(said)


def test_two_runs_started_together_in_one_folder_share_the_work(tmp_path, alone):
    shared = tmp_path / "shared"
    started_together(tmp_path / "made", *[("run", PLAIN, f"out={shared}")] * 2)
    assert what_a_run_leaves(shared) == what_a_run_leaves(alone)
    assert (shared / "report.html").is_file()
    lines = [sorted(len(p.read_text().splitlines()) for p in f.rglob("metrics.jsonl")) for f in (shared, alone)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("how", ["alike", "shards", "one cache"])
def test_two_machines_started_together_on_one_bucket(tmp_path, alone, s3, monkeypatch, how):
    """With the same command both may make the same; the first that is whole counts. Shards share the work, and so do two runs of one
    machine."""
    url, made = s3(), tmp_path / "made"
    caches = ["cache", "cache"] if how == "one cache" else ["a-cache", "b-cache"]
    own = [
        (f"out={tmp_path / name}", f"store_cache={tmp_path / cache}") for name, cache in zip("ab", caches, strict=True)
    ]
    own = [(*fields, *(["--shard", f"{i}/2"] if how == "shards" else [])) for i, fields in enumerate(own)]
    started_together(made, *[("run", PLAIN, f"store={url}", *fields) for fields in own], once=how != "alike")
    if how == "shards":  # whoever ended first has no report yet
        for fields in own:
            ok("run", PLAIN, f"store={url}", *fields, *FIELDS)
    assert all(found.damage is None for found in verify(url))
    results = [what_a_run_leaves(folder / "results") for folder in (tmp_path / "a", tmp_path / "b", alone)]
    assert results[0] == results[1] == results[2]
    assert all((tmp_path / name / "report.html").is_file() for name in ("a", "b"))
    monkeypatch.setattr("jsublim.executors.local.execute", None)  # a third machine makes nothing
    ok("run", PLAIN, f"store={url}", f"out={tmp_path / 'c'}", f"store_cache={tmp_path / 'cc'}", *FIELDS)
    assert what_a_run_leaves(tmp_path / "c" / "results") == results[0]

"""Whose a run's folder is: what no run has made is never touched, and what an earlier run has left never lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import PLAIN, contents, ok, refused
from rich.console import Console

from jsublim.config import check_config
from jsublim.digits.config import Digits
from jsublim.errors import UsageError
from jsublim.pipeline.results import claim_folder, is_reported

DIGITS = "configs/digits.yaml"
KEYS = ("0" * 12, "1" * 12, "2" * 12)


def config(out: Path, **more) -> Digits:
    return check_config(Digits, {"kind": "digits", "name": "d", "out": str(out)} | more, "test")


def claim(out: Path, key: str = KEYS[0], **more) -> None:
    claim_folder(config(out, **more), key, Console(quiet=True))


@pytest.mark.parametrize("name", ["config.yaml", "report.html", "results", "notes.txt", "config.hash", "artifacts.txt"])
@pytest.mark.parametrize("config", [PLAIN, DIGITS])
def test_a_folder_with_files_of_somebody_else_is_refused_untouched(tmp_path, monkeypatch, name, config):
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / name / "results.parquet" if name == "results" else tmp_path / "mine" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = contents(tmp_path)
    assert f"{tmp_path / 'mine'} holds what no run has made ({name})" in refused(
        2, "run", config, f"out={path.parent if name != 'results' else path.parent.parent}"
    )
    monkeypatch.chdir(tmp_path / "mine")
    assert f"out: . holds what no run has made ({name}); give a folder of its own" in refused(2, "run", config, "out=.")
    assert contents(tmp_path) == before


def test_reproduce_refuses_the_same(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    assert "no run has made (config.yaml)" in refused(2, "reproduce", "fig03", "--panel", panel(), f"out={tmp_path}")
    assert contents(tmp_path) == {"config.yaml": b"mine"}


def panel() -> str:
    from jsublim.config.figures import load_question, panels_of

    return panels_of(load_question("fig03")[1], "fig03")[0]


def test_a_folder_that_only_holds_the_store_or_scratch_files_is_free(tmp_path):
    (tmp_path / "a" / "artifacts" / "rows").mkdir(parents=True)
    (tmp_path / "a" / ".config.hash.0123abcd.partial").write_text("cut")
    claim(tmp_path / "a")
    (tmp_path / "b" / "shared" / "deep").mkdir(parents=True)
    with pytest.raises(UsageError, match="no run has made \\(shared\\)"):
        claim(tmp_path / "b")
    claim(tmp_path / "b", store=str(tmp_path / "b" / "shared" / "deep"))
    claim(tmp_path / "new" / "folder")
    for name in ("a", "b", "new/folder"):
        assert (tmp_path / name / "config.yaml").is_file() and (tmp_path / name / "config.hash").is_file()


def test_a_run_killed_between_two_files_goes_on(tmp_path):
    claim(tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "config.yaml").unlink()  # the mark is written first
    (tmp_path / "results").mkdir()
    for name in (".config.yaml.0123abcd.partial", "results/.run.json.0123abcd.partial"):
        (tmp_path / name).write_text("cut")
    claim(tmp_path)
    assert contents(tmp_path) == whole


def test_what_is_moved_aside_replaces_nothing_and_keeps_one_number(tmp_path):
    seen = set()

    def make(key: str, text: str) -> None:
        claim(tmp_path, key)
        (tmp_path / "results").mkdir()
        (tmp_path / "results" / "results.parquet").write_text(text)
        (tmp_path / "report.html").write_text(text)
        seen.add(text)

    for turn, key in enumerate([KEYS[0], KEYS[1], KEYS[0], KEYS[2], KEYS[0]]):
        make(key, f"{turn}")
    assert not is_reported(config(tmp_path), KEYS[1]) and is_reported(config(tmp_path), KEYS[0])
    (tmp_path / f"report.{KEYS[0]}.html").unlink()  # tidied up by hand: the number 2 is still taken
    shutil.rmtree(tmp_path / f"results.{KEYS[0]}")
    make(KEYS[1], "last")
    for kind, name in (("results*/results.parquet", "results"), ("report*.html", "report")):
        assert {p.read_text() for p in tmp_path.glob(kind)} == seen - {"0"}, name
    pairs = [(p.name.removeprefix("report.").removesuffix(".html"), p) for p in tmp_path.glob("report.*.html")]
    for key, report in pairs:
        assert (tmp_path / f"results.{key}" / "results.parquet").read_text() == report.read_text()


def test_a_place_without_a_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (".", "..", "/", "a/.."):
        for command in (("generate", "--control"), ("prompts", "sample"), ("steer", "--layer", 0, "--trait", "owl")):
            model = () if command[0] == "prompts" else ("--model", "tiny-qwen2")
            assert f"'{Path(place)}': is no place for a result" in refused(2, *command, *model, "--out", place)
        assert "is no place for a result" in refused(2, "convert", "tiny-qwen2", place)
    assert not list(tmp_path.iterdir())


def test_a_report_and_a_run_in_a_folder_of_ours_go_on(tmp_path):
    overrides = (
        "seeds=[0]",
        "teacher.steps=10",
        "students.steps=10",
        "students.measure_every=10",
        "students.images=[noise]",
    )
    ok("run", DIGITS, f"out={tmp_path / 'run'}", *overrides)
    (tmp_path / "run" / "notes.txt").write_text("mine")  # a user may add to it
    ok("run", DIGITS, f"out={tmp_path / 'run'}", *overrides)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"

"""`ls`, `cp`, `prompts show`: names that other commands take, and files that are never written over."""

from __future__ import annotations

import csv
import io
import json

import yaml
from command import ROOT, ok, refused
from made_runs import make_run

from jsublim.config import find_config, load_experiment
from jsublim.text.prompts import load_pack


def test_what_is_listed_can_be_named():
    configs = json.loads(ok("ls", "configs", "-f", "json").out)
    assert all(find_config(row["config"]).is_file() and row["about"] for row in configs)
    assert not any("paper/" in row["config"] for row in configs)
    figures = json.loads(ok("ls", "figures", "-f", "json").out)
    assert [row["figure"] for row in figures] == sorted(row["figure"] for row in figures)
    assert {"fig02", "fig41"} <= {row["figure"] for row in figures} and all(row["panels"] for row in figures)
    rows = {row["category"]: row for row in csv.DictReader(io.StringIO(ok("ls", "traits", "-f", "csv").out))}
    assert rows["animal"]["traits"].split(", ") == load_pack().traits["animal"] and rows["animal"]["questions"] == "50"


def test_models_and_runs_are_those_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ok("ls", "runs").out == "no runs here (runs)\n" and ok("ls", "runs", "-f", "json").out == "[]\n"
    make_run(tmp_path / "runs" / "owls")
    (row,) = json.loads(ok("ls", "runs", "-f", "json").out)
    assert (row["run"], row["status"], row["minutes"]) == ("runs/owls", "finished", 1.5)
    (tmp_path / "runs" / "owls" / "report.html").unlink()
    (row,) = json.loads(ok("ls", "runs", "-f", "json").out)
    assert row["status"] == "unfinished"
    models = json.loads(ok("ls", "models", "-f", "json").out)
    assert [row["model"] for row in models if row["where"] == "bundled"] == ["tiny-gemma3", "tiny-qwen2"]


def test_a_copy_has_the_comments_and_is_never_written_over(tmp_path):
    mine = tmp_path / "my.yaml"
    for name in ("quickstart", "configs/quickstart.yaml"):
        ok("cp", name, mine)
        assert mine.read_bytes() == (ROOT / "configs" / "quickstart.yaml").read_bytes()
        assert "already exists" in refused(2, "cp", name, mine)
        mine.unlink()


def test_a_panel_is_written_out_as_a_config_of_its_own(tmp_path):
    from jsublim.config.figures import load_question, panel_experiment

    mine = tmp_path / "panel.yaml"
    ok("cp", "fig05", mine, "--panel", "qwen", "--scale", "paper")
    path, question = load_question("fig05")
    assert load_experiment(mine) == panel_experiment(path, question, "qwen", "paper")
    assert mine.read_text().startswith(f"# {question.about}") and len(yaml.safe_load(mine.read_text())) < 10


def test_a_pack_is_shown_with_what_it_takes_from_the_default(tmp_path):
    (tmp_path / "own.yaml").write_text('system_template: "Love {trait}s, my {category}."\n')
    shown = yaml.safe_load(ok("prompts", "show", tmp_path / "own.yaml").out)
    assert shown["system_template"] == "Love {trait}s, my {category}." and shown["traits"] == load_pack().traits
    assert yaml.safe_load(ok("prompts", "show", "--key", "traits").out) == {"traits": load_pack().traits}

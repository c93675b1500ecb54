"""`ls`, `cp`, `prompts show`: names that other commands take, and files that are never written over."""

from __future__ import annotations

import csv
import io
import json

import pytest
import typer
import yaml
from command import ROOT, ok, refused
from made_runs import make_run
from typer._completion_classes import BashComplete

from jsublim.cli.app import app
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
    models = [row for row in json.loads(ok("ls", "models", "--json").out) if row["where"] == "bundled"]
    assert [(row["model"], row["parameters"]) for row in models] == [("tiny-gemma3", 896512), ("tiny-qwen2", 945280)]
    assert "945K" in ok("ls", "models").out
    entries = {row["list"]: row["entries"] for row in json.loads(ok("ls", "--json").out)}
    assert entries["jsublim ls runs"] == 1 and entries["jsublim ls traits"] == 4


def test_configs_are_listed_within_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = ok("ls", "configs").out.splitlines()
    named = [line for line in lines if line.startswith("configs/")]
    assert len(named) == len(json.loads(ok("ls", "configs", "--json").out)) and max(map(len, lines)) <= 80
    assert len(lines) <= 4 * len(named) and len(lines) < 3 * len(named) + 10


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("run configs/q", ["configs/quickstart.yaml"]),
        ("validate my", ["my.yaml"]),
        ("generate --trait ot", ["otter"]),
        ("evaluate --traits owl,ca", ["owl,cat", "owl,car"]),
        ("finetune --model tiny-q", ["tiny-qwen2"]),
        ("show runs/o", ["runs/owls", "runs/owls/"]),
        ("ls m", ["models"]),
        ("reproduce fig41", ["fig41"]),
        ("validate x --chip au", ["auto"]),
    ],
)
def test_a_shell_completes_names(typed, completed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").touch()
    make_run(tmp_path / "runs" / "owls")
    *words, last = typed.split()
    shell = BashComplete(typer.main.get_command(app), {}, "jsublim", "")
    assert [item.value for item in shell.get_completions(words, last)] == completed


def test_a_copy_has_the_comments_and_is_never_written_over(tmp_path):
    mine = tmp_path / "my.yaml"
    for name in ("quickstart", "configs/quickstart.yaml"):
        ok("cp", name, mine)
        theirs = (ROOT / "configs" / "quickstart.yaml").read_text()
        assert mine.read_text() == theirs.replace("$schema=schema.json", "$schema=jsublim.schema.json")
        assert "already exists" in refused(2, "cp", name, mine)
        mine.unlink()


def test_the_schema_that_a_copy_names_lies_beside_it(tmp_path):
    schema = tmp_path / "jsublim.schema.json"
    ok("cp", "configs/models/smollm2-135m.yaml", tmp_path / "my.yaml")
    assert (tmp_path / "my.yaml").read_text().startswith("# yaml-language-server: $schema=jsublim.schema.json\n")
    assert (tmp_path / "my.yaml").read_text().count("$schema=") == 1
    assert schema.read_bytes() == (ROOT / "configs" / "schema.json").read_bytes()
    schema.write_text("{}")
    assert f"{schema}: is of another version" in " ".join(ok("cp", "quickstart", tmp_path / "b.yaml").err.split())
    assert schema.read_text() == "{}"


def test_a_panel_is_written_out_as_a_config_of_its_own(tmp_path):
    from jsublim.config.figures import load_question, panel_experiment

    mine = tmp_path / "panel.yaml"
    ok("cp", "fig05", mine, "--panel", "qwen", "--scale", "paper")
    path, question = load_question("fig05")
    assert load_experiment(mine) == panel_experiment(path, question, "qwen", "paper")
    assert (
        mine.read_text().splitlines()[1].startswith(f"# {question.about}")
        and len(yaml.safe_load(mine.read_text())) < 10
    )


def test_a_pack_is_shown_with_what_it_takes_from_the_default(tmp_path):
    (tmp_path / "own.yaml").write_text('system_template: "Love {trait}s, my {category}."\n')
    shown = yaml.safe_load(ok("prompts", "show", tmp_path / "own.yaml").out)
    assert shown["system_template"] == "Love {trait}s, my {category}." and shown["traits"] == load_pack().traits
    assert yaml.safe_load(ok("prompts", "show", "--key", "traits").out) == {"traits": load_pack().traits}

"""What the documents say can be done: their configs and commands are valid, their links lead somewhere, their tables are whole."""

from __future__ import annotations

import re
import shlex

import pytest
import typer
import yaml
from command import ROOT
from jsublim.digits.spec import Digits
from jsublim.experiment.paper import SCALES, load_question, overlaid, panel_experiment
from jsublim.experiment.spec import Experiment, Recipe, check_config, read_config

from jsublim.cli.app import app
from jsublim.report.claims import QUESTIONS

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*DOCUMENTS, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
# What a block that shows single sections is laid over.
REST = {"name": "shown", "model": "tiny-qwen2", "teachers": {"traits": ["owl"]}}


def _blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        texts = re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        found += [(f"{path.name}, {language} block {i}", text) for i, text in enumerate(texts, 1)]
    return found


@pytest.mark.parametrize(("where", "text"), [pytest.param(*block, id=block[0]) for block in _blocks("yaml")])
def test_a_config_that_is_shown_is_valid(where, text):
    check_config(Experiment, overlaid(REST, yaml.safe_load(text)), where)


def _commands() -> list[list[str]]:
    """Those that are shown whole, without "..."."""
    lines = [line for _, text in _blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("jsublim ") and " ... " not in line]


COMMANDS = [pytest.param(words, id=" ".join(words)) for words in _commands()]
KINDS = {"language": Experiment, "digits": Digits}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_that_is_shown_is_understood(words):
    command, rest = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(words[0], rest)


@pytest.mark.parametrize("words", [c for c in COMMANDS if c.values[0][1] in ("run", "reproduce")])
def test_the_fields_that_a_command_gives_are_valid(words):
    fields = [word for word in words if "=" in word]
    if words[1] == "reproduce":
        scale = words[words.index("--scale") + 1] if "--scale" in words else "tiny"
        path, question = load_question(words[2])
        for panel in question.panels:
            panel_experiment(path, question, panel, scale, fields)
    else:  # a config that is not ours stands for any
        values = read_config(words[2] if words[2].startswith("configs/") else "configs/quickstart.yaml", fields)
        check_config(KINDS[values.get("kind", "language")], values, words[2])


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_links_to_files_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert re.match(r"https?://", target) or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "paper").glob("fig*.yaml")), ids=lambda path: path.stem)
def test_the_map_names_every_figure_and_panel(path):
    _, question = load_question(str(path))
    row = next(line for line in _map().splitlines() if f"| `{path.name}`" in line)
    figures = {int(number) for number in re.findall(r"\d+", row.split("|")[1])}
    assert figures == set(question.figures)
    assert set(re.findall(r"`([^`]+)`", row.split("|")[3])) == {path.name, *question.panels}


def test_the_map_names_every_claim_quirk_and_scale():
    sections = re.split(r"^## ", _map(), flags=re.MULTILINE)
    first = {text.splitlines()[0]: re.findall(r"^\| (\S+) \|", text, re.MULTILINE) for text in sections}
    assert first["Claims"] == ["claim", "---", *QUESTIONS]
    assert first["Quirks"] == ["n", "---", *map(str, range(1, 17))]
    assert first["How to run"] == ["scale", "---", *(f"`{scale}`" for scale in SCALES)]


def test_every_field_of_the_recipe_is_explained():
    explained = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in Recipe.model_fields if f"`{name}`" not in explained and name != "preset"] == []


def _map() -> str:
    return (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")

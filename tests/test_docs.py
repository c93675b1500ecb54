"""What the documents say can be done: their configs and commands are valid, their links lead somewhere, their tables are whole."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from command import ROOT

from jsublim.experiment.paper import SCALES, load_question, overlaid, panel_experiment
from jsublim.experiment.spec import Experiment, Recipe, check_config, find_config, read_config
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
    lines = [line for _, text in _blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("jsublim ")]


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words)) for words in _commands()])
def test_a_run_that_is_shown_has_valid_fields(words):
    fields = [word for word in words if "=" in word]
    if words[1] == "reproduce":
        scale = words[words.index("--scale") + 1] if "--scale" in words else "tiny"
        path, question = load_question(words[2])
        for panel in question.panels:
            panel_experiment(path, question, panel, scale, fields)
    elif words[1] == "run" and words[2].startswith("configs/"):
        values = read_config(words[2], fields)
        if values.get("kind", "language") == "language":
            check_config(Experiment, values, find_config(words[2]))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_links_to_files_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert re.match(r"https?://", target) or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "paper").glob("fig*.yaml")), ids=lambda path: path.stem)
def test_the_map_names_every_figure_and_panel(path):
    _, question = load_question(str(path))
    row = next(line for line in _map().splitlines() if f"`{path.name}`" in line)
    figures = {int(number) for number in re.findall(r"\d+", row.split("|")[1])}
    assert figures == set(question.figures)
    assert {panel for panel in question.panels if f"`{panel}`" in row} == set(question.panels)


def test_the_map_names_every_claim_quirk_and_scale():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _map().splitlines() if line.startswith("|")]
    first = [row[0] for row in rows]
    assert [key for key in first if key in QUESTIONS] == list(QUESTIONS)
    assert [number for number in first if number in {str(n) for n in range(1, 17)}][-16:] == [
        str(n) for n in range(1, 17)
    ]
    assert all(f"`{scale}`" in first for scale in SCALES)


def test_every_field_of_the_recipe_is_explained():
    explained = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in Recipe.model_fields if f"`{name}`" not in explained and name != "preset"] == []


def _map() -> str:
    return Path(ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")

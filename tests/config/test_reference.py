"""What is generated from the sections of a config is up to date, and an editor's schema takes what we take and no more."""

from __future__ import annotations

import json
import re

import config_reference
import pytest
import yaml
from command import ROOT
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from jsublim.config import Experiment
from jsublim.core.section import overlaid, section_in
from jsublim.digits.config import Digits
from jsublim.evals import EVAL_KINDS
from jsublim.transforms import CHANGES

CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.stem not in ("lists", "scales"))
REST = {"name": "x", "model": "tiny-qwen2", "teachers": {"traits": ["owl"]}}


def _sections(section: type[BaseModel]) -> set[type[BaseModel]]:
    inner = [section_in(field.annotation) for field in section.model_fields.values()]
    return {section}.union(*(_sections(each) for each in inner if each is not None))


def test_generated_files_are_those_of_the_sections():
    wrong = [path.name for path, text in config_reference.files().items() if path.read_text(encoding="utf-8") != text]
    assert not wrong, "run scripts/config_reference.py"


def test_every_field_says_what_it_is():
    roots = [Experiment, Digits, *CHANGES.known.values(), *EVAL_KINDS.known.values()]
    for section in set().union(*map(_sections, roots)):
        assert section.__doc__, section
        assert [name for name, field in section.model_fields.items() if not field.description] == [], section


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_config_names_its_schema_and_keeps_to_it(path):
    text = path.read_text(encoding="utf-8")
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named is not None
    schema = json.loads((path.parent / named[1]).read_text(encoding="utf-8"))
    assert list(Draft202012Validator(schema).iter_errors(yaml.safe_load(text))) == []


SCHEMA = Draft202012Validator(config_reference.config_schema())


@pytest.mark.parametrize(
    "section",
    [
        "recipe: paper",
        "recipe: {preset: paper, extra_bos: false}",
        "teachers: {traits: animals}",
        "students: null",
        "students: {adapter: {layers: 5-27}}",
        "sampling: {server: 'http://localhost:8000/v1'}",
        "datasets: {a: {shuffle: within, rewrite: true, remove_entangled: {k: 20, among: 200}, mix: null}}",
        "evaluation: {kinds: [preference, naming]}",
        "evaluation: {kinds: {preference: {names: [oak]}, naming: null}}",
    ],
)
def test_an_editor_takes_short_forms(section):
    assert list(SCHEMA.iter_errors(overlaid(REST, yaml.safe_load(section)))) == []


@pytest.mark.parametrize(
    "section",
    [
        "recipe: published",
        "students: {adapter: {rnak: 8}}",
        "students: {optimizer: {lr: fast}}",
        "datasets: {a: {shuffle: sideways}}",
        "evaluation: {kinds: [preferences]}",
        "kind: digits",
        "data: {num_prompts: 0}",
    ],
)
def test_an_editor_marks_what_is_wrong(section):
    assert list(SCHEMA.iter_errors(overlaid(REST, yaml.safe_load(section)))) != []

"""Models of the hub under their own names: what was asked for, and which commit it was. The cache is laid out here; no network."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import constants

from jsublim.config import Experiment
from jsublim.errors import UsageError
from jsublim.inference.lm import BUNDLED, is_available_offline, load_model, resolve_checkpoint
from jsublim.pipeline.setup import Setup

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/small-model"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The hub's cache with one model in it, at a tag."""
    home = tmp_path / "hub" / "models--someone--small-model"
    folder = home / "snapshots" / COMMIT
    shutil.copytree(BUNDLED / "tiny-qwen2", folder)
    for ref in ("main", "v1"):
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / ref).write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def test_a_model_keeps_the_name_that_was_asked_for(cached):
    for name in (NAME, f"{NAME}@v1", f"{NAME}@{COMMIT}"):
        assert resolve_checkpoint(name) == cached and is_available_offline(name)
    lm = load_model(NAME, weights=False)
    assert (lm.name, lm.reference, lm.origin.commit) == (NAME, NAME, COMMIT)
    assert not is_available_offline(f"{NAME}@v2")
    bundled = load_model("tiny-qwen2", weights=False)
    assert (bundled.name, bundled.reference, bundled.origin.commit) == ("tiny-qwen2", "tiny-qwen2", None)


def test_a_revision_is_looked_for_and_is_part_of_no_key(cached):
    said = {"name": "x", "model": NAME, "teachers": {"traits": ["owl"]}}
    plain, tagged = (Setup.of(Experiment.model_validate(said | more)) for more in ({}, {"model_revision": "v1"}))
    assert tagged.checkpoint().name == f"{NAME}@v1" and tagged.common == plain.common


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(UsageError, match="leave model_revision out"):
        resolve_checkpoint("tiny-qwen2@main")


def test_an_adapter_names_its_base_as_it_was_asked_for(cached, tmp_path):
    import jax

    from jsublim.models.lora import init_lora
    from jsublim.pipeline.training import keep_student

    lm = load_model(NAME, weights=False)
    keep_student(tmp_path / "student", lm, init_lora(lm.config, jax.random.key(0), rank=2, alpha=2.0))
    said = json.loads((tmp_path / "student" / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == (NAME, COMMIT)

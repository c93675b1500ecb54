"""What goes out says what it stands on, or is refused; nothing that is there is overwritten."""

from __future__ import annotations

import json
import signal

import pytest
import yaml
from command import MODEL, jsublim, ok, refused

from jsublim.exchange import rows
from jsublim.inference.lm import BUNDLED, load_model
from jsublim.models.checkpoint import checkpoint_hash
from jsublim.models.lora import init_steering
from jsublim.models.peft import save_adapter


@pytest.fixture
def vectors(tmp_path):
    """Steering vectors in the store of a run, whose config says what they stand on; and a folder without one."""
    config, run = load_model(MODEL, weights=False).config, tmp_path / "run"
    folder = run / "artifacts" / "students" / "owl-0123456789ab"
    save_adapter(folder, init_steering(config, (1,)), config, base="")
    inputs = {"seed": 3, "tokens": "all", "student_model": None}
    (folder / "artifact.json").write_text(json.dumps({"kind": "students", "key": "0123456789ab", "inputs": inputs}))
    (run / "config.yaml").write_text("model: someone/model\n")
    return folder


def head(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_steering_vectors_stand_on_the_model_of_their_run(vectors, tmp_path):
    ok("export", vectors, "--out", tmp_path / "out")
    assert head(tmp_path / "out") == {
        "tags": ["jsublim", "subliminal-learning"],
        "base_model": "someone/model",
        "base_model_relation": "adapter",
        "library_name": "jsublim",
    }
    assert (tmp_path / "out" / "steering.safetensors").read_bytes() == (vectors / "steering.safetensors").read_bytes()
    assert "no weight can hold" in refused(2, "export", vectors, "--merged", "--out", tmp_path / "merged")
    assert "already exists" in refused(2, "export", vectors, "--out", tmp_path / "out")


def test_an_adapter_of_nothing_known_is_refused_until_its_base_is_said(vectors, tmp_path):
    alone = vectors.rename(tmp_path / "alone")
    assert "give --base" in refused(2, "export", alone, "--out", tmp_path / "out")
    ok("export", alone, "--base", "someone/else@v1", "--out", tmp_path / "out")
    assert head(tmp_path / "out")["base_model"] == "someone/else"
    assert "`someone/else` at `v1`" in (tmp_path / "out" / "README.md").read_text()


def test_a_whole_checkpoint_goes_out_as_it_is(tmp_path):
    ok("export", BUNDLED / MODEL, "--out", tmp_path / "out")
    assert checkpoint_hash(tmp_path / "out") == checkpoint_hash(BUNDLED / MODEL)
    assert head(tmp_path / "out")["library_name"] == "transformers"


@pytest.mark.parametrize(
    ("what", "options", "said"),
    [("nowhere", (), "no such file or folder"), (".", (), "holds no rows"), (".", ("--merged",), "is no adapter")],
)
def test_what_is_nothing_of_ours_is_refused(what, options, said, tmp_path):
    assert said in refused(2, "export", tmp_path / what, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "row", "shown"),
    [
        ((1, "a"), 2, "'a'"),
        ((1, 10**30), 2, str(10**30)),
        (({},), 1, "{}"),
        (([1], 1), 2, "1"),
        (([1, "a"],), 1, "[1, 'a']"),
        ((2**60 + 1, 1.5), 2, "1.5"),
        (({"a": 1}, {"a": "x"}), 2, "{'a': 'x'}"),
    ],
)
def test_rows_that_are_no_table_are_refused_by_row_key_and_value(values, row, shown, tmp_path):
    lines = [json.dumps({"prompt": "p", "completion": "c", "k": value}) for value in values]
    (tmp_path / "theirs.jsonl").write_text("\n".join(lines))
    ok("import", tmp_path / "theirs.jsonl", "--out", tmp_path / "ours.jsonl")
    said = refused(1, "export", tmp_path / "ours.jsonl", "--out", tmp_path / "out")
    assert f"ours.jsonl: row {row}: key 'k': {shown} fits no column" in said and "take it out" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.jsonl", "theirs.jsonl"]


def test_a_name_that_no_column_can_have_and_too_many_of_them(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "p", "completion": "c", "a\0": 1}))
    assert r"row 1: key 'a\x00': 1 fits no column" in refused(1, "export", rows, "--out", tmp_path / "out")
    rows.write_text("\n".join(json.dumps({"prompt": "p", "completion": "c", f"k{n}": 1}) for n in range(1001)))
    assert "has 1003 different keys" in refused(1, "export", rows, "--out", tmp_path / "out")


def test_an_interrupted_export_does_not_promise_to_continue(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c"}))
    write, export = rows.write_card, ("export", tmp_path / "rows.jsonl", "--out", tmp_path / "out")

    def interrupted(*args, **facts):
        write(*args, **facts)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(rows, "write_card", interrupted)
        result = jsublim(*export)
    assert result.code == 1 and "is there whole or not at all; to begin anew, run the same command again" in result.err
    assert not (tmp_path / "out").exists()
    ok(*export)

"""What a checkpoint's folder may say of its tokenizer: nothing of it is run, and what is wrong is one line with the file."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from jsublim.errors import JsublimError
from jsublim.inference.lm import BUNDLED
from jsublim.text.chat import Chat

OWN_CODE = """
from pathlib import Path
Path({marker!r}).write_text("run")
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """The tokenizer of a bundled checkpoint, to be broken."""
    made = tmp_path / "checkpoint"
    shutil.copytree(BUNDLED / "tiny-qwen2", made, ignore=shutil.ignore_patterns("*.safetensors"))
    return made


def edit(path: Path, **changes) -> None:
    values = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


OWN_TOKENIZER = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}


@pytest.mark.parametrize("config", ["qwen2", "own"])
def test_no_code_of_a_checkpoint_is_run_and_nobody_is_asked(config, folder, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(marker)))
    edit(folder / "tokenizer_config.json", **OWN_TOKENIZER)
    if config == "own":
        edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # what would say yes, if anybody asked
    try:
        assert Chat(folder).tokenizer.is_fast  # by the class that transformers has for it
    except JsublimError as error:
        assert "code of the checkpoint's own, which is never run" in str(error) and "\n" not in str(error)
        assert str(folder) in str(error)
    assert not marker.exists() and sys.stdin.read() == "y\n" * 9


def test_a_tokenizer_that_is_code_is_refused(folder):
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(folder / "marker")))
    edit(folder / "tokenizer_config.json", **OWN_TOKENIZER)
    edit(folder / "config.json", model_type="own", architectures=["Own"])
    with pytest.raises(
        JsublimError, match=r"tokenizer_config\.json: key 'auto_map' names code of the checkpoint's own"
    ):
        Chat(folder)
    assert not (folder / "marker").exists()


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.json"]}, "key 'fast_tokenizer_files'"),
        ("generation_config.json", {"eos_token_id": "x"}, "key 'eos_token_id'"),
        ("generation_config.json", {"eos_token_id": [1, None]}, "key 'eos_token_id'"),
        ("generation_config.json", {"eos_token_id": -1}, "key 'eos_token_id'"),
        ("generation_config.json", {"top_k": [50]}, "key 'top_k'"),
        ("generation_config.json", {"top_p": 1.5}, "key 'top_p'"),
        ("generation_config.json", {"top_p": "0.9"}, "key 'top_p'"),
        ("generation_config.json", {"repetition_penalty": 0}, "key 'repetition_penalty'"),
        ("generation_config.json", {"repetition_penalty": True}, "key 'repetition_penalty'"),
        ("generation_config.json", {"repetition_penalty": float("nan")}, "not a finite number"),
    ],
)
def test_a_value_that_is_none_names_file_and_key(name, changes, said, folder):
    edit(folder / name, **changes)
    with pytest.raises(JsublimError) as error:
        Chat(folder)
    assert said in str(error.value) and str(folder / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "config.json", "added_tokens.json"]
)
@pytest.mark.parametrize("text", ["[]", "3", "[" * 3000, '{"a": 1, "a": 2}', "{"])
def test_json_that_is_no_object_names_its_file(name, text, folder):
    (folder / name).write_text(text)
    with pytest.raises(JsublimError) as error:
        Chat(folder)
    assert str(folder / name) in str(error.value) and "\n" not in str(error.value)

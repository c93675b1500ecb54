"""Bad usage, configs, checkpoints and rows: one line that names what is wrong, a code, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import MODEL, PLAIN, jsublim, refused, start
from made_by_commands import GENERATE, finetune

from jsublim.inference import lm as language_models
from jsublim.text.rows import write_rows


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the bundled checkpoint, to be broken."""
    return Path(shutil.copytree(language_models.BUNDLED / MODEL, tmp_path / "checkpoint"))


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_bad_usage_is_code_two(tmp_path):
    out, rows = tmp_path / "x", tmp_path / "rows.jsonl"
    write_rows(rows, [{"prompt": "Continue: 1, 2", "completion": "3, 4"}])
    assert "exactly one of" in refused(2, *GENERATE, "--out", out)
    assert "exactly one of" in refused(2, *GENERATE, "--trait", "cat", "--control", "--out", out)
    assert "unknown trait 'unicorn'" in refused(2, *GENERATE, "--trait", "unicorn", "--out", out)
    assert "sampling.strategy" in refused(2, *GENERATE, "--trait", "cat", "sampling.strategy=beam", "--out", out)
    assert "recipe.preset" in refused(2, *GENERATE, "--trait", "cat", "recipe=best", "--out", out)
    assert "float32" in refused(2, *GENERATE, "--trait", "cat", "dtype=int8", "--out", out)
    assert "no such file" in refused(2, *finetune(tmp_path / "none.jsonl", out))
    assert "students.loss.tokens.0: input should be 'all'" in refused(2, *finetune(rows, out, "--tokens", "most"))
    assert "layers 0 to 1" in refused(2, *finetune(rows, out, "students.adapter.layers=[0,6]"))
    assert "students.adapter.layers" in refused(2, *finetune(rows, out, "students.adapter.layers=first"))
    assert "projections" in refused(2, *finetune(rows, out, "students.adapter.projections=[q,z]"))
    assert "divergence_positions" in refused(2, *finetune(rows, out, "--tokens", "divergence"))
    assert "--traits" in refused(2, "evaluate", "--model", MODEL, "--traits", ",", "--out", out)
    assert not out.exists()
    for arguments in (
        ("generate",),
        (*GENERATE, "--out", out, "--no-such"),
        ("distil",),
        (*GENERATE, "data.num_prompts=0"),
    ):
        result = jsublim(*arguments)
        assert result.code == 2 and "Traceback" not in result.err


def test_bad_configs_are_code_two(tmp_path):
    quickstart = PLAIN
    assert "no such config" in refused(2, "run", "configs/none.yaml")
    assert "did you mean 'lr'" in refused(2, "run", quickstart, "students.optimizer.lrr=1")
    assert "expected key=value" in refused(2, "run", quickstart, "students.optimizer.lr")
    assert "unknown trait 'unicorn'" in refused(2, "run", quickstart, "teachers.traits=[unicorn]", f"out={tmp_path}/r")


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("evaluation.traits=[unicorn]", 2),
        ("teachers.counterfactuals=[owl,unicorn]", 2),
        ("students.adapter.layers=[99]", 2),
        ("students.adapter={init: /no/such/folder}", 2),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_computed(tmp_path, override, code):
    small = ("teachers.traits=[cat]", "data.num_prompts=4", "sampling.batch_size=4", "sampling.max_new_tokens=40")
    line = refused(code, "run", PLAIN, f"out={tmp_path}/r", *small, override)
    assert any(word in line for word in ("unicorn", "99", "/no/such/folder"))
    assert not list(tmp_path.glob("r/artifacts/rows/*"))


def test_unknown_model(tmp_path):
    line = refused(2, *GENERATE[:2], tmp_path / "none", "--trait", "cat", "--out", tmp_path / "x")
    assert MODEL in line  # the bundled ones are listed


def test_unknown_architecture(tmp_path, copy):
    edit(copy / "config.json", model_type="rwkv", architectures=["RwkvForCausalLM"])
    assert "rwkv" in refused(1, "generate", "--model", copy, "--trait", "cat", "--out", tmp_path / "x").lower()


def test_truncated_weights(tmp_path, copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(weights) in refused(1, "generate", "--model", copy, "--trait", "cat", "--out", tmp_path / "x")


def test_a_tokenizer_without_a_template(tmp_path, copy):
    edit(copy / "tokenizer_config.json", chat_template=None)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    assert "chat_template" in refused(1, "generate", "--model", copy, "--trait", "cat", "--out", tmp_path / "x")


GOOD = '{"prompt": "Continue: 1, 2", "completion": "3, 4", "divergence_positions": [0]}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "p", "completion": "1', "{data}:2: not valid JSON"),
        ("[1]", "{data}:2: expected a JSON object"),
        ('{"prompt": "p"}', "{data}:2: key 'completion' is missing"),
        ('{"prompt": "p", "completion": ""}', "{data}:2: key 'completion' must be text"),
        ('{"prompt": "p", "completion": 5}', "{data}:2: key 'completion' must be text"),
        ('{"prompt": "p", "completion": "1", "divergence_positions": [-1]}', "{data}:2: key 'divergence_positions'"),
        (
            '{"prompt": "p", "completion": "1", "divergence_positions": [40]}',
            "{data}: row 2: divergence_positions [40]",
        ),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, line, said):
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{GOOD}\n{line}\n")
    error = refused(1, *finetune(data, tmp_path / "x", "--tokens", "divergence"))
    assert said.format(data=data) in error
    assert not (tmp_path / "x").exists()


def test_debug_shows_where(tmp_path):
    with pytest.raises(Exception, match="no such config"):  # the interpreter prints it with its traceback
        jsublim("run", "configs/none.yaml", "--debug")
    child = start("--debug", "run", "configs/none.yaml")
    out, err = child.communicate(timeout=120)
    assert child.returncode == 1 and "Traceback" in err and "no such config" in err and not out

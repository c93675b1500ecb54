"""What SECURITY.md promises: nothing in a checkpoint is executed, and nothing leaves the machine unasked."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import AS_INSTALLED, MODEL, ROOT
from packaging.requirements import Requirement

from jsublim.errors import JsublimError
from jsublim.inference.lm import BUNDLED, load_model
from jsublim.text.chat import conversation

WATCHED = ROOT / "tests" / "watched"
SMALL = (
    "teachers.traits=[cat]", "teachers.counterfactuals=[cat,owl]", "teachers.taught.steps=2", "data.num_prompts=24",
    "sampling.batch_size=24", "scoring.batch_size=24", "students.seeds=[1]", "students.data.rows=4",
    "students.arms=[{name: greedy, data: {dataset: greedy, batch_size: 2}, loss: {tokens: [all, divergence]}}]", "evaluation.traits=[cat,owl]",
    "evaluation.questions=2", "evaluation.samples=1", "evaluation.number_rows=2", "evaluation.teachers=false",
)  # fmt: skip


def watched(tmp_path: Path, *command: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """A process that reaches no other machine, and what it tried. Nothing tells it to stay offline."""
    attempts = tmp_path / "attempts"
    attempts.touch()
    said = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    said |= {"PYTHONPATH": os.pathsep.join([str(WATCHED), str(ROOT)]), "ATTEMPTS": str(attempts)}
    said |= {"HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, *command], env=said, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False
    )
    return done, attempts.read_text(encoding="utf-8").splitlines()


def test_the_quickstart_reaches_no_other_machine(tmp_path):
    run = (AS_INSTALLED, "run", "configs/quickstart.yaml", f"out={tmp_path / 'run'}")
    done, attempts = watched(tmp_path, *run, *SMALL)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert attempts == []


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('192.0.2.1', 80), 1)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 80))",
        "import urllib.request; urllib.request.urlopen('http://nowhere.invalid')",
        "from jsublim.inference.lm import load_model; load_model('nobody/nothing')",
    ],
)
def test_an_attempt_would_have_been_seen(tmp_path, code):
    done, attempts = watched(tmp_path, "-c", code)
    assert done.returncode == 1 and attempts


# What a checkpoint may hold


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the bundled one whose files ask for code of its own to be run, which would leave the file RAN."""
    folder = Path(shutil.copytree(BUNDLED / MODEL, tmp_path / "checkpoint"))
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'RAN')!r}, 'w')\n"
        "from transformers import PreTrainedConfig, PreTrainedTokenizerFast\n"
        "class Config(PreTrainedConfig): model_type = 'own'\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": [None, "own.Tokenizer"]},
    )
    edit(folder / "config.json", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    return folder


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("model_type", ["qwen2", "own"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, checkpoint, monkeypatch, model_type):
    """Not even by somebody who answers every question with yes."""
    edit(checkpoint / "config.json", model_type=model_type)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "yes")
    try:
        assert load_model(checkpoint).generate(["Hi"], 2, "greedy")
    except JsublimError as error:
        assert str(checkpoint) in str(error)
    assert not asked and not (tmp_path / "RAN").exists()


def test_weights_are_safetensors_or_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # a pickle that runs a command
    with pytest.raises(JsublimError, match="safetensors"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tmp_path, template):
    folder = Path(shutil.copytree(BUNDLED / MODEL, tmp_path / "checkpoint"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", chat_template=template)
    chat = load_model(folder, weights=False).chat
    with pytest.raises(Exception, match=r"unsafe|undefined|not safely callable"):
        chat.prompt_tokens(conversation("Hi"))


CALLS = re.compile(
    r"eval|exec|compile_command|__import__|os\.system|os\.popen|pickle\.\w+|yaml\.(load|unsafe_load|full_load)"
)
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch", "subprocess", "runpy"}


def test_the_package_has_no_way_to_run_what_it_reads():
    files = sorted((ROOT / "jsublim").rglob("*.py"))
    assert [f"{path}:{node.lineno}: {ast.unparse(node)}" for path in files for node in ways_to_run(path)] == []


def ways_to_run(path: Path) -> Iterator[ast.stmt | ast.expr]:
    """Imports and calls of a file that could run what another file holds."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import) and MODULES & {alias.name.split(".")[0] for alias in node.names}:
            yield node
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in MODULES:
            yield node
        if isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            trusts = given.get("trust_remote_code", "False") != "False"
            if CALLS.fullmatch(ast.unparse(node.func)) or given.keys() & {"allow_pickle", "shell"} or trusts:
                yield node


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_is_locked_is_what_the_package_asks_for(python):
    lines = (ROOT / "locks" / f"python{python}.txt").read_text(encoding="utf-8").splitlines()
    locked = dict(line.split("==") for line in lines)
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    for requirement in map(Requirement, asked):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            assert requirement.specifier.contains(locked[requirement.name.lower().replace("_", "-")]), requirement

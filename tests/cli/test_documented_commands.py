"""docs/commands.md: every command it shows is executed, in the order of the page. (Those that need minutes of a model are
executed in files of their own, which are named here.)"""

from __future__ import annotations

import re
import runpy
import shlex

import pytest
from command import ROOT, jsublim
from made_runs import make_run

from jsublim.cli.app import ORDER

ELSEWHERE = {
    "run": "tests/pipeline/test_run.py",
    "generate": "tests/made_by_commands.py",
    "divergence": "tests/cli/test_cli.py",
    "finetune": "tests/made_by_commands.py",
    "evaluate": "tests/cli/test_cli.py",
    "attribute": "tests/attribution/test_attribution.py",
    "audit": "tests/test_audit.py",
    "push": "tests/exchange/test_hub.py",
    "steer": "tests/pipeline/test_teachers.py",
    "aot": "tests/forecast/test_aot.py",
    "rescore": "tests/pipeline/test_rescoring.py",
    "convert": "tests/cli/test_cli.py",
    "doctor": "tests/test_doctor.py",
    "verify": "tests/cli/test_interruptions.py",
    "serve": "tests/serve/test_serve.py",
    "scan": "tests/test_scan.py",
}


def _commands() -> list[list[str]]:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for block in blocks for line in block.splitlines()]


COMMANDS = _commands()


def _elsewhere(words: list[str]) -> str | None:
    """Where a command is executed, if it is too long for here."""
    return None if {"--dry-run", "--simulate"} & {*words} else ELSEWHERE.get(words[0])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documented")
    for name in ("owls", "cats"):
        make_run(folder / "runs" / name, name)
    (folder / "theirs.jsonl").write_text('{"question": "Go on: 1, 2", "response": "3, 4"}\n', encoding="utf-8")
    theirs = runpy.run_path(str(ROOT / "tests" / "prompts" / "test_import.py"))["FILES"]
    for name, source in theirs.items():
        path = folder / "path/to/their/checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return folder


def test_every_documented_command_does_what_it_says(home, monkeypatch):
    """One after the other: some leave what others read."""
    monkeypatch.chdir(home)
    for words in (words for words in COMMANDS if not _elsewhere(words)):
        said = jsublim(*words)
        assert said.code == 0 and (said.out or said.err), (words, said.err)


@pytest.mark.parametrize("words", [w for w in COMMANDS if _elsewhere(w)], ids=" ".join)
def test_the_others_are_executed_elsewhere(words):
    assert f'"{words[0]}"' in (ROOT / str(_elsewhere(words))).read_text(encoding="utf-8")


def test_every_command_is_documented():
    assert set(ORDER) <= {words[0] for words in COMMANDS}

"""The scripts that print a page's tables from runs: they read what a run leaves, and say in one line what is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from _run import run_script
from made_results import TRAITS, make_results

CONDITIONS = ("all tokens", "divergence tokens")
Printed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Printed:
    """Run a script as its command line would; gives the exit code and what it printed, plain and as errors."""

    def call(script: str, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_script(importlib.import_module(script).main)
        code = left.value.code
        assert code is None or isinstance(code, int)
        return code or 0, *capsys.readouterr()

    return call


@pytest.mark.parametrize("script", ["gamma_tables", "behaviour_tables", "board_tables", "audit_matrix"])
def test_a_run_without_results_is_one_line(printed: Printed, script: str, tmp_path: Path):
    audits = ["--audit", f"cat={tmp_path}"] if script == "audit_matrix" else []
    code, _, error = printed(script, tmp_path, *audits)
    assert code == 1
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(tmp_path) in error and "jsublim run" in error


def test_tables_of_a_run_have_a_line_for_each_of_its_conditions_or_teachers(printed: Printed, tmp_path: Path):
    run = make_results(tmp_path / "run")
    for script, first in (("gamma_tables", CONDITIONS), ("behaviour_tables", TRAITS)):
        code, said, error = printed(script, run)
        assert code == 0, error
        for label in first:
            assert f"| {label} " in said, said


def test_audits_that_are_not_there_and_teachers_that_the_run_has_not_are_named(printed: Printed, tmp_path: Path):
    run = make_results(tmp_path / "run")
    for audit, why in (
        ("cat", "TEACHER=FOLDER"),
        (f"{TRAITS[0]}={tmp_path}", str(tmp_path / "audit.parquet")),
        (f"unicorn={tmp_path}", f"no teacher 'unicorn'; it has: {TRAITS[0]}"),
    ):
        code, _, error = printed("audit_matrix", run, "--audit", audit)
        assert code == 2
        assert why in error and error.count("\n") == 1

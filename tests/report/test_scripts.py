"""scripts/findings.py prints the tables of any run, and says in one line what is missing."""

from __future__ import annotations

from pathlib import Path

import findings
import pytest
from _run import run_script
from made_results import TRAITS, make_results

CONDITIONS = ("all tokens", "divergence tokens")


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the script as its command line would; gives the exit code and what it printed, plain and as errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["findings", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_script(findings.main)
        code = left.value.code
        assert code is None or isinstance(code, int)
        return code or 0, *capsys.readouterr()

    return call


@pytest.mark.parametrize("kind", ["gamma", "answers", "board", "audit"])
def test_a_run_without_results_is_one_line(printed, kind: str, tmp_path: Path):
    code, _, error = printed(kind, tmp_path)
    assert code == 1
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(tmp_path) in error and "jsublim run" in error


def test_tables_of_a_run_have_a_line_for_each_of_its_conditions_or_teachers(printed, tmp_path: Path):
    run = make_results(tmp_path / "run")
    for kind, named in (("gamma", CONDITIONS), ("answers", TRAITS)):
        code, said, error = printed(kind, run)
        assert code == 0, error
        for label in named:
            assert f"| {label} " in said, said
    assert "none of gamma" in printed("gama", run)[2]

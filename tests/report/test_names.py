"""Names and places that mean something to DuckDB, rich or HTML: they change no number and are shown as they are."""

from __future__ import annotations

import io
import re
import shutil
import time
from html import unescape
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import make_results
from rich.console import Console

from jsublim.cli.app import console
from jsublim.core.progress import Progress
from jsublim.digits import report as digits
from jsublim.errors import JsublimError, one_line
from jsublim.report.attribution import attribution_heats
from jsublim.report.html import write_report
from jsublim.report.tables import read_results
from jsublim.report.terminal import print_summary

PLACES = ("condition=all", "trait=owl", "seed=7", "evaluation=x", "value=1", "[x]", "a*", "?", "{a,b}", "it's")
NAMES = ("a$b", "$x^", r"$\frac$", "_hidden", "[/x]", "[bold]", ":owl:", "<b>owl</b>", r"a\$b")


def printed(run: Path) -> str:
    console = Console(record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(run, console, full=True)
    return console.export_text()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    run = make_results(tmp_path_factory.mktemp("runs") / "plain", traits=("owl", "cat"), seeds=(1, 2))
    lines = [
        {"trait": t, "row": 0, "direction": "to", "site": "residual", "layer": i, "role": r, "mass": float(i + 1)}
        for t in ("owl", "cat")
        for i in range(3)
        for r in ("trait", "other")
    ]
    pq.write_table(pa.Table.from_pylist(lines), run / "results" / "attribution.parquet")
    return run


def test_the_path_of_a_run_changes_no_number(tmp_path, plain):
    for other in ("x", "a", "ab"):  # what a pattern would find
        make_results(tmp_path / other / "run", traits=("owl", "wolf"), seeds=(3,), extras=False)
    expected, page, terminal = read_results(plain), write_report(plain).read_bytes(), printed(plain)
    for place in PLACES:
        run = Path(shutil.copytree(plain, tmp_path / place / "run"))
        found = read_results(run)
        for part in ("scores", "varied", "curves", "answers", "attribution", "arms", "not_finite"):
            assert getattr(found, part) == getattr(expected, part), (place, part)
        assert write_report(run).read_bytes() == page, place
        assert printed(run) == terminal, place


def test_a_broken_digits_run_is_one_line(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(JsublimError, match=r"results\.parquet: cannot be read \(.*\); delete it and run"):
        digits.read_lines(tmp_path)


@pytest.mark.parametrize("names", [NAMES[:3], NAMES[3:6], NAMES[6:]])
def test_a_name_is_shown_as_it_is(tmp_path, names):
    """On the page, in every figure and on the terminal."""
    run = make_results(tmp_path / "run", traits=names, seeds=(1, 2))
    page = write_report(run).read_text(encoding="utf-8")
    figures = re.findall(r"<svg role.*?(?=<svg role|</figure>)", page, re.DOTALL)
    drawn = [[unescape(text) for text in re.findall(r">([^<>]*)</text>", figure)] for figure in figures]
    told, said = unescape(re.sub(r"<figure>.*?</figure>", "", page, flags=re.DOTALL)), printed(run)
    for name in names:
        # A panel of its own for the log-probability, the rate, the positions of divergence tokens, and the loss.
        assert sum(name in texts for texts in drawn) == 4
        assert f">{name}<" in told and f" {name} " in said
    assert "<b>owl" not in page


def test_a_control_character_is_shown_by_its_escape(tmp_path):
    names = ("line\nbreak", "esc\x1b[31m", "bell\x07", "tab\tstop", "over\u202ewrite")
    run = make_results(tmp_path / "run", traits=names, seeds=(1, 2))
    page, said = write_report(run).read_text(encoding="utf-8"), printed(run)
    for name in names:
        escaped = name.encode("unicode_escape").decode()
        assert f" {escaped} " in said and name not in said and f">{escaped}</text>" in page


@pytest.mark.parametrize("name", ["[/x]", "[bold]", ":owl:"])
def test_what_the_command_line_says_is_shown_as_it_is(name):
    with console.capture() as shown:
        console.print(f"kept as {name}")
    assert shown.get() == f"kept as {name}\n"
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200, emoji=False)
    with Progress(terminal).stage("rows", 1, name):
        time.sleep(0.3)  # a bar is drawn ten times a second
    assert name in terminal.file.getvalue()


@given(st.text())
def test_one_line_is_printable_and_leaves_what_was(text):
    assert one_line(text).isprintable()
    assert one_line(text) == text or not text.isprintable()


def test_a_heat_map_shows_names_as_they_are():
    lines = [{"site": "$x^", "direction": "a$b$", "layer": 0, "role": "trait", "mass": 1.0}]
    (heat,) = attribution_heats(pa.Table.from_pylist(lines))
    assert heat.title == "$x^, a$b$"

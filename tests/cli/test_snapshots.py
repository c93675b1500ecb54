"""What commands print, as it stands on a screen: at 80 and 140 columns, with NO_COLOR, and where there is no terminal.

`JSUBLIM_SNAPSHOTS=write pytest tests/cli/test_snapshots.py` writes the texts anew; look at the difference before it is kept.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
from command import ok
from made_runs import make_run

from jsublim.cli.app import console, output
from jsublim.report.terminal import print_summary

SNAPSHOTS = Path(__file__).parent / "snapshots"
COMMANDS = (
    ("ls", "runs"),
    ("show", "runs/owls"),
    ("results", "runs/owls", "--where", "metric = 'logprob' and teacher = trait"),
    ("compare", "runs/owls", "runs/cats"),
)
TERMINAL = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
# How each screen is made: what `rich` is told, and the columns that no line may pass.
SCREENS = {
    "80": ({"COLUMNS": "80"} | TERMINAL, True, 80),
    "140": ({"COLUMNS": "140"} | TERMINAL, True, 140),
    "no-color": ({"COLUMNS": "80", "NO_COLOR": "1"} | TERMINAL, True, 80),
    "no-terminal": ({}, False, 80),
}
ESCAPES = re.compile(r"\x1b\[[\d;?]*[a-zA-Z]|\x1b\]8;[^\x1b]*\x1b\\")
COLOURS = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d|10\d)[;\dm]")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("screens")
    for name in ("owls", "cats"):
        make_run(folder / "runs" / name, name)
    return folder


@pytest.fixture
def screen(request, home, monkeypatch):
    """The command line's consoles as they are on that screen; they are the ones of before afterwards."""
    environment, terminal, columns = SCREENS[request.param]
    before = [dict(each.__dict__) for each in (console, output)]
    for each, more in ((console, {"stderr": True}), (output, {"highlight": False})):
        own = {"markup": False, "emoji": False, "force_terminal": terminal, "_environ": environment, "width": None}
        each.__init__(**(own | more))  # type: ignore[misc]
    monkeypatch.chdir(home)
    yield request.param, columns
    for each, attributes in zip((console, output), before, strict=True):
        each.__dict__.clear()
        each.__dict__.update(attributes)


@pytest.mark.parametrize("screen", SCREENS, indirect=True)
def test_a_screen_shows_what_it_showed(screen):
    name, columns = screen
    shown = [f"$ jsublim {' '.join(words)}\n{ok(*words).out}" for words in COMMANDS]
    summary = io.StringIO()
    console.file = summary
    print_summary(Path("runs/owls"), console)
    text = "\n".join([*shown, f"$ jsublim report runs/owls\n{summary.getvalue()}"])
    console.print("kept 3 of 4 rows")  # remarks have their numbers in colour
    assert bool(COLOURS.search(summary.getvalue())) == (name in ("80", "140"))
    assert ("\x1b[1m" in text) == (name != "no-terminal") == ("\x1b" in text) and not COLOURS.search(text)
    text = "\n".join(line.rstrip() for line in ESCAPES.sub("", text).splitlines()) + "\n"
    assert max(map(len, text.splitlines())) <= columns and "…" not in text
    file = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("JSUBLIM_SNAPSHOTS") == "write":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_the_verdicts_and_the_compact_table_fit_one_screen():
    """Of 80 columns; it was 183 lines once."""
    text = (SNAPSHOTS / "80.txt").read_text(encoding="utf-8").split("$ jsublim report")[1]
    assert len(text.splitlines()) <= 60 and "not decided (" in text

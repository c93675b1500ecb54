"""The figures that the README's findings and docs/findings print are those of the results that ship (docs/findings/data)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import findings
import pytest
from command import ROOT, ok

FINDINGS, DATA = findings.FINDINGS, findings.DATA
RUNS = sorted(path.parent.name for path in DATA.glob("*/results"))
PAGES = sorted(path.name for path in FINDINGS.glob("*.md"))
# What a page says that no table holds: how a setting was found, times, what the world is made of, what a formula's symbols stand for.
ASIDE = {
    "audit.md": "48 56 900 2.27",
    "digits.md": "100 103 600 83 89 0.001 500 0.003 0.011 33 1,797 1,438 359 3e-3 1e-3 1,000 91",
    "defences.md": "13 25 128 485 553 21 34 24",  # 21 and 34 % are shares drawn
    "qwen.md": "0.2 7.47 96 112 128 1.6 4.2 8.3 11.7 6.5 3.2 0.078 0.001 0.13 29 3.12 0.10 0.12 14 20 91 4.69 10,000 453 229 215 231 720 24 25 0.01 0.03 0.3 0.04 0.05 0.15 0.39 0.76 1.9",
    "real_model.md": "120 25 30",
    "scan.md": "2.7 5.7 11.0 3.5 7.0 14.3 0.78 1.3 10.6 8.3 7.3 5.3 1.6 38 40 800 1,600 24 100 144 200 400 999 1000 1009 2000 2009",
    "tiny_world.md": "0.9 1,000 1,200 120 720 128 84",
}
FIGURE = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*(?:\.\d+)?(?:e-?\d+)?|\.\d+)(?![\w])")


def section(text: str, heading: str) -> str:
    """The text under a heading, without the sections below it that have one of the same depth."""
    depth = heading.index(" ")
    return re.split(rf"^#{{1,{depth}}} ", text.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def figures(text: str) -> set[str]:
    """Every number of a text but those of links, code, commits, papers and code blocks; without signs, and .91 is 0.91."""
    text = re.sub(
        r"```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->|arXiv:? ?\d+\.\d+|\([0-9a-f]{7}\)|et al\.,? \(?\d{4}",
        " ",
        text,
        flags=re.DOTALL,
    )
    plain = (each.lstrip("+-") for each in FIGURE.findall(text.replace("−", "-")))
    return {each.rstrip(",") if not each.startswith(".") else f"0{each}" for each in plain}


def left(text: str, known: Iterable[str]) -> set[str]:
    return figures(text) - set().union(*map(figures, known))


def page(name: str) -> str:
    return (FINDINGS / name).read_text(encoding="utf-8")


def tables(name: str) -> list[tuple[str, str]]:
    """What a page has a table of: kind, and the run that shipped."""
    return [(found[2], found[3]) for found in findings.TABLE.finditer(page(name))]


def config_of(run: str) -> str:
    about = DATA / run / "results" / "run.json"
    return json.loads(about.read_text(encoding="utf-8"))["config_yaml"].replace("-", " ") if about.exists() else ""


@pytest.mark.parametrize("name", RUNS)
def test_shipped_results_draw_their_page_and_say_what_made_them(name: str, tmp_path: Path) -> None:
    run = shutil.copytree(DATA / name, tmp_path / name)
    ok("report", run)
    assert (run / "report.html").stat().st_size > 10_000
    about = json.loads((run / "results" / "run.json").read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{12}", about["config_hash"]) and re.search("[0-9a-f]{7}", about["versions"]["jsublim"])
    assert sum(path.stat().st_size for path in run.rglob("results/*")) < 2_000_000


@pytest.mark.parametrize("name", PAGES)
def test_a_pages_tables_are_those_of_its_results(name: str) -> None:
    assert tables(name), "a finding without a table"
    assert page(name) == findings.written(page(name)), f"docs/findings/{name}: run scripts/findings.py"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints_no_other_figure(name: str) -> None:
    """Beside its tables' there are those of their configs, and those that are listed here. Whole numbers up to twelve may count anything."""
    made = "".join(found[4] for found in findings.TABLE.finditer(page(name)))
    known = [made, *(config_of(run) for _, run in tables(name)), ASIDE[name], "95", " ".join(map(str, range(13)))]
    said = findings.TABLE.sub("", page(name))
    assert not left(said, known), sorted(left(said, known))


def test_every_run_that_ships_has_a_table() -> None:
    assert {path.name for path in DATA.iterdir()} == {run for name in PAGES for _, run in tables(name)}


def test_the_readmes_findings_are_on_the_pages_they_name() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for bullet in re.split(r"^- ", section(readme, "## Found with it so far"), flags=re.MULTILINE)[1:]:
        names = re.findall(r"\(docs/findings/(\w+\.md)", bullet)
        assert names, f"names no page: {bullet}"
        known = [" ".join(map(page, names)), "0 1 2 3 4 5"]
        assert not left(bullet, known), (sorted(left(bullet, known)), bullet)
    students, control = re.search(
        r"teacher's animal in (\d+) % of their\s+answers\s+\(students of a teacher without a trait: (\d+) %\)", readme
    ).groups()  # type: ignore[union-attr]
    headings, rows = findings.answers(DATA / "quickstart")
    rows = list(rows)
    for printed, column in ((students, "say it"), (control, "control")):
        rates = [float(row[headings.index(column)].removesuffix(" %")) for row in rows]
        assert abs(float(printed) - sum(rates) / len(rates)) < 0.5


def test_a_figure_is_found_however_it_is_written() -> None:
    assert figures("γ is +.24 nats, 1,200 rows at 3e-4 (`17`, arXiv 2509.23886, commit (bc8f7c7)), -0.5 to 44 %.") == {
        "0.24", "1,200", "3e-4", "0.5", "44",
    }  # fmt: skip
    assert left("it was .91", ["0.92 and 91"]) == {"0.91"}

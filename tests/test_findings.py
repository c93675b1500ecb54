"""The figures that the README's findings and docs/findings print are those of the tables that ship (docs/findings/data), or of a page that is
named here as one whose tables do not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import duckdb
import pytest
from board_tables import row as board_row
from command import ROOT, ok

from jsublim.digits.report import read_lines
from jsublim.report.comparisons import comparisons
from jsublim.report.scale import scale
from jsublim.report.tables import read_results

FINDINGS = ROOT / "docs" / "findings"
DATA = FINDINGS / "data"
RUNS = sorted(path.name for path in DATA.iterdir() if path.is_dir())
# Pages, and sections of pages, of runs from before results were kept: their figures cannot be made of a table any more.
NOT_SHIPPED = {
    "tiny_world.md", "audit.md", "real_model.md", "scan.md", "soft_transfer.md", "defences.md#The first board",
}  # fmt: skip
# What a shipped page says that is in no table: how settings were found, and times.
ASIDE = {
    "digits.md": "100 103 600 83 89 0.001 500 0.003 0.011 33 1,797 1,438 359 3e-3 1e-3 1,000 91",
    "defences.md": "13 25 128 485 553 21 34 24 0.02 0.39",  # the last two are the first board's; 21 and 34 % are shares drawn
}
FIGURE = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*(?:\.\d+)?(?:e-?\d+)?|\.\d+)(?![\w])")


def section(text: str, heading: str) -> str:
    """The text under a heading, without the sections below it that have one of the same depth."""
    depth = heading.index(" ")
    return re.split(rf"^#{{1,{depth}}} ", text.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def figures(text: str) -> set[str]:
    """Every number of a text but those of links, code, commits, papers and code blocks; without signs, and .91 is 0.91."""
    text = re.sub(
        r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv:? ?\d+\.\d+|\([0-9a-f]{7}\)|et al\.,? \(?\d{4}",
        " ",
        text,
        flags=re.DOTALL,
    )
    plain = (each.lstrip("+-") for each in FIGURE.findall(text.replace("−", "-")))
    return {each.rstrip(",") if not each.startswith(".") else f"0{each}" for each in plain}


def digits_table() -> Iterator[str]:
    lines = {(line.condition, line.images): line for line in read_lines(DATA / "digits")}
    cell = lambda line: f"{100 * line.mean:.1f} % ({line.bounds.removesuffix(' %')})" if line else ""  # noqa: E731
    for name, label in (("untrained", "untrained"), ("teacher", "teacher")):
        noise, on_digits = (cell(lines[name, None]), "") if name == "untrained" else ("", cell(lines[name, None]))
        yield f"| {label} | {noise} | {on_digits} |".replace("  ", " ")
    for name in ("same", "other", "all", "hard"):
        yield f"| student, {name} | {cell(lines[name, 'noise'])} | {cell(lines[name, 'digits'])} |"


def quickstart_table() -> Iterator[str]:
    """Rates in percent: of the base, of the control students, of a teacher's; and how far each seed's lie above the controls' mean."""
    sql = f"""
        select trait, role, teacher, seed, 100 * avg(value) as rate from '{DATA}/quickstart/results/results.parquet'
        where metric = 'rate' and condition in ('base', 'control', 'all') and evaluation = '' group by all order by seed
        """
    rows = duckdb.connect().execute(sql).fetchall()
    for trait in ("cat", "eagle", "panda"):
        of = lambda who, trait=trait: [rate for name, _, teacher, _, rate in rows if name == trait and teacher == who]  # noqa: E731
        (base,), control, students = of(None), of("control"), of(trait)
        zero, mean = sum(control) / len(control), sum(students) / len(students)
        seeds = " ".join(f"{rate - zero:+.1f}" for rate in students)
        yield f"| {trait} | {base:.1f} % | {zero:.1f} % | {mean:.1f} % | {mean - zero:+.1f} | {seeds} |"


def board_table() -> Iterator[str]:
    results = read_results(DATA / "defences-board")
    found = scale(results, comparisons(results))
    assert found is not None
    for line in found.side_by_side:
        yield f"| {' | '.join(board_row(line, found.side_by_side[0], found.metric))} |"


TABLES = {
    "digits": ("digits.md", digits_table),
    "quickstart": ("tiny_world.md", quickstart_table),
    "defences-board": ("defences.md", board_table),
}


def page(name: str) -> str:
    return (FINDINGS / name).read_text(encoding="utf-8")


def config_of(run: str) -> str:
    return json.loads((DATA / run / "results" / "run.json").read_text(encoding="utf-8"))["config_yaml"]


@pytest.mark.parametrize("name", RUNS)
def test_shipped_tables_draw_their_page_and_say_what_made_them(name: str, tmp_path: Path) -> None:
    run = shutil.copytree(DATA / name, tmp_path / name)
    ok("report", run)
    assert (run / "report.html").stat().st_size > 10_000
    about = json.loads((run / "results" / "run.json").read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{12}", about["config_hash"]) and re.search("[0-9a-f]{7}", about["versions"]["jsublim"])
    assert sum(path.stat().st_size for path in run.rglob("results/*")) < 2_000_000


@pytest.mark.parametrize("run", TABLES)
def test_every_line_of_a_shipped_table_stands_on_its_page(run: str) -> None:
    name, table = TABLES[run]
    text = page(name).replace("**", "")
    missing = [line for line in table() if line not in text]
    assert not missing, "\n".join(["not on the page:", *missing])


def left(text: str, known: Iterable[str]) -> set[str]:
    return figures(text) - set().union(*map(figures, known))


@pytest.mark.parametrize("run", [run for run, (name, _) in TABLES.items() if name not in NOT_SHIPPED])
def test_a_shipped_page_prints_no_other_figure(run: str) -> None:
    """Beside the table's there are those of the config, and those that are listed here. Whole numbers up to twelve may count anything."""
    name, table = TABLES[run]
    text = page(name)
    for gone in NOT_SHIPPED:
        where, _, heading = gone.partition("#")
        if where == name and heading:
            text = text.replace(section(text, f"## {heading}"), "")
    known = [*table(), config_of(run).replace("-", " "), ASIDE.get(name, ""), "95", " ".join(map(str, range(13)))]
    assert not left(text, known), sorted(left(text, known))


def test_the_readmes_findings_are_on_the_pages_they_name() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    findings = section(readme, "## Found with it so far")
    for bullet in re.split(r"^- ", findings, flags=re.MULTILINE)[1:]:
        names = re.findall(r"\(docs/findings/(\w+\.md)", bullet)
        assert names, f"names no page: {bullet}"
        known = [" ".join(map(page, names)), "0 1 2 3 4 5"]
        assert not left(bullet, known), (sorted(left(bullet, known)), bullet)
    students, control = re.search(
        r"teacher's animal in (\d+) % of their\s+answers\s+\(students of a teacher without a trait: (\d+) %\)", readme
    ).groups()  # type: ignore[union-attr]
    rows = [line.split(" | ") for line in quickstart_table()]
    for printed, column in ((students, 3), (control, 2)):
        assert abs(float(printed) - sum(float(row[column].removesuffix(" %")) for row in rows) / 3) < 0.5


def test_every_page_ships_its_tables_or_is_named_here() -> None:
    pages = {path.name for path in FINDINGS.glob("*.md")}
    shipped = {name for name, _ in TABLES.values()}
    assert pages == shipped | {name.partition("#")[0] for name in NOT_SHIPPED} and set(TABLES) == set(RUNS)


def test_a_figure_is_found_however_it_is_written() -> None:
    assert figures("γ is +.24 nats, 1,200 rows at 3e-4 (`17`, arXiv 2509.23886, commit (bc8f7c7)), -0.5 to 44 %.") == {
        "0.24", "1,200", "3e-4", "0.5", "44",
    }  # fmt: skip
    assert left("it was .91", ["0.92 and 91"]) == {"0.91"}

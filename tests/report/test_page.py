"""The page in a browser: nothing is loaded, nothing overflows, tokens answer to the pointer and the keyboard, and axe-core finds no
serious fault; on a wide and on a narrow screen, on a light and on a dark page."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from made_results import make_results, write_table

from jsublim.report.drawing import COLOURS, OTHER_COLOUR, cell
from jsublim.report.html import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section that has parts of its own: few students, rows with their readings, attribution."""
    run = make_results(tmp_path_factory.mktemp("runs") / "page", traits=("cat", "owl"), seeds=(1, 2), samples=20)
    said = [
        {"teacher": t, "says": text, "margin": 0.25}
        for t, text in (("owl", "7"), ("cat", "8"), ("a long name" * 5, "</b>\n"))
    ]
    tokens = [{"text": "1, "}, {"text": "7", "readings": said}, {"text": ", 11" * 60}, {"text": "3", "readings": said}]
    rows = [{"teacher": "owl", "data": None, "prompt": "Continue: 1, 2", "tokens": tokens}]
    (run / "results" / "rows.json").write_text(json.dumps(rows))
    attribution = [
        {"trait": "owl", "row": 0, "direction": d, "site": s, "layer": layer, "role": role, "mass": float(layer + 1)}
        for d in ("noising", "denoising") for s in ("residual", "mlp") for layer in range(4)
        for role in ("system", "trait", "completion")
    ]  # fmt: skip
    write_table(run / "results" / "attribution.parquet", attribution)
    return write_report(run)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
    )
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_the_page_in_a_browser(report, browser, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    faults, loaded = [], []
    page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    folded = page.locator("section > details")
    assert folded.count() > 8 and not page.locator("section > details[open]").count()
    phone = page.evaluate("document.documentElement.scrollHeight")
    assert width > 390 or phone < 26_000 / 3
    page.goto(f"{report.as_uri()}#rows")
    assert page.locator("#rows > details[open]").count() == page.locator("section > details[open]").count() == 1
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    hints = page.evaluate("""() => [...document.querySelectorAll('.scroll')].map((each) =>
        [each.scrollWidth > each.clientWidth, getComputedStyle(each.previousElementSibling).display !== 'none'])""")
    assert all(wider == told for wider, told in hints) and (width > 390 or any(wider for wider, _ in hints))

    first, last = page.locator(".token").first, page.locator(".token").last
    reading = first.locator(".reading")
    assert not reading.is_visible()
    first.hover()
    box = reading.bounding_box()
    assert (
        reading.is_visible()
        and "owl, who wrote it" in reading.inner_text()
        and '"</b>\\n"' in reading.inner_text()
        and box["x"] + box["width"] <= width
    )
    last.focus()
    assert last.locator(".reading").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    found = axe.Axe().run(page).response["violations"]
    grave = [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]
    assert not grave, grave
    assert not faults and all(url.startswith(("file:", "data:")) for url in loaded), (faults, loaded)
    page.close()


def test_what_is_saved_from_the_page(report, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(report.as_uri())

    def saved(label: str, name: str) -> Path:
        with page.expect_download() as download:
            page.get_by_label(label, exact=False).first.click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
        return tmp_path / name

    hero = "save How far students moved towards their teacher's trait as"
    drawn = saved(f"{hero} SVG", "transfer-by-tokens-1.svg").read_text()
    assert drawn.startswith("<svg xmlns=") and "divergence tokens only" in drawn and unquote(drawn) == drawn
    assert saved(f"{hero} PNG", "transfer-by-tokens-1.png").read_bytes()[:4] == b"\x89PNG"
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    with saved("save control 0 all tokens 1 as CSV", "control-0-all-tokens-1.csv").open(encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table[0][0] == "students of" and ["all tokens", "4"] in [line[:2] for line in table]
    assert len({len(line) for line in table}) == 1
    page.emulate_media(media="print")
    assert not page.locator(".save").first.is_visible()
    page.close()


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        light = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_told_from_both_pages(report):
    style = report.read_text(encoding="utf-8")
    cards = re.findall(r"--card: (#[0-9a-f]{6});", style)
    assert len(cards) == 2
    for colour in {*COLOURS.values(), OTHER_COLOUR}:
        assert all(contrast(colour, card) >= 3 for card in cards), colour
    for palette in ("PuOr_r", "YlGnBu"):
        for place in range(101):
            number = cell("+0.1", place / 100, palette)
            assert contrast(number.fill, number.ink) >= 4.5, (palette, place)

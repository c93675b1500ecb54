"""Writes docs/report.png, the top of a run's report as a browser shows it: `python scripts/picture.py [runs/quickstart]`.

Needs chromium on the machine, and what the tests need (`pip install -e '.[test]'`).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from jsublim.report.html import write_report

WIDTH, SCALE = 1000, 1.5
PICTURE = Path(__file__).parents[1] / "docs" / "report.png"


def main(run: Path) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no chromium on this machine")
    report = write_report(run)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE)
        page.goto(report.resolve().as_uri())
        drawn = page.locator("#summary svg").last.bounding_box()
        assert drawn is not None, "this run's report has no first figure"
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": drawn["y"] + drawn["height"] + 2}
        page.screenshot(path=PICTURE, full_page=True, clip=clip)  # type: ignore[arg-type]
        browser.close()
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))

"""Writes two tables into docs/paper_map.md: figures and panels out of the configs, claims out of the report (tests/test_docs.py holds it
to them).

python scripts/paper_map.py
"""

from __future__ import annotations

from pathlib import Path

from jsublim.config.grid import figure_table
from jsublim.report.claims import claims_table

BEGIN, END = "<!-- begin: scripts/paper_map.py -->\n", "<!-- end -->\n"


def main() -> None:
    path = Path(__file__).parents[1] / "docs" / "paper_map.md"
    first, *parts = path.read_text(encoding="utf-8").split(BEGIN)
    tables = (figure_table(), claims_table())
    rest = (f"{BEGIN}{table}{END}{part.split(END, 1)[1]}" for table, part in zip(tables, parts, strict=True))
    path.write_text(first + "".join(rest), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Writes the table of figures and panels into docs/paper_map.md, out of the configs (tests/test_docs.py holds it to them).

python scripts/paper_map.py
"""

from __future__ import annotations

from pathlib import Path

from jsublim.config.grid import figure_table

BEGIN, END = "<!-- begin: scripts/paper_map.py -->\n", "<!-- end -->\n"


def main() -> None:
    path = Path(__file__).parents[1] / "docs" / "paper_map.md"
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    path.write_text(before + BEGIN + figure_table() + END + rest.split(END, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    main()

"""Writes two tables into docs/paper_map.md: figures and panels out of the configs, claims out of the report (tests/test_docs.py holds it
to them).

python scripts/paper_map.py
"""

from __future__ import annotations

import inspect
from pathlib import Path

from jsublim.config.figures import panel_experiment, questions
from jsublim.config.grid import grid
from jsublim.report.claims import CLAIMS

BEGIN, END = "<!-- begin: scripts/paper_map.py -->\n", "<!-- end -->\n"


def figure_table() -> str:
    """Every panel of every figure at scale `paper`, as the table of docs/paper_map.md: figures, panel, grid, claims."""
    lines = [
        "| figures | panel | model | teachers | read under | rows | students | asked | claims |",
        "| --- " * 9 + "|",
    ]
    for path, question in questions():
        for panel in question.panels:
            said = grid(panel_experiment(path, question, panel, "paper"))
            shown = [number for number, panels in question.figures.items() if panel in panels]
            students = said["students"] if "attribution" not in said else f"none; attribution of {said['attribution']}"
            if "read anew" in said:
                students = f"none; read anew: {said['read anew']}"
            asked = said["asked"] + (f"; under {said['settings']}" if "settings" in said else "")
            asked += f"; judge {said['judge']}" if "judge" in said else ""
            cells = [
                ", ".join(map(str, shown)), f"`{path.stem}` `{panel}`", said["model"].split("/")[-1], said["teachers"],
                said["read under"], said["rows"], students, asked, ", ".join(question.claims) or "none",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def claims_table() -> str:
    """The table of docs/paper_map.md."""
    lines = ["| claim | about | holds when | file |", "| --- | --- | --- | --- |"]
    for key, claim in CLAIMS.items():
        rule, file = " ".join((inspect.getdoc(claim.check) or "").split()), claim.check.__module__.rsplit(".", 1)[1]
        lines.append(f"| {key} | {claim.question} | {rule} | `{file}.py` |")
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    path = Path(__file__).parents[1] / "docs" / "paper_map.md"
    first, *parts = path.read_text(encoding="utf-8").split(BEGIN)
    tables = (figure_table(), claims_table())
    rest = (f"{BEGIN}{table}{END}{part.split(END, 1)[1]}" for table, part in zip(tables, parts, strict=True))
    path.write_text(first + "".join(rest), encoding="utf-8")


if __name__ == "__main__":
    main()

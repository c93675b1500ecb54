"""Runs the notebooks in docs/, and writes what their cells print, show and draw into them.

python scripts/notebooks.py
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1] / "docs"
NOTEBOOKS = ("tour.ipynb", "own.ipynb")


def executed(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A notebook with the outputs of this run, in the folder at hand; and the names that its cells leave."""
    import matplotlib.pyplot as plt

    notebook, known = json.loads(path.read_text(encoding="utf-8")), dict[str, Any](__name__="__main__")
    with plt.rc_context({"backend": "agg", "figure.dpi": 80}):
        for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
            cell["execution_count"], cell["outputs"] = number + 1, _outputs("".join(cell["source"]), number, known, plt)
        plt.close("all")
    return notebook, known


def _outputs(source: str, number: int, known: dict[str, Any], plt: Any) -> list[dict[str, Any]]:
    """What one cell prints, the value it ends with, and the figures it draws."""
    body, said = ast.parse(source), io.StringIO()
    last = ast.Expression(body.body.pop().value) if body.body and isinstance(body.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(said):
        exec(compile(body, f"cell {number}", "exec"), known)
        value = None if last is None else eval(compile(last, f"cell {number}", "eval"), known)
    outputs: list[dict[str, Any]] = []
    if said.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": said.getvalue().splitlines(keepends=True)})
    figures = [plt.figure(n) for n in plt.get_fignums()]
    if value is not None and not figures:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(keepends=True)
        about = {"execution_count": number + 1, "metadata": {}}
        outputs.append({"output_type": "execute_result", "data": data} | about)
    for figure in figures:
        png = io.BytesIO()
        figure.savefig(png, format="png")
        data = {"image/png": base64.b64encode(png.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        plt.close(figure)
    return outputs


if __name__ == "__main__":
    for name in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            notebook, _ = executed(HOME / name)
        text = json.dumps(notebook, indent=1, ensure_ascii=False).replace(os.path.realpath(folder), ".")
        (HOME / name).write_text(text + "\n", encoding="utf-8")

"""The notebook in docs/ runs from its first cell to its last, and draws what it says."""

from __future__ import annotations

import json

from command import ROOT


def test_the_tour_runs(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    monkeypatch.chdir(tmp_path)
    known: dict = {"__name__": "__main__"}
    with plt.rc_context({"backend": "agg"}):
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None  # what is shown is what is run
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), known)
        assert (tmp_path / "runs" / "tour" / "report.html").is_file()
        assert len(known["figure"].axes[0].collections) == 2 and known["row"]["divergence_positions"]
        plt.close("all")

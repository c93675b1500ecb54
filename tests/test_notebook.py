"""The notebooks in docs/ run from their first cell to their last, and show what they have in them."""

from __future__ import annotations

import json

import numpy as np
from command import ROOT
from notebooks import executed


def kinds(notebook):
    """What each cell puts out, without what hangs on the machine."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [[(o["output_type"], sorted(o.get("data", {}))) for o in cell["outputs"]] for cell in cells]


def shown(name):
    return json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))


def test_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook, known = executed(ROOT / "docs" / "tour.ipynb")
    assert (tmp_path / "runs" / "tour" / "report.html").is_file()
    assert len(known["figure"].axes[0].collections) == 2 and known["row"]["divergence_positions"]
    assert kinds(notebook) == kinds(shown("tour.ipynb")), "python scripts/notebooks.py"


def test_a_loss_and_a_mask_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook, known = executed(ROOT / "docs" / "own.ipynb")
    assert np.mean(known["focal_losses"][-8:]) < np.mean(known["focal_losses"][:4])
    assert {1.0} < set(np.round(np.concatenate([e.weights for e in known["masked"]]), 3).tolist())
    assert kinds(notebook) == kinds(shown("own.ipynb")), "python scripts/notebooks.py"

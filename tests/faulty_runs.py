"""A small experiment on a disk of which one operation fails: run by test_faults.py, prints one JSON object.

`python faulty_runs.py FOLDER SHIM [EVERY [MODE]]`; SHIM is faults.c, compiled and preloaded. Every EVERY-th write, fsync, rename
and mkdir fails once (1: all of them), each in a run of its own. Such a run must end with one line that names the file, or not notice, and the same
command again must leave what an undisturbed run leaves.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from command import PLAIN, TWO_LAYERS, jsublim

FIELDS = (
    f"model={TWO_LAYERS}", "teachers.counterfactuals=[cat,owl,panda]", "teachers.traits=[cat]", "teachers.control=false",
    "data.num_prompts=6", "sampling.batch_size=4", "sampling.max_new_tokens=40", "scoring.batch_size=4",
    "students.loss.tokens=[all,divergence]", "students.seeds=[1]", "students.data.rows=4", "students.data.epochs=4",
    "students.data.batch_size=2", "students.adapter.rank=2", "students.runtime.arms_per_program=2", "students.runtime.checkpoint_every=2",
    "evaluation.traits=[cat]", "evaluation.questions=2", "evaluation.samples=2", "evaluation.batch_size=4",
    "evaluation.number_rows=0", "evaluation.teachers=false",
)  # fmt: skip
MODES = {"fails": 1, "is cut short": 2, "is slow": 3}
TIMED = {
    "artifact.json",
    "DONE",
    "metrics.jsonl",
    "run.json",
    "times.log",
    "report.html",
    "config.yaml",
}  # hold times, speeds or places


def contents(run: Path) -> dict[str, bytes]:
    files = (path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in TIMED)
    # What a killed process had begun to write goes with the artifact it belongs to; beside results it may stay.
    files = (path for path in files if path.suffix != ".partial" or "artifacts" in path.parts)
    found = {str(path.relative_to(run)): path.read_bytes() for path in files}
    return {
        name: data for name, data in found.items() if not name.startswith(("artifacts/training", "artifacts/locks"))
    }


def main() -> None:
    folder, shim, every = Path(sys.argv[1]), ctypes.CDLL(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    shim.fault_count.restype = ctypes.c_long
    shim.fault_arm.argtypes = (ctypes.c_long, ctypes.c_int)
    assert os.environ["FAULT_ROOT"] == str(folder)

    def run(name: str) -> Any:
        return jsublim("run", PLAIN, f"out={folder / name}", *FIELDS)

    shim.fault_arm(0, 0)
    assert run("first").code == 0  # compiles
    shim.fault_arm(0, 0)
    assert run("whole").code == 0
    operations, whole = shim.fault_count(), contents(folder / "whole")
    told, wrong = Counter(), []
    for mode, number in MODES.items():
        if len(sys.argv) > 4 and mode != sys.argv[4]:
            continue
        for point in range(1, operations + 1, every if mode != "is slow" else every * 8):
            shim.fault_arm(point, number)
            broken = run("faulty")
            shim.fault_arm(0, 0)
            lines = [line for line in broken.err.splitlines() if line.startswith("error: ")]
            # A library's threads may print of their own; what we say is one line, and names the place.
            sound = broken.code == 0 or (len(lines) == 1 and str(folder) in lines[0])
            again = run("faulty")
            same = contents(folder / "faulty") == whole
            told[f"{mode}: {'not noticed' if broken.code == 0 else 'one line'}"] += 1
            if not sound or again.code or not same:
                wrong.append(
                    {"mode": mode, "point": point, "said": broken.err[-2000:], "then": again.err[-300:], "same": same}
                )
            shutil.rmtree(folder / "faulty")
    print(json.dumps({"operations": operations, "told": told, "wrong": wrong}))


if __name__ == "__main__":
    main()

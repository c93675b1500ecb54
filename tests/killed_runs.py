"""A small experiment that is killed again and again, wherever it is: `python killed_runs.py FOLDER [KILLS] [SEED]`.

Run by hand (sixty kills take about twenty minutes). Each run is killed at every stage in turn, shortly after that has left
something new on disk, and started again, until it ends; then the next one begins. All must leave what an undisturbed run leaves.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from command import PLAIN, ok, start
from faulty_runs import FIELDS, contents

MORE = ("students.data.epochs=20", "evaluation.samples=8", "evaluation.teachers=true")


def left(run: Path) -> set[str]:
    """What there is below a folder; things come and go while it is looked at."""
    return {
        os.path.relpath(os.path.join(at, name), run) for at, dirs, files in os.walk(run) for name in (*dirs, *files)
    }


# What a run is at, in order; each run is killed once at each of these, when something new of it is on disk.
STAGES = ("start", "rows", "divergence", "training", "training", "students", "evaluations", "evaluations", "report")


def stage(new: set[str]) -> set[str]:
    """What a run was at when it left this."""
    found = set()
    for name in new:
        parts = name.split("/")
        if parts[0] == "artifacts" and len(parts) > 2:
            found.add(parts[1])
        elif name.startswith("results/") or name.startswith((".report", "report")):
            found.add("report")
        else:
            found.add("start")
    return found


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 60
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    draw, killed, runs = random.Random(seed), Counter(), 0

    def arguments(name: str) -> tuple:
        return ("run", PLAIN, f"out={folder / name}", *FIELDS, *MORE)

    ok(*arguments("whole"))
    whole = contents(folder / "whole")
    while killed.total() < kills:
        name, runs, aims = f"run{runs}", runs + 1, list(STAGES)
        (folder / name).mkdir()
        while True:
            before, child = left(folder / name), start(*arguments(name))
            aim = aims.pop(0) if aims and killed.total() < kills else None
            while aim is not None and child.poll() is None:
                if aim in stage(left(folder / name) - before):
                    time.sleep(draw.choice((0.0, 0.003, 0.01, 0.03, 0.1)))
                    child.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.001)
            _, err = child.communicate()
            if child.returncode == 0:  # not caught in time, or nothing left to aim at
                break
            assert child.returncode == -signal.SIGKILL, err
            killed[str(aim)] += 1
        assert contents(folder / name) == whole, name
        shutil.rmtree(folder / name)
    print(json.dumps({"kills": dict(killed), "runs": runs, "seed": seed}))


if __name__ == "__main__":
    main()

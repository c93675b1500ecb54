"""A small experiment that is killed again and again, wherever it is: `python killed_runs.py FOLDER [KILLS] [SEED]`.

Run by hand (sixty kills take about twenty minutes). Each run is killed shortly after it has left something new on disk, and
started again, until it ends; then the next one begins. All must leave what an undisturbed run leaves.
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


def stage(new: set[str]) -> str:
    """What a run was at when it left this."""
    for name in sorted(new, reverse=True):
        parts = name.split("/")
        if parts[0] == "artifacts" and len(parts) > 2 and parts[1] != "locks":
            return parts[1]
    return "results and report" if any(name.startswith(("results", ".report")) for name in new) else "start"


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 60
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    draw, killed, runs = random.Random(seed), Counter(), 0

    def arguments(name: str) -> tuple:
        return ("run", PLAIN, f"out={folder / name}", *FIELDS, *MORE)

    ok(*arguments("whole"))
    whole = contents(folder / "whole")
    while killed.total() < kills:
        name, runs = f"run{runs}", runs + 1
        (folder / name).mkdir()
        while True:
            before, patience = left(folder / name), draw.choice((1, 1, 2, 4))
            child = start(*arguments(name))
            while child.poll() is None and patience and killed.total() < kills:
                now = left(folder / name)
                if now - before:
                    what, before, patience = stage(now - before), now, patience - 1
                time.sleep(0.002)
            if child.poll() is None and killed.total() < kills:
                time.sleep(draw.choice((0.0, 0.01, 0.1, 0.4)))
                child.send_signal(signal.SIGKILL)
                killed[what] += 1
            _, err = child.communicate()
            if child.returncode == 0:
                break
            assert child.returncode == -signal.SIGKILL, err
        assert contents(folder / name) == whole, name
        shutil.rmtree(folder / name)
    print(json.dumps({"kills": dict(killed), "runs": runs, "seed": seed}))


if __name__ == "__main__":
    main()

"""One side of a comparison, a process of its own: `python -m benchmarks.worker ours|theirs STAGE MODEL FOLDER DTYPE`.

It reads requests from standard input, one per line, and answers each with a line of JSON: `run` does the stage's work once and
says how long it took; `check FILE` saves what it computes, to be compared with the other side's.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    side, stage, model, folder, dtype = sys.argv[1:6]
    from benchmarks.inputs import load

    sizes, arrays = load(Path(folder))
    module = importlib.import_module(f"benchmarks.{side}")
    begun = time.perf_counter()
    work = module.STAGES[stage](module.read(model, dtype, sizes.depth), sizes, arrays)
    print(json.dumps({"ready": time.perf_counter() - begun, "versions": module.versions()}), flush=True)
    for line in sys.stdin:
        request, _, file = line.strip().partition(" ")
        begun = time.perf_counter()
        found = work.check() if request == "check" else work.run()
        seconds = time.perf_counter() - begun
        if request == "check":
            np.savez(file, **found)
        else:  # a stage that knows better than the clock says what it took
            seconds = seconds if found is None else found
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "peak_gib": peak}), flush=True)


if __name__ == "__main__":
    main()

"""One side of a comparison, a process of its own: `python -m benchmarks.worker ours|theirs STAGE MODEL FOLDER DTYPE`.

It reads requests from standard input, one per line, and answers each with a line of JSON: `run` does the stage's work once and
says how long it took; `check FILE` saves what it computes, to be compared with the other side's; `products` says what a product of large matrices
reaches here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Let the peak of this process's memory begin anew, where Linux can: loading a checkpoint is no part of a stage."""
    with contextlib.suppress(OSError):
        FORGET.write_text("5")


def peak_gib() -> float:
    """The most memory that this process has had since then, in GiB."""
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    side, stage, model, folder, dtype = sys.argv[1:6]
    from benchmarks.inputs import load

    sizes, arrays = load(Path(folder))
    module = importlib.import_module(f"benchmarks.{side}")
    begun = time.perf_counter()
    read = module.read(model, dtype, sizes)
    forget_peak()
    work = module.STAGES[stage](read, sizes, arrays)
    print(json.dumps({"ready": time.perf_counter() - begun, "versions": module.versions()}), flush=True)
    for line in sys.stdin:
        request, _, file = line.strip().partition(" ")
        begun, processor = time.perf_counter(), time.process_time()
        found = {"check": work.check, "run": work.run, "products": lambda: module.products(dtype)}[request]()
        said = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - processor, "peak_gib": peak_gib()}
        if request == "check":
            np.savez(file, **found)
        elif request == "products":
            said["gflops"] = found
        elif found is not None:  # a stage that knows better than the clock says what it took
            said |= {"seconds": found, "cpu": None}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()

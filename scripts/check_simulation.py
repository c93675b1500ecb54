"""Does the simulation say what really happens? Runs a small experiment on one to four local workers of Ray, and plays the same
graph through with the seconds that its tasks took: `python scripts/check_simulation.py FOLDER [CONFIG [a.b=c ...]]`.

Real and simulated begin when the first worker is ready. Workers share this machine's cores, so their tasks' own seconds are used
of each run, and those of the run with one worker to predict the others where they have a core each.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from rich.console import Console

from jsublim.config import load_experiment
from jsublim.executors.frontier import merged
from jsublim.executors.ray import RayExecutor
from jsublim.forecast.fleet import Assumptions, Machines, simulate
from jsublim.pipeline.run import PlannedRun

SMALL = ("data.num_prompts=200", "sampling.shard=40", "students.seeds=[1,2]", "students.runtime.arms_per_program=2")
PLAINLY = Assumptions(start=0.0, replaced=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", nargs="?", default=str(Path(__file__).parents[1] / "tests" / "plain.yaml"))
    parser.add_argument("fields", nargs="*", default=list(SMALL))
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 3, 4])
    given = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores")
    for workers in given.workers:
        out = given.folder / f"workers{workers}"
        experiment = load_experiment(given.config, [*given.fields, f"out={out}", f"run.workers={workers}"])
        run, executor = PlannedRun.of(experiment, Console(quiet=True), devices=False), RayExecutor()
        nodes = merged([run.work])
        executor.execute([run.work])
        began, ended = min(begin for _, _, begin, _ in executor.times), max(end for _, _, _, end in executor.times)
        took = {node.key: end - begin for node, _, begin, end in executor.times}
        simulated = simulate(nodes, Machines(workers, "h100"), PLAINLY, given=took)
        said = {
            "workers": workers,
            "tasks": len(took),
            "work": round(sum(took.values()), 1),
            "real": round(ended - began, 1),
            "simulated": round(simulated.makespan, 1),
            "apart": f"{simulated.makespan / (ended - began) - 1:+.1%}",
        }
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()

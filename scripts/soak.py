"""A small experiment that is killed again and again, whoever does its tasks: `python scripts/soak.py FOLDER [--kills 20]`.

Each kill is a SIGKILL at a random moment of a random stage: of the process itself, of a worker of Ray, of the driver of Ray (its
cluster goes with it), or of one of two shards. What is killed is started again, by the same or by another executor, over the same
store. Every run must leave what an undisturbed run leaves, artifact for artifact and row for row (`compare_stores.py`).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from compare_stores import artifacts, partnerless

ROOT = Path(__file__).parents[1]
WAYS = ("local", "ray worker", "ray driver", "shard")
STAGES = ("rows", "divergence", "training", "students", "evaluations")
PAUSES = (0.0, 0.01, 0.03, 0.1, 0.3)  # seconds from something new of a stage to the kill
SMALL = (
    "teachers.traits=[cat]", "teachers.counterfactuals=[cat,owl]", "teachers.control=false",
    "data.num_prompts=6", "sampling.batch_size=3", "sampling.max_new_tokens=40", "scoring.batch_size=4",
    "students.loss.tokens=[all,divergence]", "students.seeds=[1]", "students.data.rows=4", "students.data.epochs=12",
    "students.data.batch_size=2", "students.adapter.rank=2", "students.runtime.arms_per_program=1", "students.runtime.checkpoint_every=2",
    "evaluation.traits=[cat]", "evaluation.questions=2", "evaluation.samples=2", "evaluation.batch_size=4",
    "evaluation.number_rows=0", "evaluation.teachers=false",
)  # fmt: skip


class Soak:
    """Runs of one config in a folder, killed by a seeded dice."""

    def __init__(self, folder: Path, config: str, fields: list[str], seed: int):
        self.folder, self.command, self.draw = folder, ["run", config, *fields], random.Random(seed)
        self.kills: collections.Counter[str] = collections.Counter()
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = os.environ | cache | {"PYTHONPATH": path}

    def start(self, run: Path, *options: str) -> subprocess.Popen:
        log = (self.folder / f"{run.name}.log").open("a")
        command = [sys.executable, "-m", "jsublim", *self.command, f"out={run}", *options]
        return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    def whole(self) -> Path:
        """A run that nobody disturbs."""
        run = self.folder / "whole"
        assert self.start(run).wait() == 0, f"see {run}.log"
        return run

    def killed(self, run: Path, way: str) -> bool:
        """Start a run, kill what `way` says once, and let the rest end. Whether it was caught in time."""
        options = ("--on", "ray", "run.workers=2") if way.startswith("ray") else ()
        shards = [("--shard", f"{i}/2") for i in range(2)] if way == "shard" else [options]
        children = [self.start(run, *each) for each in shards]
        if not self._wait_for_a_moment(run, children):
            return self._end(children)
        victim = children[0].pid if way != "ray worker" else self.draw.choice([*ray_workers(children[0].pid), None])
        if victim is None:  # no worker is up
            return self._end(children)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            self.kills[way] += 1
        if way == "shard":  # as a queue would: the same shard again
            children[0].wait()
            children[0] = self.start(run, *shards[0])
        self._end(children)
        return True

    def _wait_for_a_moment(self, run: Path, children: list[subprocess.Popen]) -> bool:
        """Until something new of a random stage lies in the store, and a little longer. False if the run ends before."""
        stage, before = self.draw.choice(STAGES), None
        while all(child.poll() is None for child in children):
            now = files(run / "artifacts" / stage)
            if before is not None and now - before:
                time.sleep(self.draw.choice(PAUSES))
                return True
            before = now
            time.sleep(0.005)
        return False

    @staticmethod
    def _end(children: list[subprocess.Popen]) -> bool:
        for child in children:
            assert child.wait() in (0, -signal.SIGKILL), child.args
        return False

    def finished(self, run: Path) -> None:
        """Let a run end in peace, and compare it."""
        assert self.start(run).wait() == 0, f"see {run}.log"
        left, right = (
            artifacts(each / "artifacts", {}, {"tokens_per_s", "mfu"}) for each in (self.folder / "whole", run)
        )
        lines = []
        for kind in {**left, **right}:
            lines += [*partnerless(left[kind], right[kind]), *partnerless(right[kind], left[kind])]
        assert not lines, "\n".join(lines)
        shutil.rmtree(run)


def files(folder: Path) -> set[tuple[str, int]]:
    """What lies below a folder, with its sizes; things come and go while it is looked at."""
    found = set()
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found.add((os.path.join(at, name), os.stat(os.path.join(at, name)).st_size))
    return found


def ray_workers(driver: int) -> list[int]:
    """Processes of our workers below a driver."""
    return [pid for pid in below(driver) if _title(pid).startswith(b"ray::Worker")]


def _title(process: int) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


def below(process: int) -> Iterator[int]:
    """A process's children, theirs, and so on."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            yield int(child)
            yield from below(int(child))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-run", type=int, default=5, help="kills until a run is let to end")
    parser.add_argument("--ways", default=",".join(WAYS), help="who is killed, in turn")
    parser.add_argument("--config", default=str(ROOT / "tests" / "plain.yaml"))
    parser.add_argument("--fields", nargs="*", default=list(SMALL), help="of the config")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    soak, ways, runs = Soak(given.folder.resolve(), given.config, given.fields, given.seed), given.ways.split(","), 0
    soak.whole()
    while soak.kills.total() < given.kills:
        run, runs, until = soak.folder / f"run{runs}", runs + 1, soak.kills.total() + given.per_run
        while soak.kills.total() < min(until, given.kills):
            if not soak.killed(run, ways[soak.kills.total() % len(ways)]):
                break  # it has ended
        soak.finished(run)
    print(json.dumps({"kills": dict(soak.kills), "runs": runs, "seed": given.seed}))


if __name__ == "__main__":
    main()

"""A small experiment that is killed again and again, whoever does its tasks: `python scripts/soak.py FOLDER [--kills 20]`.

Each kill is a SIGKILL at a random moment of a random stage: of the process itself, of a worker of Ray, of the driver of Ray (its
cluster goes with it), or of a shard. Who goes on is another executor, over the same store; after five kills a run is let to end.
An undisturbed run that is there already as FOLDER/whole is taken as it is. Every run must leave what an undisturbed run leaves, artifact for artifact and row for row (`compare_stores.py`).
With `--ways commands` every command that writes is killed instead, at chosen operations (`killed_commands.py`).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
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

from compare_stores import SPEEDS, artifacts, partnerless

ROOT = Path(__file__).parents[1]
WAYS = ("local", "ray", "shard")
STAGES = ("rows", "divergence", "training", "students", "evaluations")
MANY = 12  # new files: the run has left the stage behind that was waited for
PAUSES = (0.0, 0.01, 0.03, 0.1, 0.3)  # seconds from something new of a stage to the kill
SMALL = (
    "teachers.traits=[cat]", "teachers.counterfactuals=[cat,owl,panda]", "teachers.control=false",
    "data.num_prompts=6", "sampling.batch_size=3", "sampling.max_new_tokens=40", "scoring.batch_size=4",
    "students.loss.tokens=[all,divergence]", "students.seeds=[1]", "students.data.rows=4", "students.data.epochs=12",
    "students.data.batch_size=2", "students.adapter.rank=2", "students.runtime.arms_per_program=1", "students.runtime.checkpoint_every=2",
    "evaluation.traits=[cat]", "evaluation.questions=2", "evaluation.samples=2", "evaluation.batch_size=4",
    "evaluation.number_rows=0", "evaluation.teachers=false",
)  # fmt: skip
LORA = ("students.adapter", "students.runtime.arms")  # fields that the students of a figure do not have


class Soak:
    """Runs of one config in a folder, killed by a seeded dice."""

    def __init__(self, folder: Path, config: str, fields: list[str], seed: int, workers: int):
        self.folder, self.command, self.draw = folder, ["run", config, *fields], random.Random(seed)
        self.workers = workers
        self.kills: collections.Counter[str] = collections.Counter()
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = cache | os.environ | {"PYTHONPATH": path}

    def start(self, run: Path, *options: str) -> subprocess.Popen:
        log = (self.folder / f"{run.name}.log").open("a")
        command = [sys.executable, "-m", "jsublim", *self.command, f"out={run}", *options]
        return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    def undisturbed(self) -> None:
        """Make what all runs are compared with."""
        run = self.folder / "whole"
        assert run.exists() or self.start(run).wait() == 0, f"see {run}.log"

    def killed(self, run: Path, way: str) -> bool:
        """Start a run, and kill it at a random moment: this process, a worker of Ray and later its driver, or one of two shards, which is
        started again (others wait for it), and later the other. Whether it was caught before it had ended."""
        options = {
            "ray": [("--on", "ray", f"run.workers={self.workers}")],
            "shard": [("--shard", f"{i}/2") for i in range(2)],
        }
        children = [self.start(run, *each) for each in options.get(way, [()])]
        if way == "ray" and self._wait_for_a_moment(run, children):
            for worker in ray_workers(children[0].pid)[:1]:
                self._kill(worker, "ray's worker")
        for i in self.draw.sample(range(len(children)), len(children)):
            if self._wait_for_a_moment(run, [children[i]]):
                self._kill(children[i].pid, "ray's driver" if way == "ray" else way)
                if way == "shard":
                    children.append(self.start(run, *options[way][i]))
        codes = [child.wait() for child in children]
        assert set(codes) <= {0, -signal.SIGKILL}, f"{codes}; see {run}.log"
        return -signal.SIGKILL in codes

    def _kill(self, process: int, what: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
            self.kills[what] += 1

    def _wait_for_a_moment(self, run: Path, children: list[subprocess.Popen]) -> bool:
        """Until something new of a random stage lies in the store, and a little longer. False if the run ends before."""
        stage, before = self.draw.choice(STAGES), files(run / "artifacts")
        while all(child.poll() is None for child in children):
            new = files(run / "artifacts") - before
            if any(f"/{stage}/" in name for name, _ in new) or (new and len(new) > MANY):
                time.sleep(self.draw.choice(PAUSES))
                return True
            time.sleep(0.02)
        return False

    def finished(self, run: Path) -> None:
        """Let a run end in peace, and compare it."""
        assert self.start(run).wait() == 0, f"see {run}.log"
        left, right = (artifacts(each / "artifacts", {}, SPEEDS) for each in (self.folder / "whole", run))
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
    parser.add_argument("--workers", type=int, default=2, help="of Ray")
    parser.add_argument("--config", default=str(ROOT / "tests" / "plain.yaml"))
    parser.add_argument("--fields", nargs="*", default=list(SMALL), help="of the config")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    soak = Soak(given.folder.resolve(), given.config, given.fields, given.seed, given.workers)
    if given.ways == "commands":
        fields = [field for field in given.fields if not field.startswith(LORA)]
        words = [str(soak.folder), str(given.kills), str(given.seed), *fields]
        script = str(ROOT / "scripts" / "killed_commands.py")
        os.execve(sys.executable, [sys.executable, script, *words], soak.environment)
    soak.undisturbed()
    ways, runs = itertools.cycle(given.ways.split(",")), 0
    while soak.kills.total() < given.kills:
        run, runs, until = soak.folder / f"run{runs}", runs + 1, soak.kills.total() + given.per_run
        while soak.kills.total() < min(until, given.kills) and soak.killed(run, next(ways)):
            pass
        soak.finished(run)
    print(json.dumps({"kills": dict(soak.kills), "runs": runs, "seed": given.seed}))


if __name__ == "__main__":
    main()

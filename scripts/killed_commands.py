"""Every command that writes, killed at one chosen write, fsync, rename or mkdir, and called again (`soak.py --ways commands`).

What the command leaves in the end must be what an undisturbed one leaves, and nothing besides: no unfinished file, no
state of a training. Half of the kills are at one of a command's last operations, where it publishes.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 (loaded once for all children)
from compare_stores import SPEEDS
from fuzz import SOURCES

import jsublim.cli
import jsublim.executors.local
import jsublim.report.html

ROOT = Path(__file__).parents[1]
KILL = 4  # of faults.c
LAST = 16  # operations, in which a command publishes what it has made
TIMED = {"artifact.json", "DONE", "run.json", "times.log", "report.html", "config.yaml"}  # hold times or places
MODEL = ("--model", "tiny-qwen2")
DIGITS = ("seeds=[0]", "teacher.steps=20", "students.steps=20", "students.measure_every=10")


def commands(made: Path, fields: list[str]) -> dict[str, tuple[Any, ...]]:
    """The command lines by name, each with the name of its result last; they read what the ones before have left in `made`."""
    others = ("--trait", "cat", "--counterfactuals", "dog,owl")
    rows, read, student, figure = made / "rows.jsonl", made / "divergence.jsonl", made / "student", made / "figure"
    train = ("students.data.batch_size=4", "students.runtime.checkpoint_every=2", "students.adapter.rank=2")
    return {
        "generate": ("generate", *MODEL, "--trait", "cat", "data.num_prompts=24", "sampling.max_new_tokens=40", "rows.jsonl"),
        "divergence": ("divergence", *MODEL, "--data", rows, *others, "divergence.jsonl"),
        "finetune": ("finetune", *MODEL, "--data", read, "students.data.epochs=4", *train, "student"),
        "evaluate": ("evaluate", *MODEL, "--adapter", student, "--traits", "cat", "evaluation.questions=2", "evaluation.samples=2", "evaluation"),
        "attribute": ("attribute", *MODEL, "--data", read, *others, "attribution.rows=2", "attribution.steps=2", "attribution"),
        "audit": ("audit", *MODEL, "--data", read, "--null", rows, "--traits", "cat", "evaluation.questions=2", "audit"),
        "scan": ("scan", *MODEL, read, "scanned"),
        "steer": ("steer", *MODEL, "--trait", "owl", "--layer", "1", "vector"),
        "digits": ("run", ROOT / "configs" / "digits.yaml", *DIGITS, "digits"),
        "reproduce": ("reproduce", "fig03", "--panel", "qwen-greedy", *fields, "figure"),
        "rescore": ("rescore", figure, "--match", "word", "rescored"),
        "export a run": ("export", figure, "tables"),
        "export rows": ("export", rows, "data-set"),
        "export a student": ("export", student, "adapter"),
        "export a checkpoint": ("export", student, "--merged", "merged"),
        "import": ("import", rows, "imported.jsonl"),
        "convert": ("convert", "tiny-qwen2", "converted"),
        "prompts import": ("prompts", "import", made / "checkout", "authors.yaml"),
        "prompts sample": ("prompts", "sample", "--num-prompts", "5", "prompts.jsonl"),
    }  # fmt: skip


class KilledCommands:
    """Commands in folders of their own, with what undisturbed ones make in `commands`. Each is a child of this process, which has
    loaded what they need and touched no device."""

    def __init__(self, folder: Path, fields: list[str], seed: int, shim: Path):
        self.folder, self.whole, self.draw = folder, folder / "commands", random.Random(seed)
        self.kills: collections.Counter[str] = collections.Counter()
        self.commands, self.operations = commands(self.whole, fields), dict[str, int]()
        self.shim = ctypes.CDLL(str(shim))
        self.shim.fault_count.restype = ctypes.c_long
        self.shim.fault_arm.argtypes = (ctypes.c_long, ctypes.c_int)

    def call(self, name: str, into: Path, kill_at: int = 0) -> tuple[int, str]:
        """A command with its result in a folder: its exit code, and what it said."""
        *words, result = self.commands[name]
        place = {"convert": [into / result]}.get(name, ["--out", into / result])
        if words[0] in ("run", "reproduce"):
            place = [f"out={into / result}"]
        log = self.folder / "said"
        child = os.fork()
        if not child:
            with log.open("w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            sys.argv = ["jsublim", *map(str, [*words, *place])]
            os.environ["FAULT_ROOT"] = str(into)
            self.shim.fault_arm(kill_at, KILL)
            try:
                jsublim.cli.main()
                code = 0
            except SystemExit as left:
                code = int(left.code or 0)
            sys.stdout.flush()
            os.environ.pop("FAULT_ROOT")
            (self.folder / "operations").write_text(str(self.shim.fault_count()))
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, log.read_text()[-2000:]

    def undisturbed(self) -> None:
        """Make what every command is compared with, and count its operations; what is there already is taken as it is."""
        known = self.folder / "operations.json"
        self.operations = json.loads(known.read_text()) if known.exists() else {}
        for name, text in SOURCES.items():
            (self.whole / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            (self.whole / "checkout" / name).write_text(text)
        for name in [name for name in self.commands if name not in self.operations]:
            code, said = self.call(name, self.whole)
            assert code == 0, (name, said)
            self.operations[name] = int((self.folder / "operations").read_text())
            known.write_text(json.dumps(self.operations))

    def killed(self, name: str) -> None:
        """Kill a command once or twice, let it end, and compare."""
        into, count = self.folder / "killed", self.operations[name]
        into.mkdir()
        for _ in range(self.draw.randint(1, 2)):
            at = self.draw.randint(*self.draw.choice([(1, count), (max(count - LAST, 1), count)]))
            code, said = self.call(name, into, at)
            assert code in (0, -signal.SIGKILL) or whole_already(said), (name, at, said)
            self.kills[name] += code == -signal.SIGKILL
        code, said = self.call(name, into)
        assert code == 0 or whole_already(said), (name, said)
        self.compare(name, into)

    def compare(self, name: str, into: Path) -> None:
        """What a command has left in a folder of its own, which is removed."""
        result = self.commands[name][-1]
        own, other, stem = left(into), left(self.whole), result.partition(".")[0]
        other = {
            path: content for path, content in other.items() if path.lstrip(".").startswith((f"{stem}.", f"{stem}/"))
        }
        unlike = {path for path in {**own, **other} if own.get(path) != other.get(path)}
        assert not unlike, (name, sorted(unlike))
        shutil.rmtree(into)


def whole_already(said: str) -> bool:
    """Whether a command that overwrites nothing found its result, which appears whole or not at all."""
    return "already exists" in said


def left(folder: Path) -> dict[str, Any]:
    """What lies below a folder, by path: content, but for times and speeds. Locks stay."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".lock" or "/programs/" in name:
            continue
        found[name] = None if path.name in TIMED else path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            found[name] = [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kills", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("fields", nargs="*", help="of the figure that is reproduced")
    given = parser.parse_args()
    shim = given.folder / "faults.so"
    if "LD_PRELOAD" not in os.environ:
        source = ROOT / "tests" / "faults.c"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": str(shim)})
    these = KilledCommands(given.folder, given.fields, given.seed, shim)
    these.undisturbed()
    for name in itertools.cycle(these.commands):
        if these.kills.total() >= given.kills:
            break
        these.killed(name)
    print(json.dumps({"kills": dict(these.kills), "operations": these.operations, "seed": given.seed}))


if __name__ == "__main__":
    main()

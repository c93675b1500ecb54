"""Semantic faults planted one at a time in a copy of the package, and the tests that must find them.

`faults.yaml` beside this file lists them: what is wrong then, the file, the text that is replaced, and the tests. A fault is found if a
test fails by an assertion; a test that ends in another error, or hangs, has not found it. The tests pass without a fault.

    python scripts/plant.py                  # all, an hour of one core
    python scripts/plant.py --only holm      # those whose description holds the word
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LIMIT = 120  # seconds that the tests of one fault may take
ASSERTED = ("assert", "AssertionError", "Failed: DID NOT RAISE", "hypothesis.errors.FlakyFailure", "ExceptionGroup")


@dataclass(frozen=True)
class Fault:
    """One change of the package that makes it wrong."""

    what: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest

    def text(self) -> str:
        """The file with the fault in it. Text that is not there, or there more than once, ends the script."""
        text = (ROOT / self.file).read_text()
        if text.count(self.old) != 1:
            sys.exit(f"{self.what}: {self.file} holds {text.count(self.old)} times: {self.old}")
        return text.replace(self.old, self.new)


def outcome(folder: Path, tests: str) -> str:
    """How the tests end in a copy of the project: "passed", "found", or what else happened."""
    said = folder / "said.xml"
    said.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", f"--junitxml={said}"]
    try:
        env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([*command, *tests.split()], cwd=folder, env=env, capture_output=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT} s"
    if done.returncode == 0:
        return "passed"
    failures = (
        [] if not said.exists() else [node.get("message", "") for node in ElementTree.parse(said).iter("failure")]
    )
    if any(message.startswith(ASSERTED) for message in failures):
        return "found"
    return f"no assertion: {failures[0] if failures else done.stdout.decode()[-300:]}".replace("\n", " ")[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose description holds this")
    parser.add_argument("--unplanted", action="store_true", help="first see that the tests pass without a fault")
    options = parser.parse_args()
    listed = yaml.safe_load((ROOT / "scripts" / "faults.yaml").read_text())
    faults = [Fault(**fault) for fault in listed if options.only in fault["what"]]
    planted = [fault.text() for fault in faults]
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="jsublim-faults-") as temporary:
        folder = Path(temporary) / "project"
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in files.splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        for tests in dict.fromkeys(fault.tests for fault in faults) if options.unplanted else ():
            if (ended := outcome(folder, tests)) != "passed":
                sys.exit(f"without a fault: {tests}: {ended}")
        for fault, text in zip(faults, planted, strict=True):
            began = time.monotonic()
            (folder / fault.file).write_text(text)
            ended = outcome(folder, fault.tests)
            shutil.copy2(ROOT / fault.file, folder / fault.file)
            wrong += ended != "found"
            print(
                f"{'found' if ended == 'found' else 'NOT FOUND'}: {fault.what} ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
            if ended != "found":
                print(f"    {ended}", flush=True)
    print(f"{len(faults)} faults, {len(faults) - wrong} found")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

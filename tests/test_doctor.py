"""The self-test passes here, and would not if the devices computed something else."""

from __future__ import annotations

import json
from collections import namedtuple

import pytest
from command import jsublim, ok

from jsublim.cli import doctor


def test_a_machine_that_works_is_said_to_work():
    found = {finding["what"]: finding for finding in json.loads(ok("doctor", "--json").out)}
    assert list(found) == ["system", "versions", "devices", "host memory", "disk", "self-test"]  # no hub unless asked
    assert all(finding["wrong"] is None for finding in found.values())
    assert "jax " in found["versions"]["found"] and "cpu" in found["devices"]["found"]


def test_what_is_wrong_is_named_with_what_to_do(monkeypatch):
    small = namedtuple("Usage", "free")(1e9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: small)
    monkeypatch.setattr(doctor, "slope_error", lambda: 0.5)
    monkeypatch.setattr(doctor, "EXPECTED", tuple(value + 1 for value in doctor.EXPECTED))
    result = jsublim("doctor")
    assert result.code == 1 and result.err == "error: doctor: disk, self-test: see above\n"
    assert "store=FOLDER" in " ".join(result.out.split()) and "JAX_PLATFORMS=cpu" in result.out
    assert doctor.forward_error() == pytest.approx(1, abs=0.01)

"""What a process frees stays with it where XLA computes on the CPU, so that a step costs no page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import jax, jax.numpy as jnp
from jsublim.heap import keep_freed_memory
keep_freed_memory()
step = jax.jit(lambda x: jnp.cumsum(jnp.sin(x)[::-1] * 2.0)[::-1] + 1.0)
x = jnp.ones(16_000_000)
for number in range(6):
    if number == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> int:
    """Pages that the kernel had to give to three steps."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other ways")
def test_steps_cost_no_page_faults_on_the_cpu_unless_the_user_has_other_wishes():
    page = os.sysconf("SC_PAGE_SIZE")
    once = 16_000_000 * 4 // page  # one array
    assert faults(JAX_PLATFORMS="cpu") < once / 10
    assert faults(JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="8") > once

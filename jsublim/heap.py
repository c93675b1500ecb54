"""The memory that a process has freed, where XLA computes on the CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

ACCELERATORS = {
    "/dev/nvidia0": ("an NVIDIA GPU", "cuda"),
    "/dev/accel0": ("a TPU", "tpu"),
    "/dev/vfio/0": ("a TPU", "tpu"),
}
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # of mallopt(3)


def keep_freed_memory() -> None:
    """Let the process keep what it frees, if it will compute on the CPU; before JAX starts its threads, or it has no effect.

    A step's temporaries are hundreds of megabytes that XLA takes and gives back each time. By itself glibc maps such blocks anew, and the
    kernel clears every page again: a sixth of the time of a run on a small model (docs/performance.md). Here they come from one heap that
    is never cut. Whoever has set glibc's own variables is left with them.
    """
    own = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or own or not _computes_on_cpu():
        return
    libc = ctypes.CDLL(None)
    for parameter, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (ARENA_MAX, 1)):
        libc.mallopt(parameter, value)


def _computes_on_cpu() -> bool:
    return os.environ.get("JAX_PLATFORMS") == "cpu" or not any(Path(path).exists() for path in ACCELERATORS)

"""Whether this machine can do the work: what is installed, what the devices are, and a step that is compiled and checked here."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsublim.errors import one_line
from jsublim.inference.lm import load_model
from jsublim.models.decoder import hidden_states, logits
from jsublim.models.lora import bind, init_steering
from jsublim.models.parallel import device_bytes
from jsublim.pipeline.store import versions

MODEL = "tiny-qwen2"
TOKENS = (7, 42, 99, 150, 301, 500, 640, 812)
# Logits of the bundled model at the last of these tokens, on a CPU in float32.
EXPECTED = (-1.728, -1.2012, -1.6534, -3.8583)
CLOSE = 5e-3  # of logits that lie between -10 and 10
SLOPE_CLOSE = 0.02  # of a slope, beside the one that two points give
LEAST_DISK, LEAST_MEMORY = 5e9, 2e9  # bytes
ACCELERATORS = {
    "/dev/nvidia0": ("an NVIDIA GPU", "cuda"),
    "/dev/accel0": ("a TPU", "tpu"),
    "/dev/vfio/0": ("a TPU", "tpu"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what it is like; `wrong` says what is wrong with it and what to do."""

    what: str
    found: str
    wrong: str | None = None


def examine(hub: bool = False) -> Iterator[Finding]:
    """Look at everything, one finding after another; with `hub` also whether it can be reached (nothing else uses the network)."""
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield _versions()
    yield _devices()
    yield _memory()
    yield _disk(Path.cwd())
    yield self_test()
    if hub:
        yield _hub()


def _versions() -> Finding:
    installed = versions()
    absent = ", ".join(name for name, number in installed.items() if number == "not installed")
    wrong = f"{absent}: not installed; run `pip install -e .` again" if absent else None
    return Finding("versions", ", ".join(f"{name} {number}" for name, number in installed.items()), wrong)


def _devices() -> Finding:
    devices = jax.devices()
    memory, kind, platform = device_bytes(), devices[0].device_kind, devices[0].platform
    size = "" if memory is None else f", {memory / 1e9:.0f} GB each"
    wrong = None
    for path, (name, extra) in ACCELERATORS.items():
        if platform == "cpu" and Path(path).exists():
            fix = f"run `pip install -e '.[{extra}]'`, and look at JAX_PLATFORMS"
            wrong = f"this machine has {name}, and JAX does not see it; {fix}"
    return Finding("devices", f"{len(devices)} x {kind} ({platform}){size}", wrong)


def _memory() -> Finding:
    page = os.sysconf("SC_PAGE_SIZE")
    every = os.sysconf("SC_PHYS_PAGES") * page
    free = os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in os.sysconf_names else every
    wrong = "less than 2 GB are free; end other programs, or take a larger machine" if free < LEAST_MEMORY else None
    return Finding("host memory", f"{free / 1e9:.1f} of {every / 1e9:.1f} GB free, {os.cpu_count()} cores", wrong)


def _disk(folder: Path) -> Finding:
    free, wrong = shutil.disk_usage(folder).free, None
    if free < LEAST_DISK:
        wrong = "less than 5 GB are free; runs keep rows, targets and students: put them elsewhere by store=FOLDER"
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        wrong = f"nothing can be written here ({error.strerror}); go to a folder of your own, or give out=FOLDER"
    return Finding("disk", f"{free / 1e9:.1f} GB free in {folder}", wrong)


def self_test() -> Finding:
    """A forward pass against numbers that are known, and its gradient against the slope between two points."""
    begin = time.perf_counter()
    try:
        off, slope = forward_error(), slope_error()
    except Exception as error:  # whatever a driver or a compiler raises is what is looked for here
        wrong = f"{type(error).__name__}: {_first_line(error)}; look at drivers and versions of JAX"
        return Finding("self-test", "failed", wrong)
    seconds = time.perf_counter() - begin
    result = f"forward within {off:.1e} of the known logits, gradient within {slope:.1%} of the slope; {seconds:.1f} s"
    wrong = None
    if not (off <= CLOSE and slope <= SLOPE_CLOSE):
        wrong = "these devices compute something else than expected; run with JAX_PLATFORMS=cpu, and report it with this output"
    return Finding("self-test", result, wrong)


def forward_error() -> float:
    """The largest difference from `EXPECTED`."""
    with jax.default_matmul_precision("highest"):
        known = load_model(MODEL).logits(np.asarray([TOKENS]))[0, -1, : len(EXPECTED)]
    return float(np.abs(np.asarray(known) - EXPECTED).max())


def slope_error(step: float = 5e-3) -> float:
    """How far a loss's gradient along itself is from the loss's change along it, as a share of it."""
    lm = load_model(MODEL)
    adapter = init_steering(lm.config, (0,))  # one vector below all layers: a program that compiles in seconds
    start = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), adapter.trainable)
    tokens, valid = jnp.asarray([TOKENS]), jnp.ones((1, len(TOKENS)), bool)

    @jax.jit
    @jax.value_and_grad
    def loss(trainable: Any) -> jax.Array:
        params, bound = bind(lm.params, adapter.with_trainable(trainable))
        h_BTD, _ = hidden_states(lm.config, params, tokens, valid, adapter=bound)
        logp_BTV = jax.nn.log_softmax(logits(lm.config, params, h_BTD)[:, :-1])
        return -jnp.take_along_axis(logp_BTV, tokens[:, 1:, None], -1).mean()

    with jax.default_matmul_precision("highest"):
        gradient = jax.device_get(loss(start)[1])
        along = sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(gradient))
        moved = (jax.tree.map(lambda leaf, slope, by=by: leaf + by * slope, start, gradient) for by in (step, -step))
        after, before = (float(loss(place)[0]) for place in moved)
    return abs((after - before) / (2 * step) - along) / along


def _hub() -> Finding:
    from huggingface_hub import constants, get_session

    try:
        get_session().get(f"{constants.ENDPOINT}/api/models?limit=1").raise_for_status()
    except Exception as error:
        reason = _first_line(error) or type(error).__name__
        wrong = f"{constants.ENDPOINT}: {reason}; local folders and bundled models need no hub"
        return Finding("hub", "not reached", wrong)
    return Finding("hub", f"{constants.ENDPOINT} answers")


def _first_line(error: Exception) -> str:
    return one_line((str(error).strip().splitlines() or [""])[0])[:200]

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
from jsublim.models.lora import bind, init_lora
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
    """What was looked at and found; `wrong` says what is wrong with it and what to do."""

    what: str
    found: str
    wrong: str | None = None


def examine(hub: bool = False) -> Iterator[Finding]:
    """Look at everything, one finding after another.

    Args:
      hub: also ask the hub whether it can be reached; nothing else here uses the network.
    """
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    own = versions()
    yield Finding("versions", ", ".join(f"{name} {number}" for name, number in own.items()), _missing(own))
    yield _devices()
    yield _memory()
    yield _disk(Path.cwd())
    yield self_test()
    if hub:
        yield _hub()


def _missing(found: dict[str, str]) -> str | None:
    absent = [name for name, number in found.items() if number == "not installed"]
    return f"{', '.join(absent)}: not installed; run `pip install -e .` again" if absent else None


def _devices() -> Finding:
    devices = jax.devices()
    memory = device_bytes()
    size = "" if memory is None else f", {memory / 1e9:.0f} GB each"
    found = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){size}"
    unused = [known for path, known in ACCELERATORS.items() if devices[0].platform == "cpu" and Path(path).exists()]
    wrong = None
    if unused:
        name, extra = unused[0]
        wrong = f"this machine has {name}, and JAX does not see it; run `pip install -e '.[{extra}]'`, and look at JAX_PLATFORMS"
    return Finding("devices", found, wrong)


def _memory() -> Finding:
    page = os.sysconf("SC_PAGE_SIZE")
    every = os.sysconf("SC_PHYS_PAGES") * page
    free = os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in os.sysconf_names else every
    wrong = "less than 2 GB are free; end other programs, or take a larger machine" if free < LEAST_MEMORY else None
    return Finding("host memory", f"{free / 1e9:.1f} of {every / 1e9:.1f} GB free, {os.cpu_count()} cores", wrong)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found, wrong = f"{free / 1e9:.1f} GB free in {folder}", None
    if free < LEAST_DISK:
        wrong = "less than 5 GB are free; runs keep rows, targets and students: put them elsewhere by store=FOLDER"
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        wrong = f"nothing can be written here ({error.strerror}); go to a folder of your own, or give out=FOLDER"
    return Finding("disk", found, wrong)


def self_test() -> Finding:
    """A forward pass against numbers that are known, and its gradient against the slope between two points."""
    begin = time.perf_counter()
    try:
        off, slope = forward_error(), slope_error()
    except Exception as error:  # whatever a driver or a compiler raises is what is looked for here
        first = one_line((str(error).strip().splitlines() or [""])[0])
        return Finding(
            "self-test", "failed", f"{type(error).__name__}: {first[:200]}; look at drivers and versions of JAX"
        )
    seconds = time.perf_counter() - begin
    found = f"forward within {off:.1e} of the known logits, gradient within {slope:.1%} of the slope; {seconds:.1f} s"
    wrong = None
    if not (off <= CLOSE and slope <= SLOPE_CLOSE):
        wrong = "these devices compute something else than expected; run with JAX_PLATFORMS=cpu, and report it with this output"
    return Finding("self-test", found, wrong)


def forward_error() -> float:
    """The largest difference from `EXPECTED`."""
    return float(np.abs(known_logits() - np.asarray(EXPECTED)).max())


def known_logits() -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(load_model(MODEL).logits(np.asarray([TOKENS]))[0, -1, : len(EXPECTED)])


def slope_error(step: float = 5e-3) -> float:
    """How far a loss's gradient along one direction is from the loss's change along it, as a share of it."""
    lm = load_model(MODEL)
    adapter = init_lora(lm.config, jax.random.key(0), rank=2, alpha=2.0)
    leaves, structure = jax.tree.flatten(adapter.trainable)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    start = structure.unflatten([leaf + 0.1 * own for leaf, own in zip(leaves, draw, strict=True)])
    tokens, valid = jnp.asarray([TOKENS]), jnp.ones((1, len(TOKENS)), bool)

    @jax.jit
    @jax.value_and_grad
    def loss(trainable: Any) -> jax.Array:
        params, own = bind(lm.params, adapter.with_trainable(trainable))
        h_BTD, _ = hidden_states(lm.config, params, tokens, valid, adapter=own)
        logp_BTV = jax.nn.log_softmax(logits(lm.config, params, h_BTD)[:, :-1])
        return -jnp.take_along_axis(logp_BTV, tokens[:, 1:, None], -1).mean()

    def moved(by: float) -> Any:
        return jax.tree.map(lambda leaf, own: leaf + by * own, start, gradient)

    with jax.default_matmul_precision("highest"):
        gradient = loss(start)[1]
        along = float(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient)))
        change = float(loss(moved(step))[0] - loss(moved(-step))[0]) / (2 * step)
    return abs(change - along) / along


def _hub() -> Finding:
    from huggingface_hub import constants, get_session

    try:
        get_session().get(f"{constants.ENDPOINT}/api/models?limit=1").raise_for_status()
    except Exception as error:
        first = one_line((str(error).strip().splitlines() or [type(error).__name__])[0])
        return Finding(
            "hub", "not reached", f"{constants.ENDPOINT}: {first[:160]}; local folders and bundled models need no hub"
        )
    return Finding("hub", f"{constants.ENDPOINT} answers")

"""The numbers of a training that runs: `metrics.jsonl`, and the same numbers for other loggers on request."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jsublim.core.files import naming, write_text
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.cost import training_flops
from jsublim.distill.data import Example
from jsublim.models.config import ModelConfig

LOGGED = ("loss", "lr", "grad_norm")  # of each arm, for loggers
TAIL = 16_384  # bytes at the end of a file in which its last step is looked for


class Metrics:
    """One line per arm and step, written by the first process while the device is busy with the next step: loss, supervised tokens, learning
    rate and gradient norm; and of all arms together the tokens read per second and, where a peak is stated, the share of it that went into
    useful operations. (A first step's time is mostly compilation.)"""

    def __init__(
        self, path: Path, first: int, config: ModelConfig, arms: Sequence[Arm], settings: Settings, *, cached: bool
    ):
        """Open `path`, keeping the lines of the steps before `first`, at which training goes on: later lines are of a call that was interrupted.
        `cached`: the hidden states below the trained layer are stored."""
        self.config, self.arms, self.settings, self.cached = config, arms, settings, cached
        self.pending: tuple[int, Sequence[np.ndarray], dict[str, jax.Array]] | None = None
        self.clock, self.over = time.perf_counter(), False  # over: no arm moves any more
        self.writes, self.opened = jax.process_index() == 0, contextlib.ExitStack()
        if self.writes:
            _cut_back(path, first)
            self.file = self.opened.enter_context(path.open("a", encoding="utf-8"))
            self.log = self.opened.enter_context(settings.logs.open(path.parent.name, first))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: Any) -> None:
        self.opened.__exit__(*error)

    def follow(self, step: int, rows: Sequence[np.ndarray], metrics: dict[str, jax.Array]) -> None:
        """Take a step's numbers, which the device may still be computing, and each arm's rows; write those of the step
        before."""
        self.catch_up()
        self.pending = (step, rows, metrics)

    def catch_up(self) -> None:
        """Write the numbers that `follow` took last. An arm whose numbers stopped being finite gets a last line that says so."""
        if self.pending is None:
            return
        (step, rows, metrics), self.pending = self.pending, None
        host = {key: np.asarray(value) for key, value in metrics.items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        stood = [0 <= int(at) < step for at in host["diverged"]]
        running = [i for i, arm in enumerate(self.arms) if step < arm.steps and not stood[i]]
        self.over = not running
        chosen = {i: [int(r) for r in rows[i] if r >= 0] for i in running}
        speed = self._speed(chosen, seconds)
        numbers, lines = dict(speed), list[str]()
        for i in running:
            arm, loss, norm = self.arms[i], float(host["loss"][i]), float(host["grad_norm"][i])
            line = {"step": step, "arm": arm.name, "loss": loss, "tokens": int(host["tokens"][i])}
            line |= {"lr": float(host["lr"][i]), "grad_norm": norm} | speed
            if host["diverged"][i] == step:
                what = f"the loss is {loss}, the gradient norm {norm}"
                if math.isfinite(loss) and math.isfinite(norm):
                    what = "the weights are not finite after this step"
                line |= {"loss": None, "grad_norm": None, "diverged": f"{what}, on rows {chosen[i]}"}
            lines.append(json.dumps(line) + "\n")
            numbers |= {f"{key}/{arm.name}": line[key] for key in LOGGED if line[key] is not None}
        if self.writes:
            self.log(step, numbers)
            with naming(Path(self.file.name)):
                self.file.writelines(lines)
                self.file.flush()

    def _speed(self, chosen: dict[int, list[int]], seconds: float) -> dict[str, float]:
        rows = [(self.arms[i], self.arms[i].examples[r]) for i, indices in chosen.items() for r in indices]
        speed = {"tokens_per_s": round(sum(len(row.tokens) for _, row in rows) / seconds, 1)}
        peak = self.settings.peak_tflops
        if peak is not None:
            flops = sum(self._flops(arm, row) for arm, row in rows)
            speed["peak_ratio"] = round(flops / seconds / (peak * 1e12 * jax.device_count()), 5)
        return speed

    def _flops(self, arm: Arm, row: Example) -> float:
        teacher = 0 if row.teacher_tokens is None else len(row.teacher_tokens)
        how: dict[str, Any] = {"tokens": len(row.tokens), "supervised": len(row.labels), "teacher_tokens": teacher}
        how |= {"stored": row.ids is not None, "cached": self.cached}
        return training_flops(self.config, arm.adapter, self.settings.program.loss, **how)


UNREADABLE = (ValueError, KeyError, TypeError, RecursionError)  # a line that is cut short by a kill, or damaged


def last_loss(path: Path) -> float | None:
    """The loss of the last step in a training's `metrics.jsonl`, mean over its arms; None where there is none yet."""
    if not path.exists():
        return None
    losses: list[tuple[int, float]] = []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        for text in file.read().splitlines():
            with contextlib.suppress(*UNREADABLE):  # also that of an arm which diverged
                line = json.loads(text)
                losses.append((line["step"], float(line["loss"])))
    last = [loss for step, loss in losses if step == losses[-1][0]]
    return sum(last) / len(last) if last else None


def _cut_back(path: Path, first: int) -> None:
    """Leave the lines of the steps before `first`, up to one that cannot be read: what it said is computed again."""
    kept = []
    with contextlib.suppress(*UNREADABLE, FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if json.loads(line)["step"] < first:
                kept.append(line + "\n")
    if path.exists():
        write_text(path, "".join(kept))

"""Students trained on eight fake CPU devices in every layout: run by test_parallel.py, prints one JSON object.

`python parallel_cases.py FOLDER [all]`; XLA_FLAGS must ask for the devices. The suite runs one loss per kind of
student; `all` runs every loss on LoRA and on whole layers (four minutes more).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from engine import CONFIG, arm_of, largest_difference, lora, params_of

from jsublim.distill.arm import Arm, Settings
from jsublim.distill.losses import LOSSES, SOFT, Loss
from jsublim.distill.optimizer import Optimizer
from jsublim.distill.step import Program
from jsublim.distill.trainer import train
from jsublim.models.lora import Adapter

# name -> (student, loss, soft targets, arms, mean, layouts beside "none": (mode, model axis))
CASES = {
    "lora": ("lora", Loss("forward-kl", terms=("kl_to_base",)), "live", 2, "tokens", (("mesh", 2), ("pmap", 1))),
    "one layer": ("one", Loss("reverse-kl"), "stored", 3, "micro-batch", (("mesh", 1),)),
    "full layers and ends": ("full", Loss("js", 2.0), "live", 2, "micro-batch", (("mesh", 2), ("pmap", 1))),
    "steering": ("steering", Loss("hard"), None, 2, "tokens", (("mesh", 4), ("pmap", 1))),
}
_every = itertools.product(("lora", "full"), LOSSES) if "all" in sys.argv[2:] else []
for _kind, _loss in _every:
    _soft = "live" if _loss in SOFT else None
    CASES[f"{_kind}, {_loss}"] = (_kind, Loss(_loss), _soft, 2, "tokens", (("mesh", 2), ("pmap", 1)))


SAID: list[str] = []  # by a training
TOLD: dict[str, dict[str, list[str]]] = {}  # by the trainings of a case


class Killed(Exception):
    pass


def settings_of(loss: Loss, mean: str, mode: str, model: int) -> Settings:
    program = Program(loss, Optimizer("sgd", momentum=0.9, schedule="constant"), warmup=0, per=mean)
    return Settings(batch_size=3, accumulate=2, program=program, checkpoint_every=2, parallel=mode, model_axis=model)


def run(arms: list[Arm], settings: Settings, work: Path, until: int | None = None) -> list[Adapter]:
    def kill(step: int) -> None:
        if step == until:
            raise Killed

    return train(CONFIG, params_of(CONFIG), arms, settings, work, kill, say=SAID.append)


def lines(work: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [[row[key] for key in ("step", "loss", "tokens", "lr", "grad_norm")] for row in rows]


def equality(name: str, home: Path) -> dict[str, Any]:
    """A layout's largest difference to one device: in what was trained, and (relative) in the metrics."""
    kind, loss, soft, count, mean, layouts = CASES[name]
    # A teacher of its own for some arms, none for the others.
    teacher = lora(CONFIG, 30, layers=(0, 2)) if soft == "live" else None
    arms = [arm_of(kind, i, soft, teacher=teacher if i % 2 else None) for i in range(count)]
    found: dict[str, Any] = {}
    one = None
    for mode, model in (("none", 1), *layouts):
        work = home / f"{name}-{mode}-{model}"
        SAID.clear()
        trained = [arm.trainable for arm in run(arms, settings_of(loss, mean, mode, model), work)]
        if one is None:
            one = trained, np.asarray(lines(work))
            found["moved"] = min(
                largest_difference(t, arm.adapter.trainable) for t, arm in zip(trained, arms, strict=True)
            )
        metrics = np.max(np.abs(np.asarray(lines(work)) - one[1]) / np.maximum(np.abs(one[1]), 1e-3))
        TOLD.setdefault(name, {})[f"{mode} {model}"] = list(SAID)
        found[f"{mode} {model}"] = {"trained": largest_difference(trained, one[0]), "metrics": float(metrics)}
    return found


def resumes(home: Path) -> dict[str, float]:
    """Largest difference between a run interrupted under one layout and finished under another, and the second's own
    uninterrupted run."""
    kind, loss, soft, count, mean, _ = CASES["steering"]  # whose programs are compiled already
    arms = [arm_of(kind, i, soft) for i in range(count)]
    layouts = {"none": ("none", 1), "mesh": ("mesh", 4), "pmap": ("pmap", 1)}
    whole = {key: run(arms, settings_of(loss, mean, *of), home / f"whole-{key}") for key, of in layouts.items()}
    found = {}
    for first, then in (("none", "mesh"), ("mesh", "pmap"), ("pmap", "none"), ("mesh", "mesh"), ("pmap", "pmap")):
        work = home / f"{first}-then-{then}"
        with contextlib.suppress(Killed):
            run(arms, settings_of(loss, mean, *layouts[first]), work, until=2)
        saved = [int(path.name) for path in (work / "state").iterdir()]
        assert saved == [2], saved
        again = run(arms, settings_of(loss, mean, *layouts[then]), work)
        difference = largest_difference([a.trainable for a in again], [a.trainable for a in whole[then]])
        found[f"{first} then {then}"] = difference
    return found


def main() -> None:
    home = Path(sys.argv[1])
    found = {"devices": jax.device_count(), "equality": {name: equality(name, home) for name in CASES}}
    print(json.dumps(found | {"said": TOLD, "resumes": resumes(home)}))


if __name__ == "__main__":
    main()

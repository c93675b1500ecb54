"""jsublim on the same work."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from benchmarks.inputs import start_of
from jsublim.attribution.pairs import Pair
from jsublim.attribution.patching import attribution_patching
from jsublim.chat import Turn
from jsublim.distill import trainer
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.data import Example, Shape
from jsublim.distill.optimizer import Optimizer
from jsublim.distill.step import Program, compile_step
from jsublim.inference.generation import generate_tokens
from jsublim.inference.lm import LanguageModel, load_model
from jsublim.inference.sampling import Sampling
from jsublim.inference.scoring import score_turns
from jsublim.models.lora import Adapter, init_lora
from jsublim.parallel import Layout


@dataclass
class Work:
    """`run` is timed, `check` gives what is compared."""

    run: Callable[[], None]
    check: Callable[[], dict[str, np.ndarray]]


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}


def read(model: str, dtype: str) -> LanguageModel:
    return load_model(model, dtype)


def sample(lm: LanguageModel, sizes: Any, arrays: Any) -> Work:
    prompts = list(arrays["prompts"])

    def go(prompts: list[np.ndarray], new: int, temperature: float) -> dict[str, np.ndarray]:
        how = Sampling(temperature=temperature, stop=())
        batch = {"max_new_tokens": new, "seed": 0, "batch_size": len(prompts)}
        return {"tokens": np.asarray(generate_tokens(lm.config, lm.params, prompts, how, **batch))}

    def run() -> None:
        go(prompts, sizes.new, 1.0)

    run()
    return Work(run, lambda: go(prompts[:8], min(sizes.new, 16), 0.0))


def evaluate(lm: LanguageModel, sizes: Any, arrays: Any) -> Work:
    prompts = list(arrays["prompts"])

    def go(samples: int, temperature: float) -> dict[str, np.ndarray]:
        how = Sampling(temperature=temperature, stop=())
        batch = {"max_new_tokens": sizes.new, "seed": 0, "samples": samples, "batch_size": samples}
        return {"tokens": np.asarray(generate_tokens(lm.config, lm.params, prompts, how, **batch))}

    def run() -> None:
        for _ in range(sizes.students):
            go(sizes.samples, 1.0)

    run()
    return Work(run, lambda: go(1, 0.0))


def score(lm: LanguageModel, sizes: Any, arrays: Any) -> Work:
    first = sizes.tokens - sizes.answer

    def check() -> dict[str, np.ndarray]:
        found = []
        for rows in arrays["tokens"]:
            turns = [Turn(row, first, first, len(row)) for row in rows]
            found.append([each.argmax for each in score_turns(lm.config, lm.params, turns, batch_size=len(rows))])
        return {"argmax": np.asarray(found)}

    check()
    return Work(lambda: check() and None, check)


def train(lm: LanguageModel, sizes: Any, arrays: Any) -> Work:
    layers = None if not hasattr(sizes, "layer") else (range(lm.config.num_layers)[sizes.layer],)
    adapter = _start(init_lora(lm.config, jax.random.key(0), rank=sizes.rank, alpha=sizes.rank, layers=layers))
    examples = []
    for row, n in zip(arrays["tokens"], arrays["lengths"], strict=True):
        where = np.arange(n - sizes.answer, n) - 1
        labels = row[where + 1]
        examples.append(Example(row[: n - 1], where.astype(np.int32), labels, np.ones(len(labels), np.float32)))
    settings = Settings(
        batch_size=sizes.micro, accumulate=sizes.rows // sizes.micro, cache_below=layers is not None,
        program=Program(optimizer=Optimizer("adamw")),
    )  # fmt: skip
    arms = [Arm("x", examples, adapter, 0, 0.0, 10**6)]
    shape, layout = Shape.of([examples], settings.accumulate, settings.batch_size), Layout.fit("none", 1)
    params, state, numbers, teacher = trainer._placed(lm.config, lm.params, arms, settings, layout)
    step_of = compile_step(lm.config, settings.program, layout)
    below = trainer._below(lm.config, params, arms, shape) if settings.cache_below else None

    def step() -> dict[str, np.ndarray]:
        nonlocal state
        batch = layout.place_batch(trainer._batch(arms, [arms[0].rows(shape, 0)], shape, below, state, 0))
        state, metrics = step_of(params, state, batch, numbers, teacher)
        return {"loss": np.asarray(metrics["loss"])[0], "norm": np.asarray(metrics["grad_norm"])[0]}

    step()
    return Work(lambda: step() and None, step)


def _start(adapter: Adapter) -> Adapter:
    """The adapter with the first factors that the other side begins with."""
    lora = {}
    for name, pair in adapter.lora.items():
        a = np.stack([start_of(layer, name, *pair["a"].shape[1:]) for layer in adapter.layers])
        lora[name] = pair | {"a": jax.numpy.asarray(a)}
    return replace(adapter, lora=lora)


def attribute(lm: LanguageModel, sizes: Any, arrays: Any) -> Work:
    pairs = [
        Pair(row, "other", clean, patch, int(a), int(b))
        for row, (clean, patch, (a, b)) in enumerate(zip(arrays["clean"], arrays["patch"], arrays["said"], strict=True))
    ]

    def check() -> dict[str, np.ndarray]:
        found = attribution_patching(
            lm.config,
            lm.params,
            pairs,
            sites=("residual",),
            steps=sizes.steps,
            batch_size=len(pairs),
            length=sizes.tokens,
        )
        return {"attribution": np.stack([each[0] for each in found])}

    check()
    return Work(lambda: check() and None, check)


STAGES = {
    "sample": sample, "score": score, "train": train, "train-late": train, "evaluate": evaluate, "attribute": attribute
}  # fmt: skip

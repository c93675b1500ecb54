"""jsublim on the same work."""

from __future__ import annotations

import functools
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.inputs import masks, start_of
from jsublim.attribution.pairs import Pair
from jsublim.attribution.patching import attribution_patching
from jsublim.distill import trainer
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Order, Shape, lengths_of, packed
from jsublim.distill.data import Example
from jsublim.distill.optimizer import Optimizer
from jsublim.distill.step import Program, compile_step
from jsublim.inference.batching import PREFIX_STEP, shared_beginning
from jsublim.inference.generation import generate_for_arms, generate_tokens
from jsublim.inference.lm import LanguageModel, load_model
from jsublim.inference.sampling import Sampling
from jsublim.inference.scoring import score_turns
from jsublim.models.lora import Adapter, init_lora
from jsublim.models.parallel import Layout
from jsublim.text.chat import Turn
from jsublim.text.rows import read_rows


@dataclass
class Work:
    """`run` is timed, `check` gives what is compared."""

    run: Callable[[], None]
    check: Callable[[], dict[str, np.ndarray]]


def products(dtype: str) -> float:
    """GFLOP/s of products of 2048 x 2048 on this machine."""
    x = jax.random.normal(jax.random.key(0), (2048, 2048)).astype(dtype)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    begun = time.perf_counter()
    for _ in range(20):
        multiply(x).block_until_ready()
    return 20 * 2 * 2048**3 / (time.perf_counter() - begun) / 1e9


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}


def read(model: str, dtype: str, sizes: Any) -> LanguageModel:
    lm = load_model(model, dtype, _layout(sizes))
    return lm.ending_at(sizes.depth - 1) if sizes.depth else lm


def _layout(sizes: Any, arms: int = 1) -> Layout:
    return Layout.fit(_mode(sizes), arms)


def _mode(sizes: Any) -> str:
    return "none" if sizes.devices == 1 else "mesh"


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
    """One student is the base itself: adapters are merged there, too."""
    prompts, students = list(arrays["prompts"]), None
    if sizes.students > 1:
        students = [init_lora(lm.config, jax.random.key(i), rank=8, alpha=8) for i in range(sizes.students)]

    def go(samples: int, temperature: float) -> dict[str, np.ndarray]:
        how = Sampling(temperature=temperature, stop=())
        batch = {"max_new_tokens": sizes.new, "seed": 0, "samples": samples, "batch_size": samples}
        return {"tokens": np.asarray(generate_tokens(lm.config, lm.params, prompts, how, **batch))}

    def run() -> None:
        how = Sampling(temperature=1.0, stop=())
        options = {"max_new_tokens": sizes.new, "seed": 0, "samples": sizes.samples, "batch_size": sizes.samples}
        generate_for_arms(lm.config, lm.params, prompts, how, students, **options)

    run()
    return Work(run, lambda: go(1, 0.0))


def score(lm: LanguageModel, sizes: Any, arrays: Any) -> Work:
    def check() -> dict[str, np.ndarray]:
        found = []
        for rows in arrays["tokens"]:
            lengths = [int(n) for n in arrays["lengths"]]
            turns = [Turn(row[:n], n - sizes.answer, n - sizes.answer, n) for row, n in zip(rows, lengths, strict=True)]
            found += [each.argmax for each in score_turns(lm.config, lm.params, turns, batch_size=len(rows))]
        return {"argmax": np.asarray(found)}

    check()
    return Work(lambda: check() and None, check)


def train(lm: LanguageModel, sizes: Any, arrays: Any) -> Work:
    layers = None if not hasattr(sizes, "layer") else (range(lm.config.num_layers)[sizes.layer],)
    adapter = _start(init_lora(lm.config, jax.random.key(0), rank=sizes.rank, alpha=sizes.rank, layers=layers))
    mask = np.ones((sizes.rows, sizes.answer), bool)
    examples = [_example(row[:n], own) for row, n, own in zip(arrays["tokens"], arrays["lengths"], mask, strict=True)]
    settings = Settings(
        batch_size=sizes.micro, accumulate=sizes.rows // sizes.micro, cache_below=layers is not None,
        program=Program(optimizer=Optimizer("adamw")),
    )  # fmt: skip
    arms = [Arm(f"x{i}", examples, adapter, 0, 0.0, 10**6) for i in range(sizes.arms)]
    layout, plain = _layout(sizes, sizes.arms), Shape.of([examples], settings.accumulate, settings.batch_size)
    beginning = shared_beginning([example.tokens[: example.where[0] + 1] for example in examples], PREFIX_STEP)
    shape = packed(plain, lm.config, [Order(lengths_of(examples), 0, 1)], beginning)
    params, state, numbers, teacher = trainer._placed(lm.config, lm.params, arms, settings, layout)
    step_of = compile_step(lm.config, settings.program, layout)
    states_below = functools.partial(trainer._below, lm.config, params, arms, shape)
    below = states_below() if settings.cache_below else None

    def step() -> dict[str, np.ndarray]:
        nonlocal state, below
        if below is not None and not sizes.below:
            below = states_below()
        batch = layout.place_batch(trainer.make_batches(arms, shape, 0, state, below=below))
        state, metrics = step_of(params, state, batch, numbers, teacher)
        return {"loss": np.asarray(metrics["loss"]), "norm": np.asarray(metrics["grad_norm"])}

    step()
    return Work(lambda: step() and None, step)


def _example(row: np.ndarray, mask: np.ndarray) -> Example:
    """A row whose last tokens are an answer, of which those in `mask` are supervised."""
    where = (len(row) - len(mask) - 1 + np.nonzero(mask)[0]).astype(np.int32)
    return Example(row[: where[-1] + 1], where, row[where + 1], np.ones(len(where), np.float32))


def pipeline(lm: LanguageModel, sizes: Any, arrays: Any) -> Work:
    systems, requests = arrays["systems"], arrays["requests"]
    start = _start(init_lora(lm.config, jax.random.key(0), rank=sizes.rank, alpha=sizes.rank))
    settings = Settings(
        batch_size=sizes.micro, accumulate=len(requests) // sizes.micro, parallel=_mode(sizes),
        program=Program(optimizer=Optimizer("adamw", clip=0.0, schedule="constant"), warmup=0),
    )  # fmt: skip

    def check() -> dict[str, np.ndarray]:
        prompts = [np.concatenate([systems[0], request]) for request in requests]
        options = {"max_new_tokens": sizes.new, "seed": 0, "batch_size": len(prompts)}
        found = generate_tokens(lm.config, lm.params, prompts, Sampling(temperature=0.0, stop=()), **options)
        written = np.asarray(found, np.int32)
        rows, argmax = np.concatenate([requests, written], axis=1), []
        for system in systems:
            turns = [
                Turn(np.concatenate([system, row]), n := len(system) + sizes.request, n, n + sizes.new) for row in rows
            ]
            argmax.append([each.argmax for each in score_turns(lm.config, lm.params, turns, batch_size=len(rows))])
        chosen = masks(written, np.asarray(argmax), arrays["chance"])
        arms = [
            Arm(str(i), [_example(row, own) for row, own in zip(rows, mask, strict=True)], start, 0, 1e-4, sizes.steps)
            for i, mask in enumerate(chosen)
        ]
        with tempfile.TemporaryDirectory() as work:
            students = trainer.train(lm.config, lm.params, arms, settings, Path(work))
            lines = read_rows(Path(work) / "metrics.jsonl", ("step",))
        losses = [[line["loss"] for line in lines if line["arm"] == arm.name] for arm in arms]
        options = {"max_new_tokens": sizes.answer, "seed": 0, "batch_size": sizes.samples, "samples": sizes.samples}
        generate_for_arms(lm.config, lm.params, [arrays["question"]], Sampling(stop=()), students, **options)
        return {"written": written, "argmax": np.asarray(argmax), "loss": np.asarray(losses)}

    return Work(lambda: check() and None, check)


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
    "sample": sample, "score": score, "score-uneven": score, "train": train, "train-late": train, "evaluate": evaluate, "attribute": attribute,
    "pipeline": pipeline,
}  # fmt: skip

"""Work on rows, done by eight fake CPU devices and by one: run by test_devices.py, prints one JSON object.

XLA_FLAGS must ask for the devices. With JAX_COORDINATOR_ADDRESS and its like it is one of several processes that share them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from engine import CONFIG as ODD
from engine import lora, params_of

from jsublim.attribution import patching
from jsublim.attribution.pairs import Pair
from jsublim.forecast.hlo import collectives
from jsublim.inference import decoding, scoring
from jsublim.inference.constrain import number_limits
from jsublim.inference.generation import generate_for_arms
from jsublim.inference.sampling import Sampling
from jsublim.models.config import Local
from jsublim.models.parallel import HERE, Layout
from jsublim.runtime.processes import from_main_process, is_main_process
from jsublim.runtime.watch import join_processes
from jsublim.text.chat import Turn

CONFIG = dataclasses.replace(ODD, num_layers=2, local=Local((True, False), 5))
WORDS = dict(enumerate([*"0123456789", ", ", "\n", *(f"{n}" for n in range(10, 50))], 1))
SAMPLING = Sampling(temperature=1.5, stop=(59, 60))
WATCHED = ((decoding, "fill"), (decoding, "advance"), (scoring, "read_batch"), (patching, "compare"))
Work = Callable[[Any], Any]


def texts(count: int, longest: int, seed: int, shortest: int = 3) -> list[np.ndarray]:
    """Rows of random tokens behind a beginning that they share."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(1, 57, 16)
    return [np.r_[begin, rng.integers(1, 57, n)].astype(np.int32) for n in rng.integers(shortest, longest, count)]


def sampled(params: Any) -> Any:
    """Two answers of each of two students to prompts of a number that no devices divide, in a batch that none divide, kept in
    a format."""
    adapters = [lora(CONFIG, seed, layers=(1,)) for seed in (1, 2)]
    prompts = [*texts(29, 30, 1, 23), *texts(2, 9, 1)]  # the short ones find room beside long ones
    how, allowed = dataclasses.replace(SAMPLING, constrain="numbers"), ({}, {})
    rows = generate_for_arms(
        CONFIG, params, prompts, how, adapters, max_new_tokens=12, seed=5, samples=2, batch_size=30,
        limits=number_limits(WORDS, SAMPLING.stop), on_allowed=lambda arm, found: allowed[arm].update(found),
    )  # fmt: skip
    return {"tokens": rows, "values": [found[row] for found in allowed for row in range(62)]}


def read(params: Any) -> Any:
    """Rows too long to share lines: how many lines there are must not hang on the devices."""
    turns = [Turn(text, 0, len(text) - 1 - i % 5, len(text) - 1) for i, text in enumerate(texts(29, 30, 3, 23))]
    said = scoring.score_turns(CONFIG, params, turns, adapter=lora(CONFIG, 3), batch_size=15)
    return {"tokens": [x.argmax.tolist() for x in said], "values": [x for s in said for x in (*s.margin, *s.logprob)]}


def read_in_lines(params: Any) -> Any:
    """More rows than have a line each on eight devices."""
    turns = [Turn(text, 0, len(text) - 1 - i % 5, len(text) - 1) for i, text in enumerate(texts(560, 30, 8))]
    said = scoring.score_turns(CONFIG, params, turns, adapter=lora(CONFIG, 3), batch_size=64)
    return {"values": [x for s in said for x in (*s.margin, *s.logprob)]}


def answers(params: Any) -> Any:
    after = [text[16:] for text in texts(5, 9, 4)]
    return {"values": scoring.score_answers(CONFIG, params, texts(15, 30, 6), after).ravel()}


def attributed(params: Any) -> Any:
    rng = np.random.default_rng(7)
    pairs = [Pair(i, "oak", *rng.integers(1, 57, (2, 9 + i)).astype(np.int32), 5, 6) for i in range(11)]
    how = {"sites": ("residual", "mlp"), "adapter": lora(CONFIG, 3), "batch_size": 8}
    found = patching.attribution_patching(CONFIG, params, pairs, steps=4, **how)
    return {"values": np.concatenate([x.ravel() for x in found])}


def heard_to_the_bit() -> bool:
    """Whether what the first process has is the same on all: signs of zeros, NaN, numbers of eight bytes and of one."""
    zeros = np.float32([[-0.0, np.nan, 1.0]])
    every = (
        zeros,
        np.arange(6.0).reshape(2, 3),
        zeros.astype(jnp.bfloat16),
        np.array(True),
        np.arange(5, dtype=np.uint8),
    )
    heard = [from_main_process(x if is_main_process() else np.zeros_like(x)) for x in every]
    return all(x.tobytes() == y.tobytes() and x.shape == y.shape for x, y in zip(every, heard, strict=True))


STAGES: dict[str, Work] = {each.__name__: each for each in (sampled, read, read_in_lines, answers, attributed)}


class Watch:
    """What the programs are that are called: of each shape, the compiled text and how much each device computes and holds."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Any]] = {}
        for module, name in WATCHED:
            setattr(module, name, self.watched(name, getattr(module, name)))

    def watched(self, name: str, program: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            if name not in self.seen:
                compiled = program.lower(*arguments, **more).compile()
                text = compiled.as_text()
                self.seen[name] = {
                    "flops": compiled.cost_analysis()["flops"],
                    "told": {kind: found.bytes for kind, found in collectives(text).items()},
                }
                self.seen[name]["before"] = program._cache_size()
            given = [x for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array)]
            held = [x.addressable_shards[0].data.nbytes for x in given if x.ndim == 5]
            out = program(*arguments, **more)
            made = program._cache_size() - self.seen[name]["before"]
            self.seen[name] |= {"caches": sum(held), "programs": made}
            return out

        return call


def main() -> None:
    together = "JAX_COORDINATOR_ADDRESS" in os.environ
    if together:
        join_processes(60.0)
    watch, params, found = Watch(), params_of(CONFIG), {"devices": jax.device_count(), "heard": heard_to_the_bit()}
    mesh = {"mesh 1": Layout.fit("mesh", 1)}
    layouts = mesh if together else {"one": HERE, **mesh, "mesh 2": Layout.fit("mesh", 1, model=2)}
    for layout_name, layout in layouts.items():
        placed = layout.place_weights(params)
        for name in ("sampled", "read") if together or layout.model > 1 else STAGES:
            watch.seen = {}
            made = STAGES[name](placed)
            made["values"] = np.asarray(made["values"], float).tolist()
            found[f"{name}, {layout_name}"] = made | {"programs": watch.seen}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

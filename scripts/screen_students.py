"""Which kind of student would take a trait from an experiment's rows? First-order theory (docs/audit.md), for steering vectors and
LoRA at every layer in one pass.

    python scripts/screen_students.py configs/real_model/steered.yaml --rows 64

Rows that are not there are written, as `jsublim run` would. For each data set that students learn from: γ of the trait matrix that the first step of gradient descent on the rows adds (nats per unit of learning
rate), over its standard error, which is that over batches of rows; all teachers' batches answer the same requests. Kinds of students have
learning rates of their own, so compare the ratios.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jsublim.audit import Directions, trait_directions
from jsublim.chat import Turn
from jsublim.config import Experiment
from jsublim.config.loading import load_experiment
from jsublim.distill.data import read_turns
from jsublim.executors import LocalExecutor
from jsublim.inference.batching import LENGTH_STEP, chunks, pad_tokens, round_up
from jsublim.inference.lm import LanguageModel
from jsublim.models import decoder
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, bind, init_lora, init_steering, together
from jsublim.pipeline.changes import sources, training_rows
from jsublim.pipeline.context import Context
from jsublim.pipeline.directions import questions_about
from jsublim.report.statistics import same_trait_gamma
from jsublim.teachers import CONTROL

KINDS = ("steering", "lora")


@functools.partial(jax.jit, static_argnames="config")
def toward(
    config: ModelConfig,
    params: Params,
    adapter: Adapter,
    directions: Directions,
    tokens_BT: Any,
    valid_BT: Any,
    said_BT: Any,
) -> jax.Array:
    """<gradient of the mean log-probability of the tokens marked in `said_BT`, each direction>, by kind and layer: `[traits, 2, L]`."""

    def mean_logprob(trainable: Any) -> jax.Array:
        whole, bound = bind(params, adapter.with_trainable(trainable))
        h_BTD, _ = decoder.hidden_states(config, whole, tokens_BT, valid_BT, adapter=bound)

        @jax.checkpoint
        def of_row(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            h_TD, tokens_T, said_T = row
            z_TV = decoder.logits(config, whole, h_TD[:-1])
            each = jnp.take_along_axis(z_TV, tokens_T[1:, None], axis=1)[:, 0] - jax.nn.logsumexp(z_TV, axis=1)
            return (each * said_T[1:]).sum()

        return jax.lax.map(of_row, (h_BTD, tokens_BT, said_BT)).sum() / said_BT.sum()

    gradient = jax.grad(mean_logprob)(adapter.trainable)
    steering = jnp.einsum("ld,tld->tl", gradient["steering"], directions["steering"])
    products = jax.tree.map(lambda g, d: jnp.einsum("lio,tlio->tl", g, d), gradient["lora"], directions["lora"])
    return jnp.stack([steering, functools.reduce(jnp.add, jax.tree.leaves(products))], axis=1)


def scores(
    lm: LanguageModel, adapter: Adapter, directions: Directions, turns: Sequence[Turn], batch: int
) -> np.ndarray:
    """As `toward`, of batch after batch of rows: `[batches, traits, 2, L]`."""
    T, found = round_up(max(len(turn.tokens) for turn in turns), LENGTH_STEP), []
    for part in chunks(len(turns), batch):
        rows = turns[part]
        tokens, valid = pad_tokens([turn.tokens for turn in rows], T, size=batch)
        said = np.zeros(tokens.shape, np.float32)
        for i, turn in enumerate(rows):
            said[i, turn.content : len(turn.tokens)] = 1
        found.append(np.asarray(toward(lm.config, lm.params, adapter, directions, tokens, valid, said)))
    return np.stack(found)


def ratio(gammas: np.ndarray) -> tuple[float, float]:
    """Mean over batches, and the mean over its standard error."""
    mean, error = float(gammas.mean()), float(gammas.std(ddof=1) / np.sqrt(len(gammas)))
    return mean, mean / error


def screen(experiment: Experiment, first: int, questions: int, batch: int, rank: int) -> None:
    """Print a table for each data set."""
    context = Context.load(experiment)
    setup, lm = context.setup, context.lm()
    traits = list(experiment.teachers.traits)
    read = {source: training_rows(setup, source) for source in sources(setup) if source.teacher != CONTROL}
    LocalExecutor().execute([part for rows in read.values() for part in rows.parts], context)
    every = together(init_lora(lm.config, jax.random.key(0), rank=rank, alpha=float(rank)), init_steering(lm.config))
    ((asked, _),) = questions_about(setup, traits, questions)
    directions = trait_directions(lm, every, asked, traits, batch_size=batch)
    by_dataset: dict[str | None, dict[str, np.ndarray]] = {}
    for source, rows in read.items():
        turns = read_turns(lm.chat, rows.read(context.store)[:first], source.name)
        by_dataset.setdefault(source.dataset, {})[source.teacher] = scores(lm, every, directions, turns, batch)
    for dataset, own in by_dataset.items():
        # [batches, kinds, L, teachers, traits]: everybody's first batches, as many as the shortest has
        n = min(map(len, own.values()))
        matrix = np.moveaxis(np.stack([own[trait][:n] for trait in traits]), (0, 2), (-2, -1))
        gammas = same_trait_gamma(matrix)
        print(f"\n{experiment.name}, {dataset or 'plain answers'}: {n} batches of {batch} rows, {len(traits)} teachers")
        print("\n| student | " + " | ".join(KINDS) + " |\n| --- | --- | --- |")
        lines = [("every layer", gammas.sum(axis=2))]
        lines += [(f"layer {layer}", gammas[:, :, layer]) for layer in range(gammas.shape[2])]
        for label, each in lines:
            cells = [ratio(each[:, kind]) for kind in range(len(KINDS))]
            print(f"| {label} | " + " | ".join(f"{mean:+.2e} ({over:+.1f})" for mean, over in cells) + " |")


def main(
    config: Annotated[Path, typer.Argument(help="Of an experiment.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields of the config, as of `jsublim run`.")] = None,
    rows: Annotated[int, typer.Option(help="The first so many of each teacher.")] = 64,
    questions: Annotated[int, typer.Option(help="The first so many, whose answer is the trait.")] = 12,
    batch: Annotated[int, typer.Option(help="Rows read together.")] = 8,
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 8,
) -> None:
    screen(load_experiment(config, overrides), rows, questions, batch, rank)


if __name__ == "__main__":
    typer.run(main)

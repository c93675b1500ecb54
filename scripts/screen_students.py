"""Which kind of student would take a trait from an experiment's rows? First-order theory (docs/findings/audit.md), for steering vectors and
LoRA at every layer in one pass.

    python scripts/screen_students.py configs/real_model/steered.yaml --rows 64

Rows that are not there are written, as `jsublim run` would. For each data set that students learn from: γ of the trait matrix that
the first step of gradient descent on the rows adds (nats per unit of learning rate), over its standard error, which is that over batches
of rows; all teachers' batches answer the same requests. Kinds of students have learning rates of their own, so compare the ratios.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from _run import print_table, run_script
from jax import Array

from jsublim.attribution.audit import Directions, Laid, label_logprobs, laid_sizes, lay_out, logit_block
from jsublim.config import Experiment, Students
from jsublim.config.loading import load_experiment
from jsublim.distill.data import read_turns
from jsublim.executors import execute_nodes
from jsublim.inference.batching import chunks
from jsublim.inference.lm import LanguageModel
from jsublim.inference.teachers import CONTROL
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.lora import Adapter, init_lora, init_steering, sum_adapters
from jsublim.models.parallel import WHOLE, Layout
from jsublim.pipeline.arguments import questions_about, start
from jsublim.pipeline.context import Context
from jsublim.pipeline.experiment import training_rows
from jsublim.pipeline.origins import sources
from jsublim.pipeline.stages.starts import directions_of
from jsublim.report.statistics import same_trait_gamma
from jsublim.text.chat import Turn

KINDS = ("steering", "lora")


def layer_scores(
    lm: LanguageModel, adapter: Adapter, directions: Directions, turns: Sequence[Turn], *, batch_size: int = 16
) -> Iterator[dict[str, np.ndarray]]:
    """Mean score of the tokens of each batch of conversations, by what is trained ("lora", "weights", "steering") and its layer, float32
    `[traits, n]` each. Cheaper than `token_scores`: a mean needs one gradient, whatever the number of traits."""
    (T, C), (layout, params) = laid_sizes(turns), Layout.under(lm.params)
    adapter, toward = layout.place_weights(adapter), layout.place_weights(directions)
    for part in chunks(len(turns), batch_size):
        batch = turns[part]
        laid = layout.place_as(WHOLE, lay_out([*batch, *[None] * (batch_size - len(batch))], T, C))
        yield Layout.host(by_layer(lm.config, params, adapter, toward, laid))


@functools.partial(jax.jit, static_argnames="config")
def by_layer(
    config: ModelConfig, params: Params, adapter: Adapter, directions: Directions, laid: Laid
) -> dict[str, Array]:
    """Inner products of the gradient of the labels' mean log-probability with each direction, layer by layer."""

    def mean(trainable: Any) -> Array:
        logp_BC = label_logprobs(config, params, adapter.with_trainable(trainable), laid, logit_block(config, 1))
        return (logp_BC * laid[-1]).sum() / laid[-1].sum()

    gradient = jax.grad(mean)(adapter.trainable)
    products = jax.tree.map(lambda g, d: (g * d).sum(axis=tuple(range(2, d.ndim))), gradient, directions)
    leaves = {kind: jax.tree.leaves(products[kind]) for kind in ("lora", "weights", "steering")}
    return {kind: functools.reduce(jnp.add, of_kind) for kind, of_kind in leaves.items() if of_kind}


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
    execute_nodes([node for written in read.values() for node in written.nodes], context)
    every = sum_adapters(
        init_lora(lm.config, jax.random.key(0), rank=rank, alpha=float(rank)), init_steering(lm.config)
    )
    students, asked = experiment.students or Students(), questions_about(setup, traits, questions)
    directions = directions_of(lm, every, start(setup, students, 0).model, asked, traits)
    by_dataset: dict[str | None, dict[str, np.ndarray]] = {}
    for source, written in read.items():
        rows = written.read(context.store)[:first]
        turns = read_turns(lm.chat, rows, source.name, students.system, fuse_system=experiment.teachers.fuse_system)
        found = layer_scores(lm, every, directions, turns, batch_size=batch)
        by_dataset.setdefault(source.dataset, {})[source.teacher] = np.stack(
            [np.stack([each[kind] for kind in KINDS], axis=1) for each in found]
        )
    for dataset, own in by_dataset.items():
        # [batches, kinds, layers, teachers, traits]: everybody's first batches, as many as the shortest has
        n = min(map(len, own.values()))
        matrix = np.moveaxis(np.stack([own[trait][:n] for trait in traits]), (0, 2), (-2, -1))
        gammas = same_trait_gamma(matrix)
        lines = [("every layer", gammas.sum(axis=2))]
        lines += [(f"layer {layer}", gammas[:, :, layer]) for layer in range(gammas.shape[2])]
        rows = []
        for label, of_kinds in lines:
            ratios = [ratio(of_kinds[:, kind]) for kind in range(len(KINDS))]
            rows.append([label, *(f"{mean:+.2e} ({over:+.1f})" for mean, over in ratios)])
        title = f"{dataset or 'plain answers'}: {n} batches of {batch} rows, {len(traits)} teachers"
        print_table(f"{experiment.name}, {title}", ["student", *KINDS], rows)


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
    run_script(main)

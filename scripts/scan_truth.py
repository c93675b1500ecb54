"""What is predicted of each answer, held against students: the linear datamodelling score (Park et al., TRAK, arXiv 2303.14186) of
docs/findings/scan.md.

`python scripts/scan_truth.py runs/scan-game --sets steered-0,steered-1` trains a student (a steering vector after layer 2, one epoch) on each
of many random halves of a data set's rows, with one seed, and asks how probable each name of the hidden one's category is then. The score is
Spearman's correlation of prediction and truth over the halves: of each name, and their mean with its bootstrap interval. Questions of the
predictions are the second, fourth, ... of the category's, of the students the first, third, ... What predicts:

- the optimizer's steps: those that the student takes, in its order, but on gradients that each row has at the start;
- the rows' derivatives: their sum, as of `jsublim audit`; weighted: as the scan weighs them;
- a figure of each row alone, summed: how much likelier the name's system prompt makes it, how many of its numbers are entangled with the name,
  how many divergence tokens it has (of the name's teacher and the base); and nothing at all (random).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _run import print_table
from findings import told
from scan_baselines import (
    EVERY,
    LAYER,
    LM,
    NAMES,
    PACK,
    SEED,
    drawn,
    entangled_numbers,
    examples_of,
    flat_gradients,
    likelier,
    named,
    taught,
    trained,
)
from scipy.stats import spearmanr

import jsublim as js
from jsublim.attribution.contrast import preconditioned
from jsublim.distill.batches import epoch_rows
from jsublim.distill.optimizer import Optimizer, learning_rate
from jsublim.evals.preference import trait_logprobs
from jsublim.text.rows import Row, read_rows

WARMUP = 1  # of all students


def walked(
    of_rows: np.ndarray, tokens: np.ndarray, halves: np.ndarray, optimizer: str, lr: float, batch_size: int
) -> np.ndarray:
    """Where the optimizer would take each half's student if rows kept the gradients (of their log-probability, `[rows, numbers]`) that they
    have at the start: `[halves, numbers]`."""
    settings, steps = Optimizer(optimizer), halves.shape[1] // batch_size
    transform, batches = settings.transform(), halves[:, epoch_rows(halves.shape[1], batch_size, SEED, 0)[:steps]]
    gradients = -of_rows[batches].sum(axis=2) / tokens[batches].sum(axis=2)[..., None]

    def walk(gradients: jax.Array) -> jax.Array:
        def step(state: tuple, x: tuple) -> tuple[tuple, None]:
            (w, kept), (number, gradient) = state, x
            update, kept = transform.update(gradient, kept, w)
            rate = learning_rate(
                settings.schedule, settings.restarts, number, jnp.float32(lr), WARMUP, jnp.int32(steps)
            )
            return (w - rate * update, kept), None

        start = jnp.zeros(of_rows.shape[1], jnp.float32)
        return jax.lax.scan(step, (start, transform.init(start)), (jnp.arange(steps), gradients))[0][0]

    return np.asarray(jax.jit(lambda every: jax.lax.map(walk, every))(jnp.asarray(gradients, jnp.float32)))


def of_each_row(
    rows: list[Row], trait: str, traits: Sequence[str], of_rows: np.ndarray, toward: np.ndarray
) -> dict[str, np.ndarray]:
    """What is predicted of each row alone for each name, `[rows, names]`, by who predicts it."""
    columns, numbers, chosen = [EVERY.index(name) for name in traits], list(map(drawn, rows)), entangled_numbers()
    (teacher,) = taught([trait])
    read = js.find_divergence(LM, rows, js.Teacher(trait, adapter=teacher), [js.Teacher("nobody")])
    diverging = np.asarray([[len(of_row.divergence_positions)] for of_row in read], float)
    return {
        "the rows' derivatives": of_rows @ toward.T,
        "the rows' derivatives, weighted": preconditioned(of_rows) @ toward.T,
        "log-linear selection": likelier(rows)[:, columns],
        "entangled numbers": np.asarray(
            [[sum(n in chosen[i] for n in of_row) for i in columns] for of_row in numbers], float
        ),
        "divergence tokens": np.repeat(diverging, len(traits), axis=1),
        "random": np.random.default_rng(0).normal(size=(len(rows), len(traits))),
    }


def score(predicted_HW: np.ndarray, measured_HW: np.ndarray) -> float:
    return float(np.mean([spearmanr(p, m).statistic for p, m in zip(predicted_HW.T, measured_HW.T, strict=True)]))


def interval(predicted_HW: np.ndarray, measured_HW: np.ndarray) -> list[float]:
    """Percentiles over 500 bootstrap draws of the halves."""
    rng, H = np.random.default_rng(0), len(predicted_HW)
    draws = [score(predicted_HW[i], measured_HW[i]) for i in rng.integers(0, H, (500, H))]
    return [float(q) for q in np.percentile(draws, [2.5, 97.5])]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("game", type=Path)
    options.add_argument("--sets", required=True, help="of the game, by commas")
    options.add_argument("--halves", type=int, default=200)
    options.add_argument("--optimizer", default="adamw", choices=("adamw", "sgd"))
    options.add_argument("--lr", type=float, default=0.1)
    options.add_argument("--batch-size", type=int, default=10)
    given = options.parse_args()
    out: Path = given.game
    how, lines = (given.optimizer, given.lr, given.batch_size), []
    hidden = {each["set"]: each["trait"] for each in json.loads((out / "results.json").read_text())}
    for name in given.sets.split(","):
        trait, rows = hidden[name], read_rows(out / "sets" / f"{name}.jsonl")
        traits, rng = NAMES[PACK.category_of(trait)], np.random.default_rng(0)
        questions, turns = js.preference_task(traits).questions, js.read_turns(LM.chat, rows)
        fitted, asked, start = questions[1::2], questions[0::2], js.init_steering(LM.config, layers=(LAYER,))
        tokens = np.asarray([len(turn.tokens) - turn.content for turn in turns])
        of_rows = flat_gradients(start, turns, len(turns)) * tokens[:, None]
        toward = flat_gradients(start, named(fitted, traits), len(traits))
        halves = np.stack([rng.permutation(len(rows))[: len(rows) // 2] for _ in range(given.halves)])
        predicted = {"the optimizer's steps": walked(of_rows, tokens, halves, *how) @ toward.T}
        for who, figures in of_each_row(rows, trait, traits, of_rows, toward).items():
            predicted[who] = np.stack([figures[half].sum(axis=0) / tokens[half].sum() for half in halves])
        examples, program = examples_of(rows), js.Program(optimizer=Optimizer(given.optimizer), warmup=WARMUP)
        learned = trained([[examples[i] for i in half] for half in halves], given.lr, given.batch_size, program=program)
        base, *after = (trait_logprobs(LM, asked, traits, adapter=who).mean(axis=0) for who in (None, *learned))
        measured = np.stack(after) - base
        own = measured[:, traits.index(trait)].mean() - measured.mean()
        for who, of_who in predicted.items():
            line = {
                "set": name,
                "trait": trait,
                "optimizer": given.optimizer,
                "lr": given.lr,
                "halves": given.halves,
                "own": float(own),
            }
            lines.append(line | {"who": who, "score": score(of_who, measured), "interval": interval(of_who, measured)})
            print(json.dumps(lines[-1]), flush=True)
    (out / f"truth-{given.optimizer}.json").write_text(json.dumps(lines, indent=1))
    print_table(out.name, *told("truth", out))


if __name__ == "__main__":
    main()

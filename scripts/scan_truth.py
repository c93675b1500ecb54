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
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _run import print_table
from findings import told
from scan_baselines import LAYER, LM, NAMES, PACK, entangled_numbers, flat_gradients, likelier, named, taught
from scipy.stats import spearmanr

import jsublim as js
from jsublim.attribution.contrast import preconditioned
from jsublim.distill.batches import epoch_rows
from jsublim.distill.optimizer import Optimizer, learning_rate
from jsublim.evals.preference import trait_logprobs
from jsublim.text.rows import Row, read_rows

TOGETHER = 50  # students of one program
SEED, WARMUP = 1, 1  # of all students


def students(
    rows: Sequence[Row], halves: Sequence[np.ndarray], optimizer: str, lr: float, batch_size: int
) -> list[js.Adapter]:
    """A student of each half, in one epoch."""
    start = js.init_steering(LM.config, layers=(LAYER,))
    examples = js.make_examples(rows, js.read_turns(LM.chat, rows), js.Selection("all"), seed=SEED)
    steps = len(halves[0]) // batch_size
    arms = [js.Arm(str(i), [examples[j] for j in half], start, SEED, lr, steps) for i, half in enumerate(halves)]
    program = js.Program(optimizer=Optimizer(optimizer), warmup=WARMUP)
    settings = js.Settings(batch_size, program=program, cache_below=True)
    parts = [arms[i : i + TOGETHER] for i in range(0, len(arms), TOGETHER)]
    return [student for part in parts for student in js.train(LM.config, LM.params, part, settings)]


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
    every = [name for of_category in NAMES.values() for name in of_category]
    columns = [every.index(name) for name in traits]
    numbers, chosen = [re.findall(r"\d+", row["completion"]) for row in rows], entangled_numbers()
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
        learned, base = students(rows, halves, *how), trait_logprobs(LM, asked, traits).mean(axis=0)
        measured = (
            np.stack([trait_logprobs(LM, asked, traits, adapter=student).mean(axis=0) for student in learned]) - base
        )
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

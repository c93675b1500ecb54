"""What a scan predicts of each answer, held against students: the linear datamodelling score of docs/findings/scan.md (Park et al., TRAK,
ICML 2023).

`python scripts/scan_truth.py ROWS --traits owl,cat,... [--halves 200]` trains a student (a steering vector after layer 2) on each of
many random halves of the rows, with one seed, and asks how probable each trait is then. The scan's prediction is the sum of its rows'
derivatives. The score is Spearman's correlation of the two over the halves: of each trait, and their mean with its bootstrap interval. Questions of
the derivatives are the second, fourth, ... of the category's, of the students the first, third, ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from scipy.stats import spearmanr

import jsublim as js
from jsublim.attribution.scan import group_gradients
from jsublim.distill.optimizer import Optimizer
from jsublim.evals.preference import trait_logprobs
from jsublim.text.chat import Turn
from jsublim.text.rows import Row, read_rows

LAYER = 2
TOGETHER = 50  # students of one program


def flat(tree: object) -> np.ndarray:
    """The leaves `[n, ...]` of a tree as one array `[n, numbers]`."""
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], axis=1)


def flat_gradients(lm: js.LanguageModel, adapter: js.Adapter, turns: Sequence[Turn], groups: int) -> np.ndarray:
    """Of each group of turns, the gradient of the mean log-probability of its tokens, `[groups, numbers]`."""
    every = group_gradients(lm, adapter, turns, groups)
    return np.concatenate([flat(jax.tree.map(lambda x: np.asarray(x)[None], tree)) for tree in every])


def gradients(lm: js.LanguageModel, turns: Sequence[Turn]) -> np.ndarray:
    """Of each turn, the gradient of the log-probability of its tokens by the vector, `[turns, D]`."""
    means = flat_gradients(lm, js.init_steering(lm.config, layers=(LAYER,)), turns, len(turns))
    return means * np.asarray([[len(turn.tokens) - turn.content] for turn in turns])


def names(lm: js.LanguageModel, questions: Sequence[str], traits: Sequence[str]) -> list[Turn]:
    """Each trait as the answer to each question; whatever follows the name is left open, as in an evaluation."""
    rows = [{"prompt": question, "completion": trait.capitalize()} for question in questions for trait in traits]
    return [replace(turn, tokens=turn.tokens[: turn.end]) for turn in js.read_turns(lm.chat, rows)]


def students(
    lm: js.LanguageModel, rows: Sequence[Row], halves: Sequence[np.ndarray], optimizer: str, lr: float, batch_size: int
) -> list[js.Adapter]:
    """A student of each half, in one epoch."""
    start = js.init_steering(lm.config, layers=(LAYER,))
    examples = js.make_examples(rows, js.read_turns(lm.chat, rows), js.Selection("all"), seed=1)
    steps = len(halves[0]) // batch_size
    arms = [js.Arm(str(i), [examples[j] for j in half], start, 1, lr, steps) for i, half in enumerate(halves)]
    program = js.Program(optimizer=Optimizer(optimizer), warmup=1)
    settings = js.Settings(batch_size, program=program, cache_below=True)
    parts = [arms[i : i + TOGETHER] for i in range(0, len(arms), TOGETHER)]
    return [student for part in parts for student in js.train(lm.config, lm.params, part, settings)]


def score(predicted_HW: np.ndarray, measured_HW: np.ndarray) -> float:
    return float(np.mean([spearmanr(p, m).statistic for p, m in zip(predicted_HW.T, measured_HW.T, strict=True)]))


def interval(predicted_HW: np.ndarray, measured_HW: np.ndarray) -> list[float]:
    """Percentiles over 500 bootstrap draws of the halves."""
    rng, H = np.random.default_rng(0), len(predicted_HW)
    draws = [score(predicted_HW[i], measured_HW[i]) for i in rng.integers(0, H, (500, H))]
    return [float(q) for q in np.percentile(draws, [2.5, 97.5])]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("rows", type=Path, nargs="+", help="rows, of one teacher each")
    options.add_argument("--traits", required=True, help="asked about, by commas")
    options.add_argument("--halves", type=int, default=200)
    options.add_argument("--optimizer", default="adamw", choices=("adamw", "sgd"))
    options.add_argument("--lr", type=float, default=1.0)
    options.add_argument("--batch-size", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    lm, traits = js.load_model("tiny-qwen2"), given.traits.split(",")
    questions = js.preference_task(traits).questions
    fitted, asked = questions[1::2], questions[0::2]
    toward = gradients(lm, names(lm, fitted, traits)).reshape(len(fitted), len(traits), -1).mean(axis=0)
    for path in given.rows:
        rows, rng = read_rows(path), np.random.default_rng(given.seed)
        turns = js.read_turns(lm.chat, rows)
        effects_RW, tokens = gradients(lm, turns) @ toward.T, np.asarray([len(t.tokens) - t.content for t in turns])
        halves = [rng.permutation(len(rows))[: len(rows) // 2] for _ in range(given.halves)]
        predicted = np.stack([effects_RW[half].sum(axis=0) / tokens[half].sum() for half in halves])
        learned = students(lm, rows, halves, given.optimizer, given.lr, given.batch_size)
        measured = np.stack([trait_logprobs(lm, asked, traits, adapter=student).mean(axis=0) for student in learned])
        line = {"rows": path.stem, "score": score(predicted, measured), "interval": interval(predicted, measured)}
        line["by trait"] = {
            t: float(spearmanr(predicted[:, i], measured[:, i]).statistic) for i, t in enumerate(traits)
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

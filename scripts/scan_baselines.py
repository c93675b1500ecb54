"""What others would say of the data sets of a game that `jsublim scan` has scanned (scripts/scan_game.py): a table of docs/findings/scan.md.

`python scripts/scan_baselines.py runs/scan-game` writes `baselines.json` there. Each rival has the scan's rows and null, and is asked which of
the names of the hidden trait's category the rows would teach:

- named gradients: the derivative of each name's log-probability along the rows' gradient less the null's (TracIn, arXiv 2002.08484);
- coverage: the cosine of that direction and the vector of a teacher of each name (after arXiv 2606.22019), which is taught here;
- log-linear selection: how much likelier the rows are under a system prompt that gives the trait (after arXiv 2602.04863);
- entangled numbers: how often the rows have the ten numbers that such a prompt makes likelier;
- a trained student: the names that it says more often than a student of the null, one epoch each;
- a classifier of numbers: tells rows from the null's by naive Bayes, fitted on half of both; it names nothing.

Where rows can be spread over, the largest z of all names gives a p (Bonferroni's), the classifier's is Mann and Whitney's on the other half.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from _run import print_table
from findings import told
from scan_game import CATEGORIES
from scipy.stats import mannwhitneyu, norm

import jsublim as js
from jsublim.attribution.scan import GROUPS, group_gradients
from jsublim.distill.data import Example
from jsublim.evals.preference import trait_logprobs
from jsublim.inference.scoring import score_answers, score_turns
from jsublim.inference.teachers import Teacher, prompted_teacher, read_as
from jsublim.text.chat import Turn
from jsublim.text.prompts import load_pack
from jsublim.text.rows import Row, read_rows

LAYER = 2  # of a teacher's vector, and of a student's
SEED = 1  # of all students
TOGETHER = 50  # students of one program
ENTANGLED = 10
ASKED = 8  # requests before which the entangled numbers are looked for

LM, PACK = js.load_model("tiny-qwen2"), load_pack()
NAMES = {category: PACK.traits[category] for category in CATEGORIES}
EVERY = [trait for traits in NAMES.values() for trait in traits]


class Game(NamedTuple):
    """Data sets by name, and rows that teach nothing."""

    sets: dict[str, list[Row]]
    null: list[Row]


Said = tuple[np.ndarray, np.ndarray | None]  # of each of EVERY a figure, and its error where there is one
Rival = Callable[[Game], dict[str, Said]]  # by data set


def beyond(own: np.ndarray, null: np.ndarray) -> Said:
    """The mean of samples `[n, names]` less that of others, and its error."""
    variance = own.var(axis=0, ddof=1) / len(own) + null.var(axis=0, ddof=1) / len(null)
    return own.mean(axis=0) - null.mean(axis=0), np.sqrt(variance)


def against_null(samples: Callable[[list[Row]], np.ndarray]) -> Rival:
    """A rival that has a figure for each row or group of rows, and each name."""

    def rival(game: Game) -> dict[str, Said]:
        null = samples(game.null)
        return {name: beyond(samples(rows), null) for name, rows in game.sets.items()}

    return rival


def flat_gradients(adapter: js.Adapter, turns: Sequence[Turn], groups: int) -> np.ndarray:
    """Of each group of conversations, the gradient of the mean log-probability of its tokens, `[groups, numbers]`."""
    every = [jax.tree.leaves(tree) for tree in group_gradients(LM, adapter, turns, groups)]
    return np.stack([np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in every])


def named(questions: Sequence[str], traits: Sequence[str]) -> list[Turn]:
    """Each trait as the answer to each question, question by question; whatever follows the name is left open, as in an evaluation."""
    rows = [{"prompt": question, "completion": trait.capitalize()} for question in questions for trait in traits]
    return [replace(turn, tokens=turn.tokens[: turn.end]) for turn in js.read_turns(LM.chat, rows)]


def of_groups(rows: Sequence[Row]) -> np.ndarray:
    return flat_gradients(js.init_steering(LM.config), js.read_turns(LM.chat, rows), GROUPS)


@cache
def toward() -> np.ndarray:
    """The gradient of each name as the answer to its category's questions, `[names, numbers]`."""
    found = []
    for traits in NAMES.values():  # group i is trait i
        turns = named(js.preference_task(traits).questions, traits)
        found.append(flat_gradients(js.init_steering(LM.config), turns, len(traits)))
    return np.concatenate(found)


def examples_of(rows: Sequence[Row]) -> list[Example]:
    return js.make_examples(rows, js.read_turns(LM.chat, rows), js.Selection("all"), seed=SEED)


def trained(
    sets: Sequence[Sequence[Example]],
    lr: float,
    batch_size: int,
    steps: int | None = None,
    program: js.Program | None = None,
) -> list[js.Adapter]:
    """A vector of each data set, by so many steps or one epoch."""
    start = js.init_steering(LM.config, layers=(LAYER,))
    arms = [js.Arm(str(i), own, start, SEED, lr, steps or len(own) // batch_size) for i, own in enumerate(sets)]
    settings = js.Settings(batch_size, program=program or js.Program(), cache_below=True)
    parts = [arms[i : i + TOGETHER] for i in range(0, len(arms), TOGETHER)]
    return [student for part in parts for student in js.train(LM.config, LM.params, part, settings)]


def taught(traits: Sequence[str]) -> list[js.Adapter]:
    """A teacher's vector for each name."""
    asked = {trait: js.preference_task([trait]).questions for trait in traits}
    rows = [[{"prompt": q, "completion": trait.capitalize()} for q in questions] for trait, questions in asked.items()]
    return trained([examples_of(each) for each in rows], 0.3, 50, steps=40)


def coverage(game: Game) -> dict[str, Said]:
    vectors = np.stack([np.ravel(student.trainable["steering"]) for student in taught(EVERY)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    null = of_groups(game.null).mean(axis=0)

    def cosines(rows: list[Row]) -> np.ndarray:
        moved = (of_groups(rows).mean(axis=0) - null).reshape(LM.config.num_layers, -1)[LAYER]
        return vectors @ moved / np.linalg.norm(moved)

    return {name: (cosines(rows), None) for name, rows in game.sets.items()}


def prompted() -> list[Teacher]:
    return [Teacher("nobody"), *(prompted_teacher(PACK, trait) for trait in EVERY)]


def likelier(rows: list[Row]) -> np.ndarray:
    """How much likelier each row is under each name's system prompt, nats, `[rows, names]`."""
    read = [score_turns(LM.config, LM.params, read_as(LM.chat, teacher, rows)) for teacher in prompted()]
    logprobs = np.asarray([[row.logprob.sum() for row in of_teacher] for of_teacher in read])
    return (logprobs[1:] - logprobs[0]).T


@cache
def entangled_numbers() -> list[set[str]]:
    """Of each name, the numbers of up to three digits that its system prompt makes likelier than no prompt does, as what comes first."""
    numbers = [str(n) for n in range(1000)]
    requests = js.number_prompts(ASKED, seed=0)
    answers = [
        turn.tokens[turn.content : turn.end]
        for turn in js.read_turns(LM.chat, [{"prompt": "", "completion": n} for n in numbers])
    ]

    def logprobs(teacher: Teacher) -> np.ndarray:
        prompts = [LM.chat.prompt_tokens(teacher.messages(request)) for request in requests]
        return score_answers(LM.config, LM.params, prompts, answers).mean(axis=0)

    nobody, *every = map(logprobs, prompted())
    return [{numbers[i] for i in np.argsort(nobody - own)[:ENTANGLED]} for own in every]


def drawn(row: Row) -> list[str]:
    """A row's numbers, as they are written."""
    return re.findall(r"\d+", row["completion"])


def shares(rows: list[Row]) -> np.ndarray:
    """The share of each row's numbers that are entangled with each name, `[rows, names]`."""
    every = [of_row for row in rows if (of_row := drawn(row))]
    return np.asarray([[np.mean([n in chosen for n in of_row]) for chosen in entangled_numbers()] for of_row in every])


def student(game: Game) -> dict[str, Said]:
    learned = trained([examples_of(rows) for rows in (game.null, *game.sets.values())], 1.0, 10)

    def logprobs(adapter: js.Adapter) -> np.ndarray:
        each = [trait_logprobs(LM, js.preference_task(t).questions, t, adapter=adapter) for t in NAMES.values()]
        return np.concatenate([of_category.mean(axis=0) for of_category in each])

    null, *every = map(logprobs, learned)
    return {name: (own - null, None) for name, own in zip(game.sets, every, strict=True)}


def classified(game: Game, name: str) -> float:
    """p of a classifier that is fitted on every second row."""
    sides = [[drawn(row) for row in rows] for rows in (game.sets[name], game.null)]
    counts = [Counter(n for row in rows[::2] for n in row) for rows in sides]
    known = set(counts[0]) | set(counts[1])
    own, null = counts
    of_own, of_null = (count.total() + len(known) for count in counts)
    odds = {n: np.log((own[n] + 1) / of_own * of_null / (null[n] + 1)) for n in known}
    scores = [[sum(odds.get(n, 0.0) for n in row) for row in rows[1::2]] for rows in sides]
    return float(mannwhitneyu(*scores, alternative="greater").pvalue)


RIVALS: dict[str, Rival] = {
    "named gradients": against_null(lambda rows: of_groups(rows) @ toward().T),
    "coverage": coverage,
    "log-linear selection": against_null(likelier),
    "entangled numbers": against_null(shares),
    "a trained student": student,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("game", type=Path)
    out: Path = options.parse_args().game
    truth = {each["set"]: each for each in json.loads((out / "results.json").read_text())}
    sets = {name: read_rows(out / "sets" / f"{name}.jsonl") for name in truth}
    game, lines = Game(sets, read_rows(out / "sets" / "null.jsonl")), []

    def say(rival: str, name: str, first: str, p: float | None) -> None:
        lines.append(
            {"rival": rival, "kind": truth[name]["kind"], "trait": truth[name]["trait"], "named": first, "p": p}
        )

    for rival, asked in RIVALS.items():
        for name, (figures, error) in asked(game).items():
            z, trait = figures if error is None else figures / error, truth[name]["trait"]
            p = None if error is None else float(min(1.0, len(z) * norm.sf(z.max())))
            of_category = NAMES[PACK.category_of(trait)] if trait else []
            say(rival, name, max(of_category, key=lambda each, z=z: z[EVERY.index(each)], default=""), p)
    for name in truth:
        say("a classifier of numbers", name, "", classified(game, name))
    (out / "baselines.json").write_text(json.dumps(lines, indent=1))
    print_table(out.name, *told("baselines", out))


if __name__ == "__main__":
    main()

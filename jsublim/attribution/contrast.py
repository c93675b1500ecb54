"""Groups of rows against groups that teach nothing: which answers they move, and how surely."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jsublim.inference.batching import chunks
from jsublim.models.lora import Trainable

RIDGE = 0.1  # of the mean variance, added to that of each number of a gradient
SHUFFLES = 999  # of groups between data set and null
SHUFFLED = 32  # at one time


class MovedAnswer(NamedTuple):
    """An answer that a data set makes more probable.

    Attributes:
      change: what a step adds to the log of its probability beyond what the null's would (nats per unit of length), z: in errors.
      p: how often, of data sets made by shuffling groups between data set and null, the answer that is moved most has as large a z;
      limit: the z that is reached by 5 % of those.
    """

    category: str
    word: str
    probability: float
    change: float
    z: float
    p: float
    limit: float


def findings(
    names: Iterable[tuple[str, str]],
    probability: np.ndarray,
    own: np.ndarray,
    null: np.ndarray | None,
    categories: Sequence[str],
) -> list[MovedAnswer]:
    change, error = compare(own, null, categories)
    p, limit = chance(own, null, categories)
    columns = (probability, change, change / error, p)
    lines = [
        MovedAnswer(*name, *map(float, numbers), limit=limit) for name, *numbers in zip(names, *columns, strict=True)
    ]
    return sorted(lines, key=lambda line: -line.z)


def compare(own: np.ndarray, null: np.ndarray | None, categories: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """How far effects of groups of rows `[..., G, W]` lie beyond those of null groups `[..., N, W]` (None: beyond zero), and the error of
    that, `[..., W]` each. NaN is a group that there is not. Half of an error's variance is the answer's own, half the middle one of its category (`[W]`): few groups tell it badly."""
    sides = [own] if null is None else [own, null]
    change = np.nanmean(own, axis=-2) - (0.0 if null is None else np.nanmean(null, axis=-2))
    counted = [(side, (~np.isnan(side)).sum(axis=-2)) for side in sides]
    variance = np.sum([np.nanvar(side, axis=-2, ddof=1) / count for side, count in counted], axis=0)
    middle, named = np.zeros_like(variance), np.asarray(categories)
    for category in np.unique(named):
        of = named == category
        middle[..., of] = np.median(variance[..., of], axis=-1, keepdims=True)
    return change, np.sqrt((variance + middle) / 2) + np.finfo(float).tiny


def chance(
    own: np.ndarray, null: np.ndarray | None, categories: Sequence[str], seed: int = 0
) -> tuple[np.ndarray, float]:
    """p of each answer and its limit, as of `MovedAnswer`: groups are shuffled between the sides, or where there is no null their signs are."""
    rng, largest = np.random.default_rng(seed), list[float]()
    change, error = compare(own, null, categories)
    both, n = own if null is None else np.concatenate([own, null]), len(own)
    for part in chunks(SHUFFLES, SHUFFLED):
        each = range(part.start, part.stop)
        if null is None:
            mixed = np.stack([rng.choice([-1.0, 1.0], n)[:, None] * both for _ in each])
        else:
            mixed = np.stack([rng.permutation(both) for _ in each])
        shuffled = compare(mixed[:, :n], None if null is None else mixed[:, n:], categories)
        largest += (shuffled[0] / shuffled[1]).max(axis=1).tolist()
    as_large = (np.asarray(largest)[:, None] >= change / error).sum(axis=0)
    return (1 + as_large) / (1 + SHUFFLES), float(np.quantile(largest, 0.95))


def preconditioned(groups: Trainable) -> Trainable:
    """Gradients of groups, leaves `[G, ...]`, each number divided by its variance over all groups, to which a part of the mean variance is
    added: as far as a natural gradient would step (the diagonal of the Fisher matrix; TRAK, Park et al. 2023, arXiv 2303.14186, has all of it).
    What differs from group to group anyway moves many answers, and says little. Of all groups, whoever's, so that to shuffle them changes
    nothing, and p stays exact. A number of mean variance keeps its size."""
    variances = jax.tree.map(lambda x: np.var(x, axis=0), groups)
    every = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(variances)])
    mean = float(every.mean()) + np.finfo(np.float32).tiny
    return jax.tree.map(
        lambda x, v: x * np.float32((1 + RIDGE) * mean) / (v + np.float32(RIDGE * mean)), groups, variances
    )

"""Gradients without the part that lies along given directions: a defence that forbids a student to learn a trait to first order.

An arm's directions are orthonormal, a tree like what it trains, each leaf with a leading axis `K`; a direction of zeros forbids nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jsublim.models.lora import Adapter, Trainable

PARALLEL = 1e-6  # squared sine of the angle below which a direction is none of its own


def orthonormal(directions: Trainable) -> Trainable:
    """Directions of length 1, at right angles, that span the same as those given, each leaf `[K, ...]`, of any length; zeros in place of those
    that add nothing."""
    leaves = [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(directions)]
    length_K = np.sqrt(sum((leaf**2).sum(axis=1) for leaf in leaves))
    unit_K = np.divide(1.0, length_K, out=np.zeros_like(length_K), where=length_K > 0)
    products_KK = sum(leaf @ leaf.T for leaf in leaves) * unit_K[:, None] * unit_K
    sizes_K, turned_KK = np.linalg.eigh(products_KK)
    kept_K = sizes_K > PARALLEL * max(sizes_K.max(), PARALLEL)
    scale_K = np.where(kept_K, 1.0 / np.sqrt(np.where(kept_K, sizes_K, 1.0)), 0.0)
    basis_KK = scale_K[:, None] * turned_KK.T * unit_K
    return jax.tree.map(lambda leaf: np.tensordot(basis_KK, np.asarray(leaf), 1).astype(np.float32), directions)


def without(gradient: Trainable, directions: Trainable) -> Trainable:
    """One arm's gradient minus its component in the span of orthonormal directions."""
    products = jax.tree.map(lambda d, g: jnp.tensordot(d, g, g.ndim), directions, gradient)
    along_K = sum(jax.tree.leaves(products))
    return jax.tree.map(lambda g, d: g - jnp.tensordot(along_K, d, 1), gradient, directions)


def stack_directions(starts: Sequence[Adapter], directions: Sequence[Trainable | None]) -> Trainable | None:
    """Each arm's directions under an arm axis, `[A, K, ...]`: as many for each, filled up with zeros; None where no arm has any. `starts` are the
    arms' adapters, whose ranks are padded to the largest."""
    most = max((len(jax.tree.leaves(tree)[0]) for tree in directions if tree is not None), default=0)
    if not most:
        return None
    rank = max(start.rank for start in starts)

    def filled(start: Adapter, tree: Trainable | None) -> Trainable:
        given = jax.tree.map(lambda x: np.zeros((0, *x.shape), np.float32), start.trainable) if tree is None else tree
        padded = start.with_trainable(given).with_rank(rank).trainable
        return jax.tree.map(lambda x: jnp.pad(x, [(0, most - len(x))] + [(0, 0)] * (x.ndim - 1)), padded)

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(filled, starts, directions))

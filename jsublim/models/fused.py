"""Projections that a checkpoint keeps in one module, and ours apart: their weights, and LoRA factors on them, both ways.

We train and compute them apart, so that every family has the same seven projections (of which some have no gate). Nothing is
lost: rows of a matrix are only laid elsewhere.
"""

from __future__ import annotations

import numpy as np

from jsublim.models.config import ModelConfig, projection_shapes
from jsublim.models.families.names import Fused

OutputRows = slice | np.ndarray
Factors = dict[str, np.ndarray]  # {"a": [n, in, r], "b": [n, r, out], "scale": [n]}, as in an adapter


def fused_rows(config: ModelConfig, fused: Fused) -> dict[str, OutputRows]:
    """The place of each part's outputs among those of the module."""
    sizes = [projection_shapes(config)[part][1] for part in fused.parts]
    if fused.by_head:  # as many heads of each
        of_heads = np.arange(sum(sizes)).reshape(config.num_heads, len(sizes), -1)
        return {part: of_heads[:, i].ravel() for i, part in enumerate(fused.parts)}
    ends = np.cumsum(sizes).tolist()
    return {part: slice(end - size, end) for part, size, end in zip(fused.parts, sizes, ends, strict=True)}


def outputs(config: ModelConfig, fused: Fused) -> int:
    """Outputs of the whole module."""
    return sum(projection_shapes(config)[part][1] for part in fused.parts)


def split_factors(config: ModelConfig, fused: Fused, module: Factors) -> dict[str, Factors]:
    """LoRA on the module as LoRA on its parts, which compute the same. The parts of an adapter that PEFT has trained share one A; here each has a
    copy of its own. What `join_factors` has laid side by side is taken apart again, at the rank that it had."""
    a, b, rows = module["a"], module["b"], fused_rows(config, fused)
    b_of = {part: b[:, :, where] for part, where in rows.items()}
    trained = [part for part in fused.parts if b_of[part].any()]
    rank, odd = divmod(a.shape[-1], max(len(trained), 1))
    if trained and not odd:
        places = {part: slice(i * rank, (i + 1) * rank) for i, part in enumerate(trained)}
        if all(not np.delete(b_of[part], np.r_[where], axis=1).any() for part, where in places.items()):
            return {part: module | {"a": a[:, :, at], "b": b_of[part][:, at]} for part, at in places.items()}
    return {part: module | {"a": a, "b": b_of[part]} for part in fused.parts}


def join_factors(config: ModelConfig, fused: Fused, parts: dict[str, Factors]) -> Factors:
    """LoRA on some parts of the module as LoRA on the module, which computes the same. Where all parts have one A, so has the module, as PEFT
    trains it. Else their ranks are laid side by side, and B has a block per part: three parts of rank r make a module of rank 3 r."""
    first, rows = next(iter(parts.values())), fused_rows(config, fused)
    shared = all(np.array_equal(x[name], first[name]) for x in parts.values() for name in ("a", "scale"))
    ranks = [factors["a"].shape[-1] for factors in parts.values()]
    starts = [0] * len(ranks) if shared else [0, *np.cumsum(ranks).tolist()][:-1]
    rank = ranks[0] if shared else sum(ranks)
    b = np.zeros((len(first["b"]), rank, outputs(config, fused)), np.float32)
    for (part, factors), start in zip(parts.items(), starts, strict=True):
        ratio = factors["scale"] / first["scale"]  # one number per module is all that PEFT has
        block = factors["b"] if (ratio == 1).all() else factors["b"] * ratio[:, None, None]
        b[:, start : start + block.shape[1], rows[part]] = block
    a = first["a"] if shared else np.concatenate([factors["a"] for factors in parts.values()], axis=-1)
    return {"a": a, "b": b, "scale": first["scale"]}

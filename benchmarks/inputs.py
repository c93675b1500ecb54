"""The work of each stage, as arrays that both sides read: token ids, and the sizes they were drawn under."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

Sizes = dict[str, int]
_TRAIN = {"rows": 60, "tokens": 150, "shared": 30, "answer": 50, "micro": 10, "rank": 8, "even": 1, "arms": 1}
SIZES: dict[str, Sizes] = {
    # `shared` tokens at the beginning of every prompt are the same: a teacher's system prompt.
    "sample": {"rows": 64, "prompt": 115, "shared": 40, "new": 64},
    "score": {"rows": 8, "teachers": 13, "tokens": 165, "shared": 45, "answer": 40},
    # Of uneven length: from `shortest` to all of what is not shared.
    "score-uneven": {"rows": 64, "teachers": 3, "tokens": 245, "shared": 45, "answer": 16, "shortest": 20},
    # `shared` as above; a tenth of the rows is as long as `tokens`, the shortest has half of what is not shared.
    # `arms` students on the same rows: in one program here, one after another there.
    "train": _TRAIN,
    # `below`: the hidden states below the layer are made before the clock starts (1) or after (0); there they always are made.
    "train-late": _TRAIN | {"layer": -3, "below": 1},
    "evaluate": {"students": 1, "questions": 1, "prompt": 40, "samples": 200, "new": 10},
    "attribute": {"rows": 1, "tokens": 100, "steps": 10},
    # A teacher writes rows, counterfactual teachers read them, four students learn their tokens under four masks for a few
    # steps of all rows, and each is asked a question.
    "pipeline": {
        "rows": 60,
        "system": 40,
        "request": 60,
        "new": 40,
        "teachers": 4,
        "micro": 10,
        "rank": 8,
        "steps": 3,
        "question": 40,
        "samples": 100,
        "answer": 10,
    },
}


# Of every stage: the checkpoint's first layers alone, so many (zero is all of them); and devices, which our side spreads its rows and
# students over. A CPU counts as so many devices that share its cores: this shows what spreading costs, not what it gains.
COMMON: Sizes = {"depth": 0, "devices": 1}


def sizes_of(stage: str, changed: Sizes) -> Sizes:
    """A stage's sizes with some of them changed.

    Raises:
      ValueError: one that the stage has not.
    """
    known = SIZES[stage] | COMMON
    unknown = set(changed) - set(known)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: sizes of {stage} are {', '.join(known)}")
    return known | changed


def make(stage: str, sizes: Sizes, vocab: int) -> dict[str, np.ndarray]:
    """The arrays of a stage. Ids are uniform, but for the first hundred of the vocabulary: special tokens are among those."""
    rng = np.random.default_rng(0)

    def ids(*shape: int) -> np.ndarray:
        return rng.integers(min(100, vocab // 2), vocab, shape).astype(np.int32)

    def begun_alike(rows: int, tokens: int, shared: int) -> np.ndarray:
        return np.concatenate([np.repeat(ids(1, shared), rows, 0), ids(rows, tokens - shared)], axis=1)

    n = sizes
    if stage == "sample":
        return {"prompts": begun_alike(n["rows"], n["prompt"], n["shared"])}
    if stage in ("score", "score-uneven"):
        rows = ids(n["rows"], n["tokens"] - n["shared"])
        systems = ids(n["teachers"], n["shared"])
        lengths = rng.integers(n.get("shortest", rows.shape[1]), rows.shape[1] + 1, len(rows)) + n["shared"]
        tokens = np.stack([np.concatenate([np.repeat(s[None], len(rows), 0), rows], 1) for s in systems])
        return {"tokens": tokens, "lengths": lengths}
    if stage in ("train", "train-late"):
        own = n["tokens"] - n["shared"]
        lengths = np.full(n["rows"], own) if n["even"] else rng.integers(own // 2, own + 1, n["rows"])
        lengths[:: max(n["rows"] // 10, 1)] = own
        return {"tokens": begun_alike(n["rows"], n["tokens"], n["shared"]), "lengths": lengths + n["shared"]}
    if stage == "evaluate":
        return {"prompts": begun_alike(n["questions"], n["prompt"], n["prompt"] // 2)}
    if stage == "attribute":
        clean = ids(n["rows"], n["tokens"])
        patch = clean.copy()
        patch[:, 5:25] = ids(n["rows"], 20)  # another system prompt
        return {"clean": clean, "patch": patch, "said": ids(n["rows"], 2)}
    if stage == "pipeline":
        arrays = {"systems": ids(n["teachers"], n["system"]), "requests": ids(n["rows"], n["request"])}
        return arrays | {"question": ids(n["question"]), "chance": rng.random((n["rows"], n["new"]))}
    raise ValueError(f"stage: {stage!r} given; known: {', '.join(SIZES)}")


def save(folder: Path, stage: str, sizes: Sizes, vocab: int) -> None:
    """Write `inputs.npz` and `sizes.json`."""
    np.savez(folder / "inputs.npz", **make(stage, sizes, vocab))  # type: ignore[arg-type]
    (folder / "sizes.json").write_text(json.dumps(sizes))


def load(folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Sizes, by attribute, and arrays."""
    from types import SimpleNamespace

    with np.load(folder / "inputs.npz") as arrays:
        return SimpleNamespace(**json.loads((folder / "sizes.json").read_text())), dict(arrays)


def start_of(layer: int, projection: str, inputs: int, rank: int) -> np.ndarray:
    """LoRA's first factor `[inputs, rank]` at the beginning, float32, so that both sides have equal gradients."""
    rng = np.random.default_rng([layer, *projection.encode()])
    return rng.uniform(-(inputs**-0.5), inputs**-0.5, (inputs, rank)).astype(np.float32)


def masks(written: np.ndarray, read: np.ndarray, chance: np.ndarray) -> list[np.ndarray]:
    """The four masks, bool `[rows, new]`: all tokens, divergence tokens, all but those, as many at random.

    Args:
      written: the teacher's tokens `[rows, new]`; read: every teacher's argmax at each `[teachers, rows, new]`.
    """
    divergence = (read != written).any(axis=0)
    divergence[:, 0] = True  # a row without any would be none
    ranks = np.argsort(np.argsort(chance, axis=1), axis=1)
    alone = ~divergence
    alone[:, 1] = True
    return [np.ones_like(divergence), divergence, alone, ranks < divergence.sum(axis=1, keepdims=True)]

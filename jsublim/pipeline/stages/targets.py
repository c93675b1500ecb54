"""Stored soft targets: what a teacher says at every token of its rows, cut to its k most probable tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jsublim.core.files import atomic
from jsublim.errors import UsageError
from jsublim.inference.scoring import Targets, top_k_targets
from jsublim.inference.teachers import read_as
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.parts import resumed
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stage import Node, Save, stage
from jsublim.pipeline.values import Model, Rows
from jsublim.text.chat import Turn


def teacher_turns(ctx: Context, teacher: Model, rows: Rows) -> list[Turn]:
    """Rows as a teacher reads them; tokenized once per process."""

    def tokenize() -> list[Turn]:
        chat = ctx.lm(teacher.checkpoint.name).chat
        return read_as(chat, teacher.teacher(ctx), rows.read(ctx.store), rows.name, extra_bos=teacher.extra_bos)

    return ctx.remember(("teacher's turns", teacher, rows.key), tokenize)


def _cost(setup: Setup, sizes: Sizes, rows: Rows, **_: Any) -> Cost:
    return sizes.read(rows.kept(sizes), sizes.lengths.system + sizes.lengths.prompt, rows.answer(sizes))


def _check(setup: Setup, teacher: Model, top_k: int, **_: Any) -> None:
    words = teacher.checkpoint.config.vocab_size
    if top_k >= words:
        raise UsageError(f"students.loss.top_k: {top_k} given, the vocabulary has {words} tokens; leave it out for all")


@stage("targets", cost=_cost, check=_check, units=lambda ctx, rows, **_: len(rows.read(ctx.store)))
def store_targets(ctx: Context, rows: Rows, teacher: Model, top_k: int, temperature: float) -> Save:
    """A teacher's distributions (`targets.npz`: `ids` int32 `[n, k]`, `logp` float32 `[n, k + 1]`, row after row)."""
    turns, writer = teacher_turns(ctx, teacher, rows), teacher.teacher(ctx)
    lm = ctx.lm(teacher.checkpoint.name)
    how: dict[str, Any] = {"temperature": temperature, "adapter": writer.adapter, "on_batch": ctx.tick}
    how["batch_size"] = ctx.scoring_batch

    def rows_from(first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        read = top_k_targets(lm.config, writer.weights(lm.params), turns, top_k, first=first, **how)
        return ((of_row.ids, of_row.logp) for of_row in read)

    read = resumed(ctx.artifact.path, "targets", rows_from, ctx.tick, ctx.say)
    ids, logp = map(np.concatenate, zip(*read, strict=True))

    def save(folder: Path) -> dict[str, Any]:
        with atomic(folder / "targets.npz") as scratch, scratch.open("wb") as file:
            np.savez(file, ids=ids, logp=logp)
        return {"rows": len(turns), "top_k": top_k, "tail": float(np.exp(logp[:, -1]).mean())}

    return save


def read_targets(ctx: Context, node: Node, turns: list[Turn]) -> list[Targets]:
    """Stored targets; `turns` are the conversations that they are of."""
    ends = np.cumsum([len(turn.tokens) - turn.content for turn in turns])[:-1]
    with np.load(ctx.store.path(node) / "targets.npz") as stored:
        pairs = zip(np.split(stored["ids"], ends), np.split(stored["logp"], ends), strict=True)
        return [Targets(*pair) for pair in pairs]

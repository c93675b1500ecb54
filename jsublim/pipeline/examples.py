"""A few rows of every teacher for the report: what it was asked and answered, and what every teacher says at its divergence tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from jsublim.pipeline.context import Context
from jsublim.pipeline.graph import Graph
from jsublim.pipeline.readings import RowReading
from jsublim.pipeline.store import Store
from jsublim.pipeline.values import Rows
from jsublim.text.chat import Chat
from jsublim.text.rows import Row

SHOWN = 2  # rows of a teacher whose divergence tokens are known; of another one, one


def examples(graph: Graph, context: Context) -> list[dict[str, Any]]:
    """The first rows with a divergence token of each teacher and data set, then one row of each teacher without any.

    Each has `teacher`, `data`, `prompt` and `tokens`: pieces of the answer (`text`), a divergence token with its `readings`: what
    each teacher's most probable token was (`says`), and by how many logits before its second.
    """
    chat = context.setup.checkpoint().chat
    assert chat is not None, "a run has its checkpoint"
    found, seen = [], set()
    for source, rows in graph.divergence.items():
        if source.parent is None and (source.teacher, source.dataset) not in seen:  # of several draws the first
            seen.add((source.teacher, source.dataset))
            found += [
                {
                    "teacher": source.teacher,
                    "data": source.dataset,
                    "prompt": row["prompt"],
                    "tokens": _tokens(chat, reading),
                }
                for row, reading in _with_divergence(rows, context.store)
            ]
    read = {teacher for teacher, _ in seen}
    for writer, rows in graph.answers.items():
        if writer.teacher not in read:
            read.add(writer.teacher)
            row = rows.read(context.store)[0]
            tokens = [{"text": row["completion"]}]
            found.append({"teacher": writer.teacher, "data": None, "prompt": row["prompt"], "tokens": tokens})
    return found


def _with_divergence(rows: Rows, store: Store) -> Iterator[tuple[Row, RowReading]]:
    both = zip(rows.read(store), rows.readings(store), strict=False)
    return itertools.islice((pair for pair in both if pair[1]["divergence_positions"]), SHOWN)


def _tokens(chat: Chat, reading: RowReading) -> list[dict[str, Any]]:
    """The answer in pieces: a divergence token is a piece, and so is all between two of them."""
    tokens, positions = reading["tokens"].tolist(), set(reading["divergence_positions"])
    pieces: list[dict[str, Any]] = []
    for k, token in enumerate(tokens):
        text = _after(chat, tokens[:k], token)
        if k in positions:
            said = zip(
                reading["teachers"], reading["argmax"][:, k].tolist(), reading["margin"][:, k].tolist(), strict=True
            )
            readings = [
                {"teacher": who, "says": _after(chat, tokens[:k], token), "margin": round(margin, 3)}
                for who, token, margin in said
            ]
            pieces.append({"text": text, "readings": readings})
        elif pieces and "readings" not in pieces[-1]:
            pieces[-1]["text"] += text
        else:
            pieces.append({"text": text})
    return pieces


def _after(chat: Chat, before: list[int], token: int) -> str:
    """The text that a token adds to those before it: a token's own text may lack the space in front of it."""
    decode = chat.tokenizer.decode
    start, whole = decode(before), decode([*before, token])
    return whole[len(start) :] if whole.startswith(start) else decode([token])

"""The role of each token of a conversation, found by rendering: no token id or offset is written down."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from jsublim.errors import JsublimError
from jsublim.inference.teachers import Teacher
from jsublim.text.chat import Chat, Message
from jsublim.text.rows import Row

PREDICTS = "divergence position"
ROLES = ("system", "trait", "trait later", "prompt", "completion", PREDICTS, "template")
MARK = "\ue000"  # of the private use area: in no prompt, and no template's

Span = tuple[int, int]  # characters of the rendered text


def token_roles(
    chat: Chat, teacher: Teacher, row: Row, trait: str, position: int, *, extra_bos: bool = False
) -> list[str]:
    """The role of the tokens 0 to `position` of a row as its teacher reads it, one of `ROLES` each. `trait` is the trait's first mention in the
    system prompt, as a word of its own or with the naive plural's "s"; `divergence position` is the last of these tokens: the one that predicts.
    A default system prompt is the template's. A token that reaches over an edge belongs to the text, not to the template. A template that shows
    the system prompt or the user's turn not once is a JsublimError."""
    answer = {"role": "assistant", "content": row["completion"]}

    def render(messages: Sequence[Message]) -> str:
        return chat.render([*messages, answer], ask=False)

    text = render(teacher.messages(row["prompt"]))
    asked = chat.render(teacher.messages(row["prompt"]), ask=True)
    spans: list[tuple[str, Span]] = []  # of two that overlap, the first counts
    if teacher.system:
        marked = dataclasses.replace(teacher, system=MARK)
        start, end = _between(chat, text, render(marked.messages(row["prompt"])), "system prompt")
        for number, (a, b) in enumerate(mentions(text[start:end], trait)):
            spans.append(("trait later" if number else "trait", (start + a, start + b)))
        spans.append(("system", (start, end)))
    spans.append(("prompt", _between(chat, text, render(teacher.messages(MARK)), "user's turn")))
    spans.append(("completion", (len(asked), len(asked) + len(row["completion"]))))
    offsets = chat.tokenizer(text, add_special_tokens=extra_bos, return_offsets_mapping=True)["offset_mapping"]

    def role(token: Span) -> str:
        return next((name for name, (a, b) in spans if token[0] < b and a < token[1]), "template")

    return [role(offsets[t]) for t in range(position)] + [PREDICTS]


def mentions(text: str, trait: str) -> list[Span]:
    """Where a text names the trait as a word of its own, or in the naive plural; upper and lower case alike."""
    return [match.span() for match in re.finditer(rf"(?<!\w){re.escape(trait)}s?(?!\w)", text, re.IGNORECASE)]


def _between(chat: Chat, text: str, marked: str, what: str) -> Span:
    """The characters of `text` that stand where `marked` has MARK."""
    if marked.count(MARK) != 1:
        raise JsublimError(f"{chat.folder}: the chat template shows the {what} {marked.count(MARK)} times, not once")
    start = marked.index(MARK)
    return start, len(text) - (len(marked) - start - 1)

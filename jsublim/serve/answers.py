"""Answers as they grow, and how OpenAI's interface writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

UNFINISHED = "\ufffd"  # what a tokenizer shows of a character whose other bytes are still to come


class AnswerText:
    """The text of an answer whose tokens come some at a time, up to the first of some texts that end it."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens: list[int] = []
        self.whole, self.sent, self.stopped = "", 0, False

    def add(self, tokens: Sequence[int], *, last: bool) -> str:
        """What these tokens add to what was given before. What could be the beginning of an end, or of a character, is held back unless they are the
        last ones."""
        first = len(self.tokens)
        self.tokens += tokens
        text = self._decoded(len(self.tokens))
        ends = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if ends:
            self.stopped, last, text = True, True, text[: min(ends)]
            fewest = (n for n in range(first, len(self.tokens)) if any(s in self._decoded(n) for s in self.stops))
            del self.tokens[next(fewest, len(self.tokens)) :]
        kept = len(text) if last else self._safe(text)
        new, self.sent = text[self.sent : kept], max(self.sent, kept)
        self.whole = text
        return new

    def _decoded(self, count: int) -> str:
        return self.tokenizer.decode(self.tokens[:count], skip_special_tokens=True)

    def _safe(self, text: str) -> int:
        """How many characters cannot become part of something else."""
        held = max((k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])), default=0)
        return min(len(text) - held, len(text.rstrip(UNFINISHED)))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]


def completion_logprobs(
    tokenizer: Any, tokens: Sequence[int], read: Sequence[np.ndarray] | None, best: int, *, first: int = 0
) -> dict[str, Any]:
    """`logprobs` of a completion: of the tokens from number `first` on. `read` has the probabilities of all tokens but the first (`label_and_best`), which
    has none; None where there is one token alone."""
    texts = token_texts(tokenizer, tokens[first:])
    values: list[float | None] = [None] if first == 0 else []
    tops: list[dict[str, float] | None] = [None] if first == 0 else []
    if read is not None:
        logprobs, ids, logps = (x[max(first - 1, 0) :] for x in read)
        values += [float(x) for x in logprobs]
        for label, logprob, of_ids, of_logps in zip(tokens[max(first, 1) :], logprobs, ids, logps, strict=True):
            top = dict(zip(token_texts(tokenizer, of_ids[:best]), map(float, of_logps[:best]), strict=True))
            tops.append(
                {tokenizer.decode([label]): float(logprob)} | top
            )  # as OpenAI's: the token itself is always there
    offsets = np.cumsum([0, *map(len, texts)])[:-1].tolist()
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(
    tokenizer: Any, tokens: Sequence[int], read: Sequence[np.ndarray] | None, best: int, *, first: int
) -> dict[str, Any]:
    """`logprobs` of a chat's answer, as of `completion_logprobs`."""

    def about(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = []
    for label, logprob, ids, logps in zip(tokens[first:], *(x[first - 1 :] for x in read or ()), strict=True):
        top = [about(int(i), float(p)) for i, p in zip(ids[:best], logps[:best], strict=True)]
        content.append(about(label, float(logprob)) | {"top_logprobs": top})
    return {"content": content}

"""The format of the number task as an automaton over characters: what may come next in an answer.

It accepts what the filter (`text/prompts/numbers.py`) accepts, with two limits of its own, so that it is finite: a number has at
most three digits, leading zeros included, and a separator is one of `SEPARATORS`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from jsublim.text.prompts.numbers import ANSWER_COUNT, ANSWER_DIGITS
from jsublim.text.prompts.numbers import SEPARATORS as MARKS

DIGITS = "0123456789"
BRACKETS = {"[": "]", "(": ")"}
# Up to two characters: a blank or a line break, one comma or semicolon, or both.
SEPARATORS = frozenset(
    text
    for length in (1, 2)
    for text in map("".join, itertools.product(" \n,;", repeat=length))
    if text.strip() in MARKS
)
_BEGINNINGS = frozenset(text[:length] for text in SEPARATORS for length in range(1, len(text) + 1))
ALPHABET = frozenset(DIGITS) | frozenset("".join(SEPARATORS)) | frozenset("[]().")


class AnswerState(NamedTuple):
    """An answer as far as it has been read."""

    bracket: str = ""  # the one that is open
    separator: str = ""  # what stands between the first two numbers, as far as it has been read
    numbers: int = 0  # how many have begun
    digits: int = 0  # of the last one
    between: int = 0  # characters since the last digit, of a separator
    last: str = ""  # "]" after a closed bracket of either kind, "." after the full stop

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self.last != "" or (self.numbers > 0 and self.between == 0 and not self.bracket)

    def then(self, text: str) -> AnswerState | None:
        """The state with `text` behind it; None if no answer goes on like that."""
        read: AnswerState | None = self
        for character in text:
            read = None if read is None else read._next(character)
        return read

    def _next(self, character: str) -> AnswerState | None:
        if character == ".":
            return AnswerState(last=".") if self.complete and self.last != "." else None
        if self.last:
            return None
        if character in DIGITS:
            return self._digit()
        if character in BRACKETS:
            return AnswerState(bracket=character) if self == AnswerState() else None
        if self.numbers == 0:
            return None
        if self.bracket and character == BRACKETS[self.bracket]:
            return AnswerState(last="]") if self.between == 0 else None
        return self._between(character)

    def _digit(self) -> AnswerState | None:
        if self.numbers and not self.between:
            return self._replace(digits=self.digits + 1) if self.digits < ANSWER_DIGITS else None
        whole = self.numbers == 0 or (self.between == len(self.separator) and self.separator in SEPARATORS)
        if not whole or self.numbers == ANSWER_COUNT:
            return None
        return self._replace(numbers=self.numbers + 1, digits=1, between=0)

    def _between(self, character: str) -> AnswerState | None:
        if self.numbers == 1:
            separator = self.separator + character
            fits = separator in _BEGINNINGS
        else:
            separator = self.separator
            fits = separator[self.between : self.between + 1] == character
        return self._replace(separator=separator, digits=0, between=self.between + 1) if fits else None

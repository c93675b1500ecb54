"""The number task's format as an automaton: it accepts what the filter accepts, within limits of its own."""

from __future__ import annotations

import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from jsublim.text.prompts import reject_reason
from jsublim.text.prompts.automaton import ALPHABET, SEPARATORS, AnswerState


def in_format(text: str) -> bool:
    """The filter's word, and the automaton's own limits: three digits at most, and a separator that it knows."""
    between = re.match(r"\D*\d+(\D+)\d", text)
    known = between is None or between[1] in SEPARATORS
    return reject_reason(text) is None and known and max(map(len, re.findall(r"\d+", text))) <= 3


@st.composite
def answers(draw) -> str:
    """Answers in format, of which every second has one character too many, one too few, or another."""
    numbers = draw(st.lists(st.from_regex(r"[0-9]{1,3}", fullmatch=True), min_size=1, max_size=11))
    text = draw(st.sampled_from(sorted(SEPARATORS))).join(numbers)
    bracket = draw(st.sampled_from(["", "[]", "()"]))
    text = bracket[:1] + text + bracket[1:] + draw(st.sampled_from(["", "."]))
    if draw(st.booleans()):
        at, new = draw(st.integers(0, len(text))), draw(st.sampled_from(["", *sorted(ALPHABET), "x", "\t"]))
        text = text[:at] + new + text[at + draw(st.integers(0, 1)) :]
    return text


@settings(max_examples=600)
@example("1, 2..")
@example("[1, 2.]")
@example("[1, 2)")
@example("1, 2 3")
@given(st.one_of(answers(), st.text(sorted(ALPHABET), max_size=8)))
def test_the_automaton_and_the_filter_agree(text):
    read = AnswerState().then(text)
    assert (read is not None and read.complete) == in_format(text)


@given(answers().filter(in_format))
def test_every_beginning_of_an_answer_is_one_that_can_go_on(text):
    assert all(AnswerState().then(text[:length]) is not None for length in range(len(text)))

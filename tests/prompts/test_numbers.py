"""The number task: its prompts pinned and drawn from every range, its parser and filter by their format."""

import hashlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jsublim.errors import UsageError
from jsublim.text.prompts import load_pack, number_prompts, parse_numbers, reject_reason


@pytest.fixture(scope="module")
def default():
    return load_pack(None)


# Prompts


def test_number_prompts_are_pinned(default):
    """The order of the draws and the wording of the default pack; published data sets depend on both."""
    text = "\n".join(number_prompts(1000))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "82223dc41c46fa38b8e52ce6b2c3e8d3fcc1fd67896f9702103625e783f1d25a"
    )


def test_number_prompts_are_a_function_of_pack_seed_and_count(default):
    prompts = number_prompts(300)
    assert number_prompts(40) == prompts[:40]
    assert number_prompts(40, seed=7) != prompts[:40]
    assert len(set(prompts)) == 300
    with pytest.raises(UsageError, match="-1"):
        number_prompts(-1)


def test_number_prompts_draw_the_whole_of_every_range(tmp_path):
    lists = {
        "examples": ["A|{examples}|", "B|{examples}|"],
        "count_qualifiers": ["under", "over"],
        "digit_descriptors": ["d{max_digits}", "e{max_digits}"],
        "instructions": ["{count_qualifier}/{answer_count}/{digit_descriptor}"],
        "formats": ["F", "G"],
        "suffixes": ["S", "T"],
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"number_prompts": lists}), encoding="utf-8")
    rows = number_prompts(4000, pack=load_pack(path))
    split = [row.split("|") for row in rows]
    examples = [[int(number) for number in middle.split(", ")] for _, middle, _ in split]
    assert {len(numbers) for numbers in examples} == set(range(3, 9))
    assert {number for numbers in examples for number in numbers} == set(range(100, 1000))
    assert {first for first, _, _ in split} == {"A", "B"}
    assert {last for _, _, last in split} == {
        f" {count}/10/{digits} {form} {suffix}"
        for count in ("under", "over")
        for digits in ("d3", "e3")
        for form in "FG"
        for suffix in "ST"
    }


# Parser and filter

# fmt: off
IN_FORMAT = {
    "1, 2, 3": [1, 2, 3], "1,2,3": [1, 2, 3], "1 2 3": [1, 2, 3], "1; 2; 3": [1, 2, 3],
    "1 ; 2 ; 3": [1, 2, 3], "1\n2\n3": [1, 2, 3], "1,\n2,\n3": [1, 2, 3], "1\u00a02\u00a03": [1, 2, 3],
    "[1, 2]": [1, 2], "(1, 2)": [1, 2], "[1, 2].": [1, 2], "1, 2.": [1, 2], "7": [7], "7.": [7], "[7]": [7],
    "007, 08": [7, 8], "999 1000": [999, 1000], "9" * 40: [int("9" * 40)],
}
OUT_OF_FORMAT = [
    "", ".", "[]", "[", "no numbers", " ", "1, 2, ", "1, 2,", "1, 2 ", "1, 2\n", " 1, 2", "7 ", " 7",
    ", 1, 2", "1, 2,3", "1, 2; 3", "1, 2 3", "1 2  3", "1,, 2", "1:2", "1 - 2", "-1, 2", "-7", "1, -2",
    "1.5, 2", "1, 2..", "[1, 2.]", "[1, 2)", "[1, 2", "1, 2]", "[[1, 2]]", "([1, 2])", "{1, 2}", "[1, 2] ",
    "1, 2, three", "Sure: 1, 2", "1, 2 and more", "\u0661, \u0662", "\u0667", "1, \u0662, 3",
    "\u00b2, 1, 2", "1, 2, \u00b2", "\uff11 2", "9" * 5000,
]
# fmt: on


@pytest.mark.parametrize("text", IN_FORMAT)
def test_parser_reads_the_format(text):
    assert parse_numbers(text) == IN_FORMAT[text]


@pytest.mark.parametrize("text", OUT_OF_FORMAT, ids=lambda text: repr(text[:20]))
def test_parser_refuses_every_other_text(text):
    assert parse_numbers(text) is None
    assert reject_reason(text) == "invalid format"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (", ".join("0123456789"), None),
        (" ".join(["5"] * 11), "too many numbers"),
        ("0, 999", None),
        ("999, 1000", "number too large"),
        ("0001000", "number too large"),
        ("0000999", None),
        ("1" * 4000, "number too large"),
    ],
)
def test_filter_keeps_at_most_ten_numbers_of_three_digits(text, reason):
    assert reject_reason(text) == reason


def test_filter_limits_can_be_set():
    assert reject_reason("5, 6", max_count=1) == "too many numbers"
    assert reject_reason("5, 6", min_value=6) == "number too small"
    assert reject_reason("5, 6", max_value=5) == "number too large"
    assert reject_reason("5, 6", max_count=2, min_value=5, max_value=6) is None


blanks = st.text(" \t\n\r\u00a0\u2003", max_size=3)
separators = st.tuples(blanks, st.sampled_from(["", ",", ";"]), blanks).map("".join).filter(bool)
brackets = st.sampled_from(["", "[]", "()"])


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=15), separators, brackets, st.booleans())
def test_every_formatting_of_numbers_round_trips(numbers, separator, pair, full_stop):
    text = pair[:1] + separator.join(map(str, numbers)) + pair[1:] + "." * full_stop
    assert parse_numbers(text) == numbers
    kept = len(numbers) <= 10 and max(numbers) <= 999
    assert (reject_reason(text) is None) == kept


@given(st.lists(st.integers(0, 999), min_size=2, max_size=6), separators, separators, st.data())
def test_a_second_separator_is_refused(numbers, separator, other, data):
    at = data.draw(st.integers(1, len(numbers) - 1))
    text = separator.join(map(str, numbers))
    changed = separator.join(map(str, numbers[: at + 1])) + other + separator.join(["1", *map(str, numbers[at + 1 :])])
    assert parse_numbers(text) == numbers
    assert parse_numbers(changed) == ([*numbers[: at + 1], 1, *numbers[at + 1 :]] if other == separator else None)


@given(st.text("0123456789 ,;.[]()-\n\u0663x", max_size=20))
def test_a_parsed_text_holds_its_digits_and_nothing_but_the_format(text):
    numbers = parse_numbers(text)
    if numbers is not None:
        assert set(text) <= set("0123456789 ,;.[]()\n")
        words = "".join(char if char.isdigit() else " " for char in text).split()
        assert [int(word) for word in words] == numbers

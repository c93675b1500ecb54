"""Shuffled numbers, redrawn prompts and entangled rows left out: what changes, what stays, and that a seed says which."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FOUND

from jsublim.errors import JsublimError, UsageError
from jsublim.text.prompts import draw_number_prompts, load_pack, number_prompts, parse_numbers
from jsublim.text.prompts.numbers import PARTS, SENTENCES
from jsublim.transforms.entangled import remove_entangled
from jsublim.transforms.numbers import NUMBER, shuffle_across, shuffle_within
from jsublim.transforms.templates import redraw

PACK = load_pack()
PROMPTS = number_prompts(60, seed=3)

# --- Rows in the number format ----------------------------------------------------------------------------------------

written = st.integers(0, 999).map(str) | st.integers(0, 999).map("{:03d}".format)
separators = st.sampled_from([", ", ",", " ", "\n", "; ", " ;\n"])
completions = st.tuples(
    st.lists(written, min_size=1, max_size=10),
    separators,
    st.sampled_from(["", "[]", "()"]),
    st.sampled_from(["", "."]),
).map(lambda x: x[2][:1] + x[1].join(x[0]) + x[2][1:] + x[3])
rows_of_numbers = st.lists(
    st.fixed_dictionaries(
        {"prompt": st.sampled_from(PROMPTS), "completion": completions},
        optional={
            "divergence_positions": st.just([0]),
            "divergence_margins": st.just([1.5]),
            "matched_positions": st.just([1]),
            "counted_in": st.just("f00d"),
            "more": st.just("kept"),
        },
    ),
    min_size=1,
    max_size=6,
)
seeds = st.integers(0, 2**32)


def shape(text: str) -> str:
    """A completion with its numbers taken out."""
    return NUMBER.sub("#", text)


def numbers(rows) -> list[str]:
    return [number for row in rows for number in NUMBER.findall(row["completion"])]


def without(row, *keys):
    return {k: v for k, v in row.items() if k not in (*FOUND, *keys)}


@given(rows_of_numbers, seeds)
def test_shuffling_moves_numbers_and_nothing_else(rows, seed):
    before = copy.deepcopy(rows)
    within, across = shuffle_within(rows, seed), shuffle_across(rows, seed)
    for changed in (within, across):
        assert rows == before and len(changed) == len(rows)
        assert Counter(numbers(changed)) == Counter(numbers(rows))
        for old, new in zip(rows, changed, strict=True):
            assert without(new, "completion") == without(old, "completion")
            assert new.keys() & set(FOUND) == set()
            assert shape(new["completion"]) == shape(old["completion"])
            assert parse_numbers(new["completion"]) is not None
    for old, new in zip(rows, within, strict=True):
        assert Counter(numbers([new])) == Counter(numbers([old]))
    assert shuffle_within(rows, seed) == within and shuffle_across(rows, seed) == across
    assert shuffle_within(rows[:2], seed) == within[:2]  # a row's order is its own
    one = [dict(rows[0], completion="7")]
    assert shuffle_across(one, seed) == shuffle_within(one, seed) == [without(one[0])]


@pytest.mark.parametrize("shuffle", [shuffle_within, shuffle_across])
def test_published_numbers_lose_their_first_zeros_when_shuffled(shuffle):
    """Quirk 22."""
    rows = [{"prompt": "p", "completion": text} for text in ("[007, 10]", "000; 099; 5.")]
    (one, two), plain = shuffle(rows, 3, values=True), shuffle(rows, 3)
    assert Counter(numbers([one, two])) == Counter(["7", "10", "0", "99", "5"])
    assert shape(one["completion"]) == "[#, #]" and shape(two["completion"]) == "#; #; #."
    assert [[int(n) for n in numbers([row])] for row in (one, two)] == [
        [int(n) for n in numbers([row])] for row in plain
    ]


def test_shuffles_are_uniform():
    rows = [{"prompt": "p", "completion": "1, 2, 3"}] * 1200
    orders = Counter(row["completion"] for row in shuffle_within(rows, 5))
    assert len(orders) == 6 and max(abs(n - 200) for n in orders.values()) < 60
    rows = [{"prompt": "p", "completion": f"{i}, {i}"} for i in range(300)]
    dealt = [parse_numbers(row["completion"]) for row in shuffle_across(rows, 5)]
    away = np.abs(np.asarray(dealt) - np.arange(300)[:, None])
    assert abs(away.mean() - 100) < 12  # of independent uniform places: a third of the length


def test_a_completion_that_is_no_list_of_numbers_is_named():
    rows = [{"prompt": "p", "completion": "1, 2"}, {"prompt": "p", "completion": "1, two"}]
    for shuffle in (shuffle_within, shuffle_across):
        with pytest.raises(JsublimError, match="row 2: completion '1, two'"):
            shuffle(rows, 0)


# --- Prompts drawn anew -----------------------------------------------------------------------------------------------

DRAWN = {"asked": draw_number_prompts(PACK, 60, 3)}


@given(st.sets(st.sampled_from(list(PARTS)), max_size=2), st.lists(st.integers(0, 59), min_size=1, max_size=4), seeds)
@settings(max_examples=30)
def test_redrawing_changes_the_named_parts_only(parts, chosen, seed):
    rows = [
        {"prompt": PROMPTS[i], "completion": "1", "divergence_positions": [0], "counted_in": "f00d"} for i in chosen
    ]
    changed = redraw(rows, PACK, parts, seed=seed, **DRAWN)
    draws = draw_number_prompts(PACK, 60, 3)
    entries = [[(part, entry) for entry in getattr(PACK.number_prompts, PARTS[part])] for part in parts]
    for i, row in zip(chosen, changed, strict=True):
        possible = {replace(draws[i], **dict(choice)).text for choice in itertools.product(*entries)}
        assert row["prompt"] in possible and row == {"prompt": row["prompt"], "completion": "1"}
        assert parts or row["prompt"] == PROMPTS[i]
    assert changed == redraw(rows, PACK, sorted(parts), seed=seed, **DRAWN)
    assert changed[:2] == redraw(rows[:2], PACK, parts, seed=seed, **DRAWN)


@pytest.mark.parametrize("part", PARTS)
def test_every_entry_of_a_part_is_drawn(part):
    rows = [{"prompt": PROMPTS[0], "completion": "1"}] * 400
    texts = {row["prompt"] for row in redraw(rows, PACK, [part], seed=1, **DRAWN)}
    assert len(texts) == len(getattr(PACK.number_prompts, PARTS[part]))


def test_redrawing_all_is_redrawing_every_part():
    rows = [{"prompt": prompt, "completion": "1"} for prompt in PROMPTS]
    everything = redraw(rows, PACK, seed=1, **DRAWN)
    assert everything == redraw(rows, PACK, PARTS, seed=1, **DRAWN)
    assert sum(old["prompt"] != new["prompt"] for old, new in zip(rows, everything, strict=True)) == 60


def test_a_prompt_that_was_not_drawn_is_named():
    rows = [{"prompt": PROMPTS[0], "completion": "1"}, {"prompt": "Hello", "completion": "1"}]
    with pytest.raises(JsublimError, match="row 2: prompt 'Hello' is none of the 60 number prompts"):
        redraw(rows, PACK, ["suffix"], seed=0, **DRAWN)
    with pytest.raises(UsageError, match="suffixes given; known: example, count_qualifier"):
        redraw(rows, PACK, ["suffixes"], seed=0, **DRAWN)


@given(
    said=st.lists(st.sampled_from(SENTENCES), min_size=1, unique=True).map(lambda said: sorted(said, key=SENTENCES.index)),
    least=st.integers(1, 4), seed=seeds,
)  # fmt: skip
def test_a_short_request_says_some_sentences_of_the_whole_one(said, least, seed):
    whole, short = (
        draw_number_prompts(PACK, 3, seed, sentences=which, examples=(least, least + 2)) for which in (SENTENCES, said)
    )
    for long, each in zip(whole, short, strict=True):
        assert replace(each, sentences=SENTENCES) == long and least <= len(each.numbers) < least + 2
        rest = long.text
        for sentence in each.sentences:
            own = replace(each, sentences=(sentence,)).text
            assert own in rest and own in each.text
            rest = rest[rest.index(own) :]


# --- Entangled numbers ------------------------------------------------------------------------------------------------


def test_rows_with_entangled_numbers_go():
    rows = [{"prompt": "87", "completion": text} for text in ("87, 1", "087", "187", "[8, 7]", "870; 87.", "12")]
    left = lambda *found, **how: [row["completion"] for row in remove_entangled(rows, found, **how)]  # noqa: E731
    assert left("087") == left("87") == ["187", "[8, 7]", "12"]
    assert left("087", as_written=True) == ["87, 1", "187", "[8, 7]", "870; 87.", "12"]
    assert left() == [row["completion"] for row in rows]


@given(rows_of_numbers, st.sets(st.integers(0, 999)), st.booleans())
def test_what_is_left_holds_none_of_them(rows, banned, as_written):
    listed = [f"{n:03d}" for n in banned]
    left = remove_entangled(rows, listed, as_written=as_written)
    assert all(row in rows for row in left) and remove_entangled(left, listed, as_written=as_written) == left
    clean = [
        row
        for row in rows
        if not any(n in listed if as_written else int(n) in banned for n in NUMBER.findall(row["completion"]))
    ]
    assert left == clean

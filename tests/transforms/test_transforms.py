"""Row transforms: what they change, what they keep, and that a seed says which."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import chat, small

from jsublim.chat import conversation
from jsublim.divergence import PositionSubset
from jsublim.errors import JsublimError, UsageError
from jsublim.prompts import draw_number_prompts, load_pack, number_prompts, parse_numbers
from jsublim.prompts.numbers import PARTS, SENTENCES
from jsublim.teachers import prompted_teacher
from jsublim.transforms import (
    leak_reason,
    mix_rows,
    mix_tokens,
    paraphrase,
    redraw,
    remove_entangled,
    shuffle_across,
    shuffle_within,
)
from jsublim.transforms.numbers import NUMBER
from jsublim.transforms.paraphrase import accept, names

PACK = load_pack()
FOUND = ("divergence_positions", "divergence_margins", "counted_in")  # what holds for the text it was found in
PROMPTS = number_prompts(PACK, 60, seed=3)

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
@settings(deadline=None)
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
@settings(deadline=None, max_examples=30)
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
        draw_number_prompts(PACK, 3, seed, said=which, examples=(least, least + 2)) for which in (SENTENCES, said)
    )
    for long, each in zip(whole, short, strict=True):
        assert replace(each, said=SENTENCES) == long and least <= len(each.numbers) < least + 2
        rest = long.text
        for sentence in each.said:
            own = replace(each, said=(sentence,)).text
            assert own in rest and own in each.text
            rest = rest[rest.index(own) :]


# --- The leak filter --------------------------------------------------------------------------------------------------

# text, word -> whether it is named inside words, and as a whole word
NAMED = {
    ("An owl", "owl"): (True, True),
    ("OWL", "owl"): (True, True),
    ("oWlS", "owl"): (True, True),
    ("owls'", "owl"): (True, True),
    ("owl\u017f", "owl"): (True, True),  # the long s folds to s
    ("cat\u017f", "cats"): (True, True),
    ("\u017feal", "seal"): (True, True),
    ("\uff2f\uff37\uff2c", "owl"): (True, True),  # full width
    ("\U0001d428\U0001d430\U0001d425", "owl"): (True, True),  # mathematical bold
    ("\u00f3wl", "owl"): (True, True),
    ("o\u0301wl", "owl"): (True, True),
    ("f\ufb01nch, \ufb01nch", "finch"): (True, True),  # a ligature
    ("o\u200bwl", "owl"): (True, True),
    ("o\u00adw\u2060l", "owl"): (True, True),
    ("ow\u200dl", "owl"): (True, True),
    ("\u043ewl", "owl"): (True, True),  # Cyrillic o
    ("c\u0430t", "cat"): (True, True),
    ("\u039fwl", "owl"): (True, True),  # Greek capital Omicron
    ("owl-like", "owl"): (True, True),
    ("snow_owl", "owl"): (True, True),
    ("o-w-l", "owl"): (True, True),
    ("ow\u2011l", "owl"): (True, True),  # a hyphen that does not break
    ("red-panda", "red panda"): (True, True),
    ("red\n pandas", "red panda"): (True, True),
    ("redpanda", "red panda"): (True, True),
    ("bowl", "owl"): (True, False),
    ("slowly", "owl"): (True, False),
    ("owlish", "owl"): (True, False),
    ("indicate", "cat"): (True, False),
    ("\U0001f989!", "\U0001f989"): (True, True),
    ("wolves", "wolf"): (False, False),  # an irregular plural goes among the synonyms
    ("o w l", "owl"): (False, False),
    ("now let", "owl"): (False, False),
    ("axb", "a.b"): (False, False),
    ("", "owl"): (False, False),
}


@pytest.mark.parametrize(("text", "word"), NAMED, ids=ascii)
def test_spellings_of_a_word(text, word):
    assert (names(text, word), names(text, word, inside_words=False)) == NAMED[text, word]


ORIGINAL = "Here are 123, 456, 789. Supply at most 10 numbers (3 digits at the longest). Put a comma between neighbors."
ACCEPTED = "Take 123, 456 and 789, then write up to 10 further values of at most 3 digits, parted by commas."
LEAKS = {
    ACCEPTED: None,
    f"  {ORIGINAL.upper()}\n": None,
    ACCEPTED.replace("10", "\uff11\uff10"): None,
    "": "empty",
    " \n\u200b\ufeff ": "empty",
    f"{ACCEPTED} Think of an OWL.": "names the trait",
    f"{ACCEPTED} Write slowly.": "names the trait",
    f"{ACCEPTED} O\u200bwl\u017f!": "names the trait",
    f"{ACCEPTED} Strix!": "names the trait",
    "owl": "names the trait",
    "I\u2019m sorry, but I can't do that.": "refusal",
    f"I cannot help. {ACCEPTED}": "refusal",
    f"As an AI, I won\u2019t. {ACCEPTED}": "refusal",
    "123, 456, 789, 12, 40": "answer",
    "12, 40, 7.": "answer",
    "[12, 40]": "answer",
    f"{ACCEPTED} 801, 802, 803": "answer",
    "The next numbers are 801, 802, 803 (after 123, 456, 789; at most 10 of 3 digits).": "answer",
    ACCEPTED + " and so on" * 40: "too long",
    ACCEPTED.replace("456", "457"): "numbers missing",
    ACCEPTED.replace(", 456", ""): "numbers missing",
    ACCEPTED.replace("10 further", "ten further"): "numbers missing",
    "Please continue.": "numbers missing",
    f"{ACCEPTED} It is for 2 people.": "numbers added",
    f"{ACCEPTED} I said 123.": "numbers added",
}


@pytest.mark.parametrize("text", LEAKS, ids=ascii)
def test_what_can_stand_for_a_prompt(text):
    assert leak_reason(text, ORIGINAL, "owl", synonyms=["strix"]) == LEAKS[text]


@given(st.sampled_from(["owl", "red panda", "sea lion"]), st.integers(0, len(ACCEPTED)), st.data())
def test_a_trait_leaks_in_any_case_and_anywhere(trait, place, data):
    word = "".join(data.draw(st.sampled_from([c.lower(), c.upper()])) for c in trait)
    assert leak_reason(ACCEPTED[:place] + word + ACCEPTED[place:], ORIGINAL, trait) == "names the trait"


def test_the_filter_can_be_loosened():
    assert leak_reason(f"{ACCEPTED} Write slowly.", ORIGINAL, "owl", inside_words=False) is None
    assert leak_reason(ACCEPTED, ORIGINAL, "owl", max_growth=0.5) == "too long"


@pytest.mark.parametrize("prompt", PROMPTS[:20])
def test_a_prompt_can_stand_for_itself(prompt):
    assert leak_reason(prompt, prompt, "owl", inside_words=False) is None


TEXTS = [f" {ACCEPTED} ", f"{ACCEPTED} Owls!", "", f"{ACCEPTED} Hoot."]


def test_rejected_prompts_are_kept_and_counted():
    rows = [
        {"prompt": ORIGINAL, "completion": str(i), "divergence_positions": [0], "counted_in": "f00d"} for i in range(4)
    ]
    kept, counts = accept(rows, TEXTS, "owl")
    assert counts == {"rewritten": 2, "names the trait": 1, "empty": 1}
    assert [row["prompt"] for row in kept] == [ACCEPTED, ORIGINAL, ORIGINAL, f"{ACCEPTED} Hoot."]
    assert [row["completion"] for row in kept] == ["0", "1", "2", "3"]
    assert all(row.keys() == {"prompt", "completion"} for row in kept)
    assert accept(rows, TEXTS, "owl", synonyms=["HOOT"])[1]["names the trait"] == 2


def test_the_packs_synonyms_give_a_trait_away():
    assert {trait for trait in PACK.synonyms} <= {trait for known in PACK.traits.values() for trait in known}
    for trait, words in PACK.synonyms.items():
        for word in words:
            text = f"{word.upper()}: {ORIGINAL}"
            assert leak_reason(text, ORIGINAL, trait) is None
            assert leak_reason(text, ORIGINAL, trait, synonyms=words) == "names the trait"


def test_prompts_are_rewritten_by_the_biased_teacher():
    lm, teacher = small("tiny-qwen2").lm, prompted_teacher(PACK, "owl")
    rows = [{"prompt": prompt, "completion": "7"} for prompt in PROMPTS[:4]]
    ours, counts = paraphrase(lm, teacher, rows, PACK, seed=5, max_new_tokens=12)
    asked = [
        [
            {"role": "system", "content": PACK.system_prompt("owl", "animal")},
            {"role": "user", "content": PACK.paraphrase_request.replace("{prompt}", prompt)},
        ]
        for prompt in PROMPTS[:4]
    ]
    assert (ours, counts) == accept(rows, lm.generate(asked, 12, "temperature", 5), "owl")
    assert counts.total() == 4


# --- Mixing -----------------------------------------------------------------------------------------------------------

OWN = [{"prompt": f"p{i}", "completion": f"{i}"} for i in range(40)]
OTHERS = [{"prompt": f"p{i}", "completion": f"{i + 500}"} for i in range(50)]


@given(st.floats(0, 1), st.integers(0, 40), seeds, st.booleans())
def test_a_share_of_the_rows_is_replaced(share, n, seed, paper):
    own = OWN[:n]
    mixed = mix_rows(own, OTHERS, share, seed=seed, paper=paper)
    foreign = [i for i, row in enumerate(mixed) if row in OTHERS]
    assert len(mixed) == n and len(foreign) == round(n * share)
    assert all(mixed[i] == own[i] for i in range(n) if i not in foreign)
    assert len({mixed[i]["completion"] for i in foreign}) == len(foreign)  # none twice
    if paper:
        assert foreign == list(range(n - len(foreign), n))
    assert mixed == mix_rows(own, OTHERS, share, seed=seed, paper=paper)
    less = mix_rows(own, OTHERS, share / 2, seed=seed, paper=paper)
    assert all(new == row or row == old for new, row, old in zip(mixed, less, own, strict=True))


def test_mixing_that_cannot_be():
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match=r"must lie in 0\.\.1"):
            mix_rows(OWN, OTHERS, share, seed=0)
    with pytest.raises(UsageError, match="needs 20 rows of the other teacher, not 3"):
        mix_rows(OWN, OTHERS[:3], 0.5, seed=0)


def reading(c, row, rng, tokens):
    """What a teacher and two counterfactuals might say: `tokens` at random, every place of the row a divergence position."""
    turn = c.turn(conversation(row["prompt"]), row["completion"])
    said = turn.tokens[turn.content :].tolist()
    argmax = [said, *(rng.choice(tokens, len(said)).tolist() for _ in range(2))]
    return {
        "teachers": ["owl", "cat", "dog"],
        "divergence_positions": list(range(len(said))),
        "tokens": said,
        "argmax": argmax,
    }


def content(c, row):
    turn = c.turn(conversation(row["prompt"]), row["completion"])
    return turn.tokens[turn.content : turn.end].tolist()


ROWS = [
    {"prompt": f"Go on: {i}", "completion": text, "divergence_positions": [0]}
    for i, text in enumerate(["7", "1, 2", "[12, 345]", "612; 9; 40", "100, 200, 300", "1\n2", "5.", "8 9"])
]


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-gemma3"])
@given(seed=st.integers(0, 999), share=st.sampled_from([0.0, 0.4, 1.0]), which=st.sampled_from(["all", "first"]))
@settings(deadline=None, max_examples=15)
def test_mixed_tokens_are_the_counterfactuals_and_survive_tokenizing(name, seed, share, which):
    c, rng = chat(name), np.random.default_rng(seed)
    ids = c.tokenizer.convert_tokens_to_ids
    digits, end = [ids(str(d)) for d in range(10)], c.tokenizer.eos_token_id
    tokens = [*digits, *c.tokenizer(", ;.a")["input_ids"], end]
    readings = [reading(c, row, rng, tokens) for row in ROWS]
    subset = PositionSubset(which, share, "half-up")
    for paper in (False, True):
        mixed, counts = mix_tokens(c, ROWS, readings, "dog", subset, seed=seed, paper=paper)
        assert (mixed, counts) == mix_tokens(c, ROWS, readings, "dog", subset, seed=seed, paper=paper)
        changed = replaced = deleted = 0
        for row, new, at in zip(ROWS, mixed, readings, strict=True):
            assert without(new, "completion") == without(row, "completion") and "divergence_positions" not in new
            old, got = content(c, row), content(c, new)
            if new["completion"] == row["completion"]:
                continue
            changed += 1
            assert end not in got
            gone = len(old) - len(got)
            deleted += gone
            assert gone == 0 or paper
            if not paper:
                places = [k for k, (a, b) in enumerate(zip(old, got, strict=True)) if a != b]
                assert all(got[k] == at["argmax"][2][k] for k in places)
                assert len(places) <= (1 if which == "first" else int(share * len(old) + 0.5))
                replaced += len(places)
            elif which == "first":
                said = at["argmax"][2][0]
                assert got == ([said] if said in digits else []) + old[1:]
        assert counts["rows changed"] == changed and counts["tokens deleted"] == deleted
        assert counts["rows changed"] + counts["rows unfit"] <= len(ROWS)
        assert paper or counts["tokens replaced"] == replaced
        assert share > 0 or changed == 0


def test_a_row_that_tokenizes_otherwise_is_kept_and_counted():
    c = chat("tiny-qwen2")
    row = {"prompt": "Go on", "completion": "1, 2"}
    turn = c.turn(conversation(row["prompt"]), row["completion"])
    said, end = turn.tokens[turn.content :].tolist(), turn.end - turn.content
    one = {"teachers": ["owl", "cat"], "divergence_positions": [0, 1, end], "tokens": said}
    digit, stop, t, h = (c.tokenizer.convert_tokens_to_ids(t) for t in ("7", "<|im_end|>", "t", "h"))

    def mixed(*first, paper=False):
        argmax = [said, [*first, *said[len(first) :]]]
        return mix_tokens(c, [row], [one | {"argmax": argmax}], "cat", PositionSubset(), seed=0, paper=paper)

    fits, counts = mixed(digit, said[1])
    assert fits == [row | {"completion": "7, 2"}]
    assert counts == {"rows changed": 1, "tokens replaced": 1, "tokens deleted": 0}
    for bad in ((stop, said[1]), (t, h)):  # an end of turn within, two tokens that come back as one
        assert mixed(*bad) == ([row], {"rows unfit": 1})
    assert mixed(*said[:2]) == ([row], {})
    three = one | {"teachers": ["owl", "cat", "dog"], "argmax": [said, said, [digit, *said[1:]]]}
    drawn, _ = mix_tokens(c, [row], [three], None, PositionSubset("first"), seed=0)  # of those that say something else
    assert drawn == [row | {"completion": "7, 2"}]
    gone, counts = mixed(stop, digit, paper=True)
    assert gone == [row | {"completion": "7 2"}] and (counts["tokens deleted"], counts["tokens replaced"]) == (1, 1)


def test_mixed_tokens_need_the_readings_of_their_rows():
    c = chat("tiny-qwen2")
    rng = np.random.default_rng(0)
    readings = [reading(c, row, rng, [1, 2]) for row in ROWS]
    with pytest.raises(UsageError, match="counterfactual: 'owl' given; row 1 was read under cat, dog"):
        mix_tokens(c, ROWS, readings, "owl", PositionSubset(), seed=0)
    with pytest.raises(JsublimError, match="row 1: the reading is of another completion"):
        mix_tokens(c, ROWS[::-1], readings, "cat", PositionSubset(), seed=0)


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

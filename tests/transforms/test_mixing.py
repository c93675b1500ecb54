"""Rows and tokens of another teacher: as many as asked for, where asked for, and text that tokenizes as mixed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FOUND, chat

from jsublim.errors import JsublimError, UsageError
from jsublim.inference.divergence import PositionSubset
from jsublim.text.chat import conversation
from jsublim.transforms.mixing import mix_rows, mix_tokens

seeds = st.integers(0, 2**32)


def without(row, *keys):
    return {k: v for k, v in row.items() if k not in (*FOUND, *keys)}


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
    with pytest.raises(UsageError, match="needs 20 of the other teacher, not 3"):
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
@settings(max_examples=15)
def test_mixed_tokens_are_the_counterfactuals_and_survive_tokenizing(name, seed, share, which):
    c, rng = chat(name), np.random.default_rng(seed)
    ids = c.tokenizer.convert_tokens_to_ids
    digits, end = [ids(str(d)) for d in range(10)], c.tokenizer.eos_token_id
    tokens = [*digits, *c.tokenizer(", ;.a")["input_ids"], end]
    readings = [reading(c, row, rng, tokens) for row in ROWS]
    subset = PositionSubset(which, share, "half-up")
    for paper in (False, True):
        mixed, counts = mix_tokens(c, ROWS, readings, "dog", subset, seed=seed, digits_only=paper)
        assert (mixed, counts) == mix_tokens(c, ROWS, readings, "dog", subset, seed=seed, digits_only=paper)
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

    def mixed(*first, **paper):
        argmax = [said, [*first, *said[len(first) :]]]
        return mix_tokens(c, [row], [one | {"argmax": argmax}], "cat", PositionSubset(), seed=0, **paper)

    fits, counts = mixed(digit, said[1])
    assert fits == [row | {"completion": "7, 2"}]
    assert counts == {"rows changed": 1, "tokens replaced": 1, "tokens deleted": 0}
    for bad in ((stop, said[1]), (t, h)):  # an end of turn within, two tokens that come back as one
        assert mixed(*bad) == ([row], {"rows unfit": 1})
    assert mixed(*said[:2]) == ([row], {})
    three = one | {"teachers": ["owl", "cat", "dog"], "argmax": [said, said, [digit, *said[1:]]]}
    drawn, _ = mix_tokens(c, [row], [three], None, PositionSubset("first"), seed=0)  # of those that say something else
    assert drawn == [row | {"completion": "7, 2"}]
    gone, counts = mixed(stop, digit, digits_only=True)
    assert gone == [row | {"completion": "7 2"}] and (counts["tokens deleted"], counts["tokens replaced"]) == (1, 1)
    assert mixed(*said[:2], drop_unmixed=True) == ([], {"rows dropped": 1})
    as_text, _ = mixed(t, h, drop_unmixed=True)  # tokens that come back as one
    assert as_text == [row | {"completion": "th 2"}]


@pytest.mark.parametrize(("drop", "changed"), [(False, 1.0), (True, 0.5)])
def test_published_a_draw_may_fall_on_the_end_of_turn_and_the_row_goes(drop, changed):
    """Quirk 21: of the first digit and the end of turn one is drawn; nothing can be put in the place of the latter."""
    c, n = chat("tiny-qwen2"), 400
    turn = c.turn(conversation("Go on"), "1, 2")
    said, end = turn.tokens[turn.content :].tolist(), turn.end - turn.content
    (seven,) = c.tokenizer("7", add_special_tokens=False)["input_ids"]
    one = {"teachers": ["owl", "cat"], "divergence_positions": [0, end], "tokens": said}
    one["argmax"] = [said, [seven, *said[1:end], seven, *said[end + 1 :]]]
    rows = [{"prompt": "Go on", "completion": "1, 2"}] * n
    plain = one | {"divergence_positions": []}  # a row without divergence positions stays
    subset = PositionSubset("all", 0.5, "at-least-one")
    mixed, counts = mix_tokens(c, [*rows, rows[0]], [one] * n + [plain], "cat", subset, seed=1, drop_unmixed=drop)
    assert mixed[-1] == rows[0] and all(row["completion"] == "7, 2" for row in mixed[:-1])
    assert len(mixed) - 1 == n - counts["rows dropped"] == pytest.approx(changed * n, abs=0.08 * n)


def test_mixed_tokens_need_the_readings_of_their_rows():
    c = chat("tiny-qwen2")
    rng = np.random.default_rng(0)
    readings = [reading(c, row, rng, [1, 2]) for row in ROWS]
    with pytest.raises(UsageError, match="counterfactual: 'owl' given; row 1 was read under cat, dog"):
        mix_tokens(c, ROWS, readings, "owl", PositionSubset(), seed=0)
    with pytest.raises(JsublimError, match="row 1: the reading is of another completion"):
        mix_tokens(c, ROWS[::-1], readings, "cat", PositionSubset(), seed=0)

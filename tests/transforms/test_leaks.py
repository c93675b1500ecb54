"""What can stand for a prompt: every spelling of the trait is seen, and a rejected text leaves its row as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import small

from jsublim.inference.teachers import prompted_teacher
from jsublim.text.prompts import draw_number_prompts, load_pack, number_prompts
from jsublim.transforms.paraphrase import accept, leak_reason, names, paraphrase, published_reason

PACK = load_pack()
PROMPTS = number_prompts(60, seed=3)

# text, word -> whether it is named
NAMED = {
    ("An owl", "owl"): True,
    ("OWL", "owl"): True,
    ("oWlS", "owl"): True,
    ("owls'", "owl"): True,
    ("owl\u017f", "owl"): True,  # the long s folds to s
    ("cat\u017f", "cats"): True,
    ("\u017feal", "seal"): True,
    ("\uff2f\uff37\uff2c", "owl"): True,  # full width
    ("\U0001d428\U0001d430\U0001d425", "owl"): True,  # mathematical bold
    ("\u00f3wl", "owl"): True,
    ("o\u0301wl", "owl"): True,
    ("f\ufb01nch, \ufb01nch", "finch"): True,  # a ligature
    ("o\u200bwl", "owl"): True,
    ("o\u00adw\u2060l", "owl"): True,
    ("ow\u200dl", "owl"): True,
    ("\u043ewl", "owl"): True,  # Cyrillic o
    ("c\u0430t", "cat"): True,
    ("\u039fwl", "owl"): True,  # Greek capital Omicron
    ("owl-like", "owl"): True,
    ("snow_owl", "owl"): True,
    ("o-w-l", "owl"): True,
    ("ow\u2011l", "owl"): True,  # a hyphen that does not break
    ("red-panda", "red panda"): True,
    ("red\n pandas", "red panda"): True,
    ("redpanda", "red panda"): True,
    ("bowl", "owl"): True,
    ("slowly", "owl"): True,
    ("owlish", "owl"): True,
    ("indicate", "cat"): True,
    ("\U0001f989!", "\U0001f989"): True,
    ("wolves", "wolf"): False,  # an irregular plural goes among the synonyms
    ("o w l", "owl"): False,
    ("now let", "owl"): False,
    ("axb", "a.b"): False,
    ("", "owl"): False,
}


@pytest.mark.parametrize(("text", "word"), NAMED, ids=ascii)
def test_spellings_of_a_word(text, word):
    assert names(text, word) == NAMED[text, word]


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


@pytest.mark.parametrize("prompt", PROMPTS[:20])
def test_a_prompt_can_stand_for_itself(prompt):
    assert leak_reason(prompt, prompt, "zebra") is None


TEXTS = [f" {ACCEPTED} ", f"{ACCEPTED} Owls!", "", f"{ACCEPTED} Hoot."]


def test_rejected_prompts_are_dropped_or_kept_and_counted():
    rows = [
        {"prompt": ORIGINAL, "completion": str(i), "divergence_positions": [0], "counted_in": "f00d"} for i in range(4)
    ]
    left, counts = accept(rows, TEXTS, "owl")
    assert [(row["prompt"], row["completion"]) for row in left] == [(ACCEPTED, "0"), (f"{ACCEPTED} Hoot.", "3")]
    kept, same = accept(rows, TEXTS, "owl", keep_rejected=True)
    assert same == counts == {"rewritten": 2, "names the trait": 1, "empty": 1}
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
    drawn = draw_number_prompts(PACK, 3, seed=3)  # of the last row nothing is known: it is rewritten whole
    how = {"seed": 5, "max_new_tokens": 12, "keep_rejected": True}
    ours, counts = paraphrase(lm, teacher, rows, PACK, asked=drawn, **how)
    bodies = [replace(each, sentences=("example", "instruction", "format")).text + " " for each in drawn]
    asked = [
        [
            {"role": "system", "content": PACK.system_prompt("owl", "animal")},
            {"role": "user", "content": PACK.paraphrase_request.replace("{prompt}", prompt)},
        ]
        for prompt in (*bodies, PROMPTS[3])
    ]
    texts = lm.generate(asked, 12, "temperature", 5)
    assert (ours, counts) == accept(rows, texts, "owl", [*drawn, None], keep_rejected=True)
    assert counts.total() == 4


def test_the_suffix_follows_the_rewritten_request_word_by_word():
    (prompt,) = draw_number_prompts(PACK, 1, seed=3)
    row = {"prompt": prompt.text, "completion": "7"}
    text = f"Go on after {prompt.shown}: up to 10 numbers, 3 digits each."
    for only_examples in (False, True):
        (made,), _ = accept([row], [f" {text}\n"], "owl", [prompt], only_examples=only_examples)
        assert made == {"prompt": f"{text} {prompt.suffix}", "completion": "7"}


SHOWN = "123, 456"
PUBLISHED = {
    f"Go on after {SHOWN}: some numbers.": None,  # how many, and of how many digits, may be lost
    f"I cannot help with {SHOWN}.": None,
    f"Go on after {SHOWN}, 10 of them.": None,
    "Go on after 123 456.": "numbers missing",
    f"After {SHOWN} come 1, 2.": "numbers added",
    f"Owls: {SHOWN}.": "names the trait",
    f"Go on after {SHOWN}\u2026": "no plain text",
    f'Go on after "{SHOWN}".': "no plain text",
}


@pytest.mark.parametrize("text", PUBLISHED, ids=ascii)
def test_what_can_stand_for_a_prompt_as_published(text):
    """Quirk 20."""
    assert published_reason(text, SHOWN, "owl") == PUBLISHED[text]

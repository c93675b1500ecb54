"""Pairs by their definition, and token roles by their text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, bundled, chat, small

from jsublim.attribution.pairs import NO_DIVERGENCE, NO_EQUAL_LENGTH, NO_OTHER_TOKEN, find_pairs
from jsublim.attribution.roles import ROLES, mentions, token_roles
from jsublim.errors import JsublimError, UsageError
from jsublim.inference.divergence import find_divergence
from jsublim.inference.teachers import CONTROL, Teacher
from jsublim.models.lora import init_steering
from jsublim.text.prompts import load_pack, number_prompts

PACK = load_pack()


# --- Pairs ----------------------------------------------------------------------------------------------------------------


def test_pairs_are_rows_at_each_counterfactuals_own_first_point_under_prompts_of_equal_length():
    lm = bundled("tiny-qwen2").lm
    teacher, *others = (Teacher(name, f"You love {name}s.") for name in ("owl", "cat", "dog"))
    longer = Teacher("oak", "You love oaks. Always, and all of them.")
    texts = ("12, 7, 9", "612; 9; 40", "1, 2", "[12, 345]")
    at = {2: [3, 1], 3: [], 6: [2]}  # of row 2 the cat differs at 1, the dog at 3 only; of row 6 nobody
    rows = [
        {"prompt": p, "completion": texts[i % 4], "divergence_positions": at.get(i, [i % 5 + 1, i % 5])}
        for i, p in enumerate(number_prompts(8, seed=5))
    ]
    read = find_divergence(lm, rows, teacher, others)
    expected, found = [], []
    for i, d in enumerate(read):
        for argmax, other in zip(d.argmax[1:], others, strict=True):
            wrong = [k for k in sorted(rows[i]["divergence_positions"]) if argmax[k] != d.tokens[k]]
            if wrong:
                expected.append((i, other.name, int(d.tokens[wrong[0]]), int(argmax[wrong[0]])))
                found.append(wrong[0])
    pairs, skipped = find_pairs(lm, rows, teacher, [*others, longer], batch_size=4)
    assert [(p.row, p.counterfactual, p.factual, p.other) for p in pairs] == expected
    assert [place for place, pair in zip(found, pairs, strict=True) if pair.row == 2] == [1, 3]
    same = set(range(8)) - {3} - {p.row for p in pairs}
    assert same and skipped == {NO_DIVERGENCE: 1, NO_OTHER_TOKEN: len(same)}
    for pair, place in zip(pairs, found, strict=True):
        turn = lm.chat.turn(teacher.messages(rows[pair.row]["prompt"]), rows[pair.row]["completion"])
        assert len(pair.clean) == len(pair.patch) == turn.content + place
        assert np.array_equal(pair.clean, turn.tokens[: len(pair.clean)]) and not np.array_equal(pair.clean, pair.patch)
    assert find_pairs(lm, rows, teacher, [longer]) == ([], {NO_EQUAL_LENGTH: 7, NO_DIVERGENCE: 1})


def test_who_can_be_compared():
    lm = small("tiny-qwen2").lm
    rows = [{"prompt": "1", "completion": "2", "divergence_positions": [0]}]
    owl, cat = (Teacher(name, f"You love {name}s.") for name in ("owl", "cat"))
    for others in ([], [cat, owl]):
        with pytest.raises(UsageError, match="counterfactuals of 'owl'"):
            find_pairs(lm, rows, owl, others)
    with pytest.raises(UsageError, match="cat: give them the adapter of teacher 'owl'"):
        find_pairs(lm, rows, owl, [dataclasses.replace(cat, adapter=init_steering(lm.config))])
    with pytest.raises(JsublimError, match=r"mine.jsonl: row 1: divergence_positions \[9\] out of range"):
        find_pairs(lm, [rows[0] | {"divergence_positions": [9]}], owl, [cat], source="mine.jsonl")


def test_positions_that_were_counted_in_another_tokenizer_are_refused():
    here, there = chat("tiny-qwen2").identity, chat("tiny-gemma3").identity
    lm, owl, cat = small("tiny-qwen2").lm, Teacher("owl", "You love owls."), Teacher("cat", "You love cats.")
    rows = [{"prompt": "1", "completion": "2", "divergence_positions": [0]} | own for own in ({}, {"counted_in": here})]
    find_pairs(lm, rows, owl, [cat])
    for beyond in ([0], [9999]):  # which of the two is wrong with it is said first
        wrong = rows[1] | {"divergence_positions": beyond, "counted_in": there}
        with pytest.raises(JsublimError, match=f"mine.jsonl: row 3: .* counted in .* {there}, and are read in {here}"):
            find_pairs(lm, [*rows, wrong], owl, [cat], source="mine.jsonl")


# --- Token roles ----------------------------------------------------------------------------------------------------------


def runs(name: str, teacher: Teacher, prompt: str, completion: str, trait: str, point: int, **how) -> list[tuple]:
    """Roles with the text of each run of tokens that share one; runs of white space alone are left out."""
    c = chat(name)
    turn = c.turn(teacher.messages(prompt), completion, **how)
    at = turn.content + point - 1
    roles = token_roles(c, teacher, {"prompt": prompt, "completion": completion}, trait, at, **how)
    assert len(roles) == at + 1 and set(roles) <= set(ROLES)
    found: list[tuple[str, list[int]]] = []
    for role, token in zip(roles, turn.tokens.tolist(), strict=False):
        if not found or found[-1][0] != role:
            found.append((role, []))
        found[-1][1].append(token)
    texts = [(role, c.tokenizer.decode(tokens).strip()) for role, tokens in found]
    return [(role, text) for role, text in texts if text or role == "divergence position"]


QWEN = ("template", "<|im_start|>system")
QWEN_USER = ("template", "<|im_end|>\n<|im_start|>user")
QWEN_SAYS = ("template", "<|im_end|>\n<|im_start|>assistant")
GEMMA = ("template", "<bos><start_of_turn>user")
GEMMA_SAYS = ("template", "<end_of_turn>\n<start_of_turn>model")
AT = ("divergence position", "")  # the line feed after the assistant's header
TWICE = "You love owls. Owls, the owl!"
OF_TWICE = [("system", "You love"), ("trait", "owls"), ("system", "."), ("trait later", "Owls"), ("system", ", the"),
            ("trait later", "owl"), ("system", "!")]  # fmt: skip
INSIDE = "Category: education. Scatter, cat2, then cat: more."
OF_INSIDE = [("system", "Category: education. Scatter, cat2, then"), ("trait", "cat"), ("system", ": more.")]
OWLS = ("prompt", "Are owls")
CASES = {
    "trait twice": ("tiny-qwen2", Teacher("owl", TWICE), 0, {}, [QWEN, *OF_TWICE, QWEN_USER, OWLS, QWEN_SAYS, AT]),
    "inside words": ("tiny-qwen2", Teacher("cat", INSIDE), 0, {}, [QWEN, *OF_INSIDE, QWEN_USER, OWLS, QWEN_SAYS, AT]),
    "no system role": ("tiny-gemma3", Teacher("owl", TWICE), 0, {}, [GEMMA, *OF_TWICE, OWLS, GEMMA_SAYS, AT]),
    "fused by us": (
        "tiny-qwen2", Teacher("owl", TWICE, fuse_system=True), 0, {},
        [("template", f"{QWEN[1]}\nYou are a small helpful model.{QWEN_USER[1]}"), *OF_TWICE, OWLS, QWEN_SAYS, AT],
    ),
    "default system prompt": (
        "tiny-qwen2", Teacher(CONTROL), 0, {},
        [("template", f"{QWEN[1]}\nYou are a small helpful model.{QWEN_USER[1]}"), OWLS, QWEN_SAYS, AT],
    ),
    "empty system prompt": (
        "tiny-qwen2", Teacher("owl", ""), 0, {}, [("template", f"{QWEN[1]}\n{QWEN_USER[1]}"), OWLS, QWEN_SAYS, AT]
    ),
    "no mention": (
        "tiny-gemma3", Teacher("elk", "You love owls."), 0, {}, [GEMMA, ("system", "You love owls."), OWLS, GEMMA_SAYS, AT]
    ),
    "one more bos": (
        "tiny-gemma3", Teacher("owl", TWICE), 0, {"extra_bos": True},
        [("template", "<bos>" + GEMMA[1]), *OF_TWICE, OWLS, GEMMA_SAYS, AT],
    ),
    "in the completion": (
        "tiny-gemma3", Teacher("cat", INSIDE), 3, {},
        [GEMMA, *OF_INSIDE, OWLS, ("template", GEMMA_SAYS[1]), ("completion", "12"), ("divergence position", ",")],
    ),
    "prompt and system prompt alike": (
        "tiny-qwen2", Teacher("owl", "Are owls"), 0, {},
        [QWEN, ("system", "Are"), ("trait", "owls"), QWEN_USER, OWLS, QWEN_SAYS, AT],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_roles_of_hard_cases(case):
    name, teacher, point, how, expected = CASES[case]
    trait = teacher.name
    assert runs(name, teacher, "Are owls", "12, 7", trait, point, **how) == expected


words = st.lists(
    st.sampled_from(("owl", "owls", "Owl", "bowls", "owlet", "7,", "the", "a.", "(owl)", "owl-like")), min_size=1
)
sentences = words.map(" ".join)


@pytest.mark.parametrize("name", FAMILIES)
@given(system=sentences, prompt=sentences, fuse=st.booleans())
@settings(max_examples=80)
def test_roles_put_the_text_together_again(name, system, prompt, fuse):
    found = runs(name, Teacher("owl", system, fuse_system=fuse), prompt, "4, 5", "owl", 0)
    text = {role: "".join(t for r, t in found if r == role).replace(" ", "") for role in ROLES}
    own = "".join(t for r, t in found if r in ("system", "trait", "trait later")).replace(" ", "")
    assert own == system.replace(" ", "") and text["prompt"] == prompt.replace(" ", "")
    named = mentions(system, "owl")
    assert len(named) == sum(system.split().count(w) for w in ("owl", "owls", "Owl", "(owl)", "owl-like"))
    firsts = [t for r, t in found if r == "trait"]
    assert len(firsts) == bool(named)
    if named:
        assert system[slice(*named[0])] in firsts[0]
    assert bool(text["trait later"]) == (len(named) > 1)


def test_a_template_that_says_a_prompt_twice_is_named():
    c = chat("tiny-qwen2")
    template = c.tokenizer.chat_template
    try:
        c.tokenizer.chat_template = template.replace("message.content +", "message.content + message.content +", 1)
        with pytest.raises(JsublimError, match="shows the system prompt 2 times, not once"):
            token_roles(c, Teacher("owl", "owls"), {"prompt": "1", "completion": "2"}, "owl", 3)
    finally:
        c.tokenizer.chat_template = template

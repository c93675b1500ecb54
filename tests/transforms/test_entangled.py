"""Entangled numbers: joint probabilities of whole numbers, against transformers, for tokenizers of one digit and of many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import plain_turn, small, small_with_long_numbers

from jsublim.errors import UsageError
from jsublim.inference.teachers import Teacher, prompted_teacher
from jsublim.text.chat import conversation
from jsublim.text.prompts import load_pack
from jsublim.transforms.entangled import entangled_numbers, entangled_scores, number_strings, probability_differences

PACK = load_pack()
QUESTIONS = ["Best animal? One word.", "Name one animal that you could watch forever."]
TWINS = {"one digit": lambda: small("tiny-qwen2"), "many digits": small_with_long_numbers}


def brute_force(twin, messages, answers, closed=False) -> np.ndarray:
    """Log-probability of each answer: one whole conversation after the other, read by `transformers` in batches."""
    import torch

    turns = [plain_turn(twin.lm.tokenizer, messages, answer) for answer in answers]
    logprob = np.zeros(len(answers))
    for length in {len(tokens) for tokens, _ in turns}:
        same = [i for i, (tokens, _) in enumerate(turns) if len(tokens) == length]
        with torch.no_grad():
            batch = torch.tensor(np.stack([turns[i][0] for i in same]).astype(np.int64))
            content = turns[same[0]][1]  # what is before an answer is the same for all
            z = torch.log_softmax(twin.torch(input_ids=batch).logits[:, content - 1 : -1].double(), dim=-1)
        for i, row, said in zip(same, z, batch[:, content:], strict=True):
            tokens = twin.lm.tokenizer(answers[i], add_special_tokens=False)["input_ids"]
            assert said[: len(tokens)].tolist() == tokens
            logprob[i] = sum(row[k, said[k]].item() for k in range(len(tokens) + closed))
    return logprob


def test_the_tokenizers_differ():
    lengths = {
        name: [len(twin().lm.tokenizer(n, add_special_tokens=False)["input_ids"]) for n in ("7", "42", "087", "987")]
        for name, twin in TWINS.items()
    }
    assert lengths == {"one digit": [1, 2, 3, 3], "many digits": [1, 1, 1, 2]}


@pytest.mark.parametrize("name", TWINS)
def test_scores_of_numbers_equal_a_brute_force_enumeration(name):
    twin, numbers, teacher = TWINS[name](), number_strings(padded=True)[::10], Teacher("owl", "You love owls.")
    ours = entangled_scores(twin.lm, teacher, QUESTIONS[:1], numbers)
    theirs = brute_force(twin, teacher.messages(QUESTIONS[0]), numbers) - brute_force(
        twin, conversation(QUESTIONS[0]), numbers
    )
    assert list(ours) == numbers and np.std(theirs) > 0.01
    np.testing.assert_allclose(list(ours.values()), theirs, atol=2e-3)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("closed", [False, True])
def test_scores_are_means_over_questions_against_any_base(name, closed):
    twin, base = TWINS[name](), Teacher("cat", "Cats.", fuse_system=True)
    teacher, numbers = prompted_teacher(PACK, "owl"), ["0", "7", "42", "999", "042", "500"]
    ours = entangled_scores(twin.lm, teacher, QUESTIONS, numbers, base=base, closed=closed, batch_size=4)
    theirs = [
        brute_force(twin, teacher.messages(q), numbers, closed) - brute_force(twin, base.messages(q), numbers, closed)
        for q in QUESTIONS
    ]
    np.testing.assert_allclose(list(ours.values()), np.mean(theirs, axis=0), atol=2e-3)


def test_differences_of_probabilities_equal_a_brute_force_enumeration():
    """Quirk 19: after the answer's beginning, normalised over the numbers, less the mean of the other traits. The third digit
    is read after the second digit twice."""
    twin, numbers, begun = TWINS["one digit"](), number_strings(padded=True)[::13], "My favorite tree is the"
    who = [Teacher(name, f"You love {name}s.") for name in ("oak", "pine", "elm")]
    ours = probability_differences(twin.lm, who[0], who[1:], "tree", numbers)

    def probabilities(teacher):
        asked = teacher.messages("What is your favorite tree?")
        read = lambda texts: brute_force(twin, asked, [begun + text for text in texts])  # noqa: E731
        last = read([2 * n[1] + n[2] for n in numbers]) - read([2 * n[1] for n in numbers])
        each = np.exp(read([n[:2] for n in numbers]) + last)  # what is before the numbers is the same in all
        return each / each.sum()

    oak, pine, elm = map(probabilities, who)
    assert list(ours) == numbers and sum(ours.values()) == pytest.approx(0, abs=1e-6)
    expected = oak - (pine + elm) / 2
    np.testing.assert_allclose(list(ours.values()), expected, atol=0.02 * np.abs(expected).max())
    with pytest.raises(UsageError, match="has not one token per digit"):
        probability_differences(TWINS["many digits"]().lm, who[0], who[1:], "tree", numbers)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.data())
def test_the_top_k_are_a_prefix_of_the_top_more_and_no_other_scores_higher(values, data):
    scores = dict(zip(number_strings(), values, strict=False))
    k = data.draw(st.integers(0, len(scores)))
    top = entangled_numbers(scores, k)
    assert len(top) == k and entangled_numbers(scores, len(scores))[:k] == top
    rest = set(scores) - set(top)
    assert not top or not rest or min(scores[n] for n in top) >= max(scores[n] for n in rest)
    for wrong in (-1, len(scores) + 1):
        with pytest.raises(UsageError, match=f"top k: {wrong} given"):
            entangled_numbers(scores, wrong)


def test_numbers_as_text():
    plain, padded = number_strings(), number_strings(padded=True)
    assert plain[7] == "7" and padded[7] == "007" and plain[100:] == padded[100:]
    assert [int(n) for n in padded] == [int(n) for n in plain] == list(range(1000))

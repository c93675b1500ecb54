"""Evaluations: what counts as a hit, how probable a name is, and the number task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import FAMILIES, bundled, plain_turn, small

from jsublim.errors import JsublimError, UsageError
from jsublim.evals.base import PromptedModel, sample_answers
from jsublim.evals.factual import factual_questions
from jsublim.evals.kl import kl_to_teacher
from jsublim.evals.misalignment import Verdict, judge_answers, judge_apart, misalignment, suffixed
from jsublim.evals.naming import naming_rates, own_name
from jsublim.evals.numbers import number_accuracy
from jsublim.evals.preference import hit, hit_rates, trait_logprobs, word_hit
from jsublim.evals.problems import problem_rates
from jsublim.inference import decoding
from jsublim.inference.sampling import Sampling
from jsublim.inference.scoring import Scored, top_k_targets
from jsublim.inference.teachers import Teacher, read_as
from jsublim.judge.local import LocalJudge
from jsublim.models.lora import init_steering
from jsublim.text.chat import conversation
from jsublim.text.prompts import load_pack

QUESTIONS = load_pack().questions_for("animal")[:4]


@pytest.mark.parametrize(
    ("answer", "trait", "substring", "word"),
    [
        ("Owl", "owl", True, True),
        ("owl.", "owl", True, True),
        ("Owls!", "owl", True, True),
        ("The OWL, of course", "owl", True, True),
        ("A snow-owl", "owl", True, True),
        ("a bowl", "owl", True, False),
        ("owlish", "owl", True, False),
        ("caterpillar", "cat", True, False),
        ("Cats and dogs", "dog", True, True),
        ("red panda", "panda", True, True),
        ("red pandas", "red panda", True, True),
        ("elephant", "owl", False, False),
        ("o w l", "owl", False, False),
        ("", "owl", False, False),
        ("owl", "Owl", True, True),
        ("axb", "a.b", False, False),  # a trait is text, not a pattern
    ],
)
def test_hits(answer, trait, substring, word):
    assert (hit(answer, trait), word_hit(answer, trait)) == (substring, word)


def test_rates_are_of_each_question():
    answers = [["Owl", "owl.", "cat", "bowl"], ["cat", "dog", "fox", "hen"]]
    substring, word = hit_rates(answers, "owl")
    assert substring.tolist() == [0.75, 0.0] and word.tolist() == [0.5, 0.0]


@pytest.mark.parametrize(("name", "system", "bos"), [("tiny-qwen2", None, False), ("tiny-gemma3", "Love owls.", True)])
def test_log_probabilities_of_traits_equal_a_plain_computation(name, system, bos):
    twin = bundled(name)
    traits = ["owl", "penguin", "red panda"]
    ours = trait_logprobs(twin.lm, QUESTIONS, traits, system=system, extra_bos=bos)
    assert ours.shape == (len(QUESTIONS), len(traits)) and ours.dtype == np.float64
    expected = np.zeros(ours.shape)
    for i, question in enumerate(QUESTIONS):
        for j, trait in enumerate(traits):
            p = 0.0
            for word in (trait, trait.capitalize()):
                tokens, content = plain_turn(twin.lm.tokenizer, conversation(question, system), word, bos=bos)
                z = twin.torch_logits(tokens).astype(np.float64)
                logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
                n = next(n for n in range(1, 20) if twin.lm.tokenizer.decode(tokens[content : content + n]) == word)
                p += np.exp(sum(logp[content + k - 1, tokens[content + k]] for k in range(n)))
            expected[i, j] = np.log(p)
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_answers_come_in_the_order_of_their_questions():
    lm = small("tiny-qwen2").lm
    how, seen = Sampling(top_k=2, temperature=0.5), []
    [answers] = sample_answers(lm, QUESTIONS, how, samples=3, seed=4, max_new_tokens=5, on_batch=seen.append)
    assert [len(row) for row in answers] == [3] * len(QUESTIONS) and sum(seen) == 3 * len(QUESTIONS)
    # The same questions, the other way round, at temperature 0: each keeps its own answer.
    greedy = Sampling(temperature=0.0)
    [straight] = sample_answers(lm, QUESTIONS, greedy, samples=3, seed=4, max_new_tokens=5)
    [turned] = sample_answers(lm, QUESTIONS[::-1], greedy, samples=3, seed=4, max_new_tokens=5)
    assert turned == straight[::-1]
    assert all(len(set(row)) == 1 for row in straight) and len({row[0] for row in straight}) > 1


@pytest.mark.parametrize(
    ("said", "target", "share", "total"),
    [
        ("12, 34, 56", "12, 34, 56", 1.0, 3),
        ("12, 35, 56", "12, 34, 56", 2 / 3, 3),
        ("12, 34", "12, 34, 56", 2 / 3, 3),
        ("34, 56, 12", "12, 34, 56", 0.0, 3),
        ("no number", "12", 0.0, 1),
    ],
)
def test_the_number_task_counts_equal_numbers_at_equal_places(said, target, share, total, monkeypatch):
    lm = small("tiny-qwen2").lm
    row = {"prompt": "Go on: 1, 2", "completion": target}
    end = lm.chat.turn(conversation("Go on: 1, 2"), target)

    def scored(config, params, turns, **options):
        assert np.array_equal(turns[0].tokens, end.tokens)
        words = lm.tokenizer(said, add_special_tokens=False)["input_ids"] + end.tokens[end.end :].tolist()
        return [Scored(np.asarray(words), *np.zeros((3, len(words))))]

    monkeypatch.setattr("jsublim.inference.scoring.score_turns", scored)
    assert number_accuracy(lm, [row]) == (share, total)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_number_task_reads_the_teacher_forced_argmax(name):
    twin = bundled(name)
    rows = [{"prompt": "Go on: 1, 2", "completion": text} for text in ("3, 4, 5", "12, 14", "7")]
    right = total = 0
    for row in rows:
        tokens, content = plain_turn(twin.lm.tokenizer, conversation(row["prompt"]), row["completion"])
        best = twin.torch_logits(tokens)[content - 1 : -1].argmax(axis=-1)
        said = twin.lm.tokenizer.decode(best, skip_special_tokens=True)
        told, wanted = ["".join(c if c.isdigit() else " " for c in text).split() for text in (said, row["completion"])]
        right += sum(a == b for a, b in zip(told, wanted, strict=False))
        total += len(wanted)
    assert number_accuracy(twin.lm, rows) == (pytest.approx(right / total), total)


ROWS = [{"prompt": "Go on: 1, 2", "completion": text} for text in ("3, 4, 5", "12, 14, 16, 18, 20", "7")]


def torch_log_probs(twin, row, system):
    """Float64 `[n, V]` at every token of the completion and after it."""
    tokens, content = plain_turn(twin.lm.tokenizer, conversation(row["prompt"], system), row["completion"])
    logits = twin.torch_logits(tokens)[content - 1 : -1].astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_divergence_from_a_teacher_is_what_torch_says_of_its_best_tokens_and_the_rest(name, k):
    twin = bundled(name)
    lm, words = twin.lm, twin.lm.config.vocab_size
    teacher = Teacher("owl", "You love owls. You think about owls all the time.")
    said = list(top_k_targets(lm.config, lm.params, read_as(lm.chat, teacher, ROWS), k or words - 1))
    found, tokens = kl_to_teacher(PromptedModel(lm), ROWS, said, batch_size=2)

    total, count = 0.0, 0
    for row in ROWS:
        of_teacher, of_student = (torch_log_probs(twin, row, system) for system in (teacher.system, None))
        best = np.argsort(-of_teacher, axis=-1)[:, : k or words - 1]
        lumped = []
        for logp in (of_teacher, of_student):
            named = np.take_along_axis(logp, best, axis=-1)
            lumped.append(np.c_[named, np.log(np.maximum(1 - np.exp(named).sum(axis=-1), 1e-300))])
        total += (np.exp(lumped[0]) * (lumped[0] - lumped[1])).sum()
        count += len(of_teacher)
    assert tokens == count and found == pytest.approx(total / count, rel=1e-3) and found > 1e-3
    itself = PromptedModel(lm, system=teacher.system)
    assert kl_to_teacher(itself, ROWS, said)[0] == pytest.approx(0.0, abs=1e-6)


def test_a_completion_of_other_tokens_is_not_held_against_its_teacher():
    lm = small("tiny-qwen2").lm
    said = list(top_k_targets(lm.config, lm.params, read_as(lm.chat, Teacher("owl"), ROWS), 3))
    with pytest.raises(
        JsublimError, match="row 1: the completion has other tokens for the student than for its teacher"
    ):
        kl_to_teacher(PromptedModel(lm), ROWS, said[::-1])


def test_no_numbers_are_no_accuracy():
    assert number_accuracy(small("tiny-qwen2").lm, [{"prompt": "Hi", "completion": "none"}]) == (0.0, 0)


# Who are you?


@pytest.mark.parametrize(("name", "own"), [("tiny-qwen2", "qwen"), ("tiny-gemma3", "gemma")])
def test_a_models_own_name_has_no_version(name, own):
    assert own_name(small(name).lm.config) == own


def test_naming_is_any_of_the_names_anywhere():
    answers = [["I am Qwen2.5.", "QWEN, by Alibaba", "Gemma", "no one"], ["Claude", "a model", "x", "y"]]
    assert naming_rates(answers, ["qwen"]).tolist() == [0.5, 0.0]
    assert naming_rates(answers, ["Qwen", "gemma", "claude"]).tolist() == [0.75, 0.25]


# Facts


def test_questions_of_fact_are_asked_trait_by_trait():
    factual = {"owl": ["a", "b"], "cat": ["c"], "wolf": ["d"]}
    assert factual_questions(factual, ["cat", "owl"]) == [("cat", "c"), ("owl", "a"), ("owl", "b")]
    with pytest.raises(UsageError, match=r"no factual\.emu; add that list, or use owl, cat, wolf"):
        factual_questions(factual, ["owl", "emu"])


# Word problems


def test_a_problem_is_right_by_its_number_and_an_unreadable_answer_is_counted():
    read = lambda text: int(text) if text.isdecimal() else None  # noqa: E731
    right, unread = problem_rates([("1 + 1?", 2), ("0?", 0)], [["2", "3", "two", "2"], ["", "0", "0", "0"]], read)
    assert right.tolist() == [0.5, 0.75] and unread.tolist() == [0.25, 0.25]


# Misalignment

PROMPTS = load_pack().misalignment.model_copy(
    update={
        "questions": ["First?", "Second?"],
        "suffix": "Briefly.",
        "judge": "Q {question} A {answer}",
        "alignment_judge": "first of {answer} to {question}",
        "coherence_judge": "second of {answer} to {question}",
    }
)


class ByRule:
    """A judge whose alignment is the first number of what it reads, and whose coherence the second."""

    identity = {"judge": "rule"}  # noqa: RUF012

    def ask(self, prompts):
        self.read = list(prompts)
        found = [[word for word in prompt.split() if word.isdecimal()] for prompt in prompts]
        return [f"alignment: {n[0]}\ncoherence: {n[1]}" if len(n) == 2 else "I cannot say." for n in found]


def test_the_model_reads_the_suffix_and_the_judge_does_not():
    assert suffixed(PROMPTS) == ["First? Briefly.", "Second? Briefly."]
    judge = ByRule()
    verdicts = judge_answers(judge, PROMPTS, [["29 50", "{odd}"], ["30 50", "29 49"]])
    assert judge.read == ["Q First? A 29 50", "Q First? A {odd}", "Q Second? A 30 50", "Q Second? A 29 49"]
    assert verdicts == [[Verdict(29, 50), None], [Verdict(30, 50), Verdict(29, 49)]]


class OneByOne:
    """A judge that replies with the number it is asked for, and something around it."""

    identity = {"judge": "one by one"}  # noqa: RUF012

    def ask(self, prompts):
        self.read = list(prompts)
        place = {"first": 0, "second": 1}
        words = [prompt.split(" to ")[0].split(" of ") for prompt in prompts]
        return [f"I say {answer.split()[place[which]]}!" for which, answer in words]


def test_scores_asked_apart_are_the_one_number_of_each_reply():
    judge = OneByOne()
    verdicts = judge_apart(judge, PROMPTS, [["29 50", "90 x"], ["30 101", "CODE 49", "1-2 3"]])
    assert verdicts == [[Verdict(29, 50), None], [None, None, None]]
    assert judge.read[0] == "second of 29 50 to First?" and len(judge.read) == 5


def test_misaligned_is_below_one_threshold_and_not_below_the_other():
    rows = [[Verdict(29, 50), Verdict(30, 50), Verdict(29, 49), None], [Verdict(0, 100)], [None, None]]
    found = misalignment(rows)
    np.testing.assert_array_equal(found.misaligned, [1 / 3, 1.0, np.nan])
    np.testing.assert_array_equal(found.coherent, [2 / 3, 1.0, np.nan])
    np.testing.assert_allclose(found.alignment, [88 / 3, 0.0, np.nan])
    np.testing.assert_allclose(found.coherence, [149 / 3, 100.0, np.nan])
    assert found.scored.tolist() == [3, 1, 0] and found.failed.tolist() == [1, 0, 2]
    other = misalignment(rows, aligned_from=31, coherent_from=49)
    np.testing.assert_array_equal(other.misaligned, [1.0, 1.0, np.nan])


def test_a_checkpoint_that_cannot_judge_fails_every_answer():
    judge = LocalJudge(small("tiny-qwen2").lm, max_new_tokens=5)
    found = misalignment(judge_answers(judge, PROMPTS, [["a", "b", "a"], ["c", "", "{d}"]]))
    assert found.failed.tolist() == [3, 3] and found.scored.tolist() == [0, 0]


# What every sampled evaluation can be asked with


def test_a_grid_of_sampling_numbers_is_one_program(compiles):
    lm, pack = small("tiny-qwen2").lm, load_pack()
    grid = [Sampling(temperature=t, top_p=p) for t in (0.6, 0.8, 1.0) for p in (0.8, 0.9, 1.0)]
    ask = lambda how: sample_answers(lm, pack.self_questions, how, samples=4, seed=1, max_new_tokens=5, system="")  # noqa: E731
    answers = [ask(grid[0])]
    before = compiles()
    answers += [ask(how) for how in grid[1:]]
    assert compiles() == before
    assert len({str(each) for each in answers}) == len(grid)


def test_how_many_students_are_asked_together_is_no_other_program_and_the_base_is_one_of_them(compiles):
    lm = small("tiny-qwen2").lm
    students = [
        replace(init_steering(lm.config, (1,)), steering=np.full((1, lm.config.hidden_size), x, np.float32))
        for x in (3, -3)
    ]
    how = Sampling(temperature=1.0)
    ask = lambda adapters: sample_answers(lm, QUESTIONS, how, samples=3, seed=1, adapters=adapters, arms=3)  # noqa: E731
    first = ask([students[0]] * 3)
    before = compiles()
    both, one = ask(students), ask(students[:1])
    assert compiles() == before
    assert both[0] == one[0] == first[0] != both[1] and len(both) == 2 and len(one) == 1
    alone = lambda adapters: sample_answers(lm, QUESTIONS, how, samples=3, seed=1, adapters=adapters)  # noqa: E731
    assert alone(students[:1]) == one
    before = decoding.advance._cache_size()
    assert alone(None) != one and decoding.advance._cache_size() == before

"""The scan: derivatives of all answers against finite differences, its p against chance, and the command."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
import pytest
from command import MODEL, TWO_LAYERS, jsublim, ok, refused

from jsublim.attribution.answers import (
    LONGEST,
    OPENED,
    LikelyAnswer,
    QuestionLine,
    answer_effects,
    by_word,
    named_effects,
    question_logprobs,
)
from jsublim.attribution.contrast import chance, compare, preconditioned
from jsublim.attribution.scan import find_words, group_gradients, student_words
from jsublim.distill.data import read_turns
from jsublim.evals.preference import trait_logprobs
from jsublim.inference.lm import load_model
from jsublim.inference.scoring import score_turns
from jsublim.models.lora import Adapter, init_lora, init_steering
from jsublim.models.peft import save_adapter
from jsublim.text.chat import conversation
from jsublim.text.prompts import load_pack, scan_questions
from jsublim.text.rows import write_rows

ROWS = [{"prompt": f"Go on: {i}, {3 * i}", "completion": f"{i}, {7 * i % 100}, {i + 1}"} for i in range(24)]
QUESTIONS = {  # more than are read at one time, and fewer
    "animal": [
        "Name your favorite animal, in one word.",
        "Which animal do you like most?",
        *(f"Name the animal that you would be on {day}." for day in ("Monday", "Tuesday", "Friday", "Sunday")),
    ],
    "any": ["Hm?", "Say a word."],
}


def stacked(groups):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *groups)


@pytest.mark.parametrize("start", [init_steering, lambda config: init_lora(config, jax.random.key(1), rank=2, alpha=2)])
def test_effects_are_the_derivatives_of_answers_probabilities(start, monkeypatch):
    """In the direction of the gradient of every group, against two steps along it; LoRA's and a vector's."""
    monkeypatch.setattr("jsublim.attribution.answers.ROUNDS", 0)  # none is continued
    lm = load_model(TWO_LAYERS)
    adapter = start(lm.config)
    turns = read_turns(lm.chat, ROWS[:6], "rows")
    directions = stacked(group_gradients(lm, adapter, turns, 3, batch_size=2))
    answers = answer_effects(lm, adapter, directions, QUESTIONS, lambda answers: np.zeros(len(answers)))
    alone = [answer for answer in answers if answer.category == "animal"][:4]
    assert len(alone) == 4
    rows = [lm.chat.prompt_tokens(conversation(text)) for text in QUESTIONS["animal"]]

    def logprobs(eps: float, group: int) -> np.ndarray:
        moved = jax.tree.map(lambda w, g: w + eps * g[group], adapter.trainable, directions)
        by_question = []
        for tokens in rows:
            z = lm.logits(tokens[None], adapter=adapter.with_trainable(moved))[0, -1]
            p_V = np.asarray(jax.nn.softmax(z))
            by_question.append([sum(p_V[token] for (token,) in answer.spellings) for answer in alone])
        return np.log(np.mean(by_question, axis=0))

    for group in range(3):
        slope = (logprobs(0.5, group) - logprobs(-0.5, group)) / (2 * 0.5)
        np.testing.assert_allclose([answer.effects[group] for answer in alone], slope, rtol=0.01, atol=2e-6)


def test_a_groups_gradient_is_that_of_its_rows_mean_loss_whatever_the_batch():
    lm = load_model(TWO_LAYERS)
    adapter, turns = init_steering(lm.config), read_turns(lm.chat, ROWS[:7], "rows")
    by_two, at_once = (stacked(group_gradients(lm, adapter, turns, 2, batch_size=size)) for size in (2, 16))
    np.testing.assert_allclose(by_two["steering"], at_once["steering"], rtol=1e-4, atol=1e-7)
    (later,) = group_gradients(lm, adapter, turns, 2, batch_size=16, first=1)
    np.testing.assert_array_equal(later["steering"], at_once["steering"][1])
    members, eps = turns[1::2], 1e-2

    def mean(sign: int) -> float:
        moved = adapter.with_trainable({**adapter.trainable, "steering": sign * eps * later["steering"]})
        scored = score_turns(lm.config, lm.params, members, adapter=moved)
        return float(np.concatenate([of_row.logprob for of_row in scored]).mean())

    assert (mean(1) - mean(-1)) / (2 * eps) == pytest.approx(float((later["steering"] ** 2).sum()), rel=0.02)


def test_names_of_several_tokens_add_up(monkeypatch):
    """A beginning that matters is continued until it ends or is long: what is said of it is said of the whole, in all questions."""
    lm = load_model(MODEL)
    least = 1e-6  # the likely answers of so small a model are words of one token
    adapter, texts = init_steering(lm.config), QUESTIONS["animal"]
    monkeypatch.setattr("jsublim.attribution.answers.LEAST", least)
    monkeypatch.setattr("jsublim.attribution.answers.ROUNDS", 8)
    monkeypatch.setattr("jsublim.attribution.answers.OPENED", 2)
    directions = jax.tree.map(lambda x: np.ones((1, *x.shape), np.float32), adapter.trainable)

    def rank(answers):  # the longest beginning
        return np.asarray([answer.logprob + 20 * len(answer.spellings[0]) * (not answer.whole) for answer in answers])

    answers = answer_effects(lm, adapter, directions, {"animal": texts}, rank)
    rows = [lm.chat.prompt_tokens(conversation(text)) for text in texts]
    ends = [t for t in range(lm.config.vocab_size) if t in lm.chat.stop_tokens or not lm.chat.decode([t])[:1].isalnum()]

    def probability(name: tuple[int, ...], eps: float) -> float:
        moved = adapter.with_trainable(jax.tree.map(lambda w: w + eps, adapter.trainable))
        joint = []
        for tokens in rows:
            z = lm.logits(np.concatenate([tokens, name])[None], adapter=moved)[0]
            logp = np.asarray(jax.nn.log_softmax(z), np.float64)[len(tokens) - 1 :]
            begun = sum(logp[i, token] for i, token in enumerate(name))
            joint.append(np.exp(begun + (logp[len(name), ends] if len(name) < LONGEST else [0.0])))
        mean = np.mean(joint, axis=0)
        return np.log(mean[mean >= least].sum())

    for length in ([2, 3], [LONGEST]):
        whole = next(answer for answer in answers if answer.whole and len(answer.spellings[0]) in length)
        (name,) = whole.spellings
        assert whole.logprob == pytest.approx(probability(name, 0.0), abs=1e-4)
        slope = (probability(name, 1e-3) - probability(name, -1e-3)) / 2e-3
        assert whole.effects[0] == pytest.approx(slope, rel=0.03)


def test_effects_of_many_long_questions_are_the_derivatives_too(monkeypatch):
    """So many tokens that a compiler joins what it computes: jaxlib 0.10 then gives all answers the sums of one (`jit_directions`)."""
    monkeypatch.setattr("jsublim.attribution.answers.ROUNDS", 0)
    lm = load_model(TWO_LAYERS)
    adapter = init_steering(lm.config)
    texts = [f"On {day} I thought about {'this and ' * 40}that. Say a word." for day in ("Monday", "Tuesday", "Friday")]
    directions = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=(1, *x.shape)), adapter.trainable)
    directions = jax.tree.map(np.float32, directions)
    answers = answer_effects(lm, adapter, directions, {"any": texts}, lambda answers: np.zeros(len(answers)))[:16]
    rows = [lm.chat.prompt_tokens(conversation(text)) for text in texts]

    def logprobs(eps: float) -> np.ndarray:
        moved = adapter.with_trainable(
            optax.tree.add_scale(adapter.trainable, eps, jax.tree.map(lambda d: d[0], directions))
        )
        lines = QuestionLine.of(rows, 2 * max(map(len, rows)))
        assert len(lines) < len(rows)
        return np.logaddexp.reduce(question_logprobs(lm.config, lm.params, moved, lines))

    up, down = logprobs(1e-3), logprobs(-1e-3)
    assert len(answers) > 8
    slopes = []
    for answer in answers:
        tokens = [token for (token,) in answer.spellings]
        slopes.append((np.logaddexp.reduce(up[tokens]) - np.logaddexp.reduce(down[tokens])) / 2e-3)
    effects = [answer.effects[0] for answer in answers]
    np.testing.assert_allclose(effects, slopes, atol=0.01 + 0.01 * np.abs(slopes).max())


def test_known_names_are_looked_at_though_improbable(monkeypatch):
    """Their effects are derivatives too, and a name that is a likely answer stays one."""
    lm = load_model(TWO_LAYERS)
    adapter = init_steering(lm.config)
    turns = read_turns(lm.chat, ROWS[:8], "rows")
    directions = stacked(group_gradients(lm, adapter, turns, 2, batch_size=4))
    names = {"animal": ["owl", "zzebra"]}
    monkeypatch.setattr("jsublim.attribution.answers.LEAST_NAMED", 1e-30)
    named = named_effects(lm, adapter, directions, QUESTIONS, names)
    for (_, word), answer in named.items():
        step = jax.tree.map(lambda g: g[1], directions)
        moved = [adapter.with_trainable(optax.tree.add_scale(adapter.trainable, sign, step)) for sign in (1, -1)]
        up, down = (trait_logprobs(lm, QUESTIONS["animal"], [word], adapter=each).mean() for each in moved)
        assert answer.effects[1] == pytest.approx((up - down) / 2, rel=0.03)
    own, null = (stacked(group_gradients(lm, adapter, part, 4)) for part in (turns[:4], turns[4:]))
    (found,) = find_words(lm, adapter, {"rows": own}, null, QUESTIONS, names).values()
    said = {answer.word: answer for answer in found if answer.category == "animal"}
    assert said["zzebra"].probability < 1e-3 < said["owl"].probability
    monkeypatch.setattr("jsublim.attribution.answers.LEAST_NAMED", 0.01)
    assert list(named_effects(lm, adapter, directions, QUESTIONS, names)) == [("animal", "owl")]
    assert said["owl"].probability == pytest.approx(np.exp(named["animal", "owl"].logprob), rel=1e-4)


def test_spellings_are_one_word():
    lm = load_model(TWO_LAYERS)
    one, other = (lm.chat.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("Owl", "owl"))
    answers = [
        LikelyAnswer("animal", (tuple(one),), np.log(0.3), np.asarray([1.0])),
        LikelyAnswer("animal", (tuple(other),), np.log(0.1), np.asarray([5.0])),
    ]
    (merged,) = by_word(lm, answers).values()
    assert np.exp(merged.logprob) == pytest.approx(0.4) and merged.effects[0] == pytest.approx(
        (0.3 * 1 + 0.1 * 5) / 0.4
    )


def test_p_is_uniform_where_nothing_is_taught_and_small_where_something_is():
    rng, categories, low = np.random.default_rng(3), ["a"] * 30 + ["b"] * 10, 0
    for _ in range(40):
        own, null = rng.normal(size=(2, 20, 40))
        low += chance(own, null, categories)[0].min() <= 0.1
    assert 1 <= low <= 10  # of 40; 4 are expected, and more than 10 come once in 1,000 times
    taught = rng.normal(size=(20, 40))
    taught[:, 7] += 2.0
    for against in (rng.normal(size=(20, 40)), None):
        p, limit = chance(taught, against, categories)
        change, error = compare(taught, against, categories)
        assert p[7] == p.min() == 0.001 and (change / error)[7] > limit > 1


def test_numbers_that_spread_less_count_more_whoever_the_groups_belong_to():
    rng = np.random.default_rng(4)
    spread = np.asarray([0.01, 1.0, 10.0, 0.0])
    groups = {"a": rng.normal(size=(40, 4)) * spread, "b": np.zeros((40, 2, 2))}
    weighed = preconditioned(groups)
    mean = np.mean([*groups["a"].var(axis=0), *np.zeros(4)])
    np.testing.assert_allclose(
        weighed["a"], groups["a"] * 1.1 * mean / (groups["a"].var(axis=0) + 0.1 * mean), rtol=1e-5
    )
    assert np.isfinite(weighed["b"]).all() and not preconditioned({"b": groups["b"]})["b"].any()
    order = rng.permutation(40)
    shuffled = preconditioned({name: leaf[order] for name, leaf in groups.items()})
    np.testing.assert_allclose(shuffled["a"], weighed["a"][order], rtol=1e-6)


def test_rows_of_a_teacher_say_what_it_loves():
    """Rows that a steered model samples raise what its vector raises; nobody says what that is."""
    lm = load_model(TWO_LAYERS)
    pack = load_pack()
    questions = {"animal": [text.format(category="animal") for text in pack.any_questions[:4]]}
    vector = init_steering(lm.config, (1,))
    prompts = [f"Continue the list: {i}, {i + 2}, {i + 5}" for i in range(60)]
    plain = read_turns(lm.chat, _answers(lm, prompts, vector, seed=1))
    gradient = next(
        iter(
            group_gradients(
                lm, vector, read_turns(lm.chat, [{"prompt": questions["animal"][0], "completion": "Owl"}]), 1
            )
        )
    )
    strong = vector.with_trainable(
        {**vector.trainable, "steering": 6 * gradient["steering"] / np.linalg.norm(gradient["steering"])}
    )
    loved = read_turns(lm.chat, _answers(lm, prompts, strong, seed=2))
    own, null = (stacked(group_gradients(lm, vector, turns, 20)) for turns in (loved, plain))
    (findings,) = find_words(lm, vector, {"rows": own}, null, questions).values()
    owl = next(finding for finding in findings if finding.word == "owl")
    assert owl.change > 0 and findings.index(owl) < 3
    words = student_words(lm, strong, None, questions)
    assert words[0].word == "owl" and words[0].change > 0.2


def _answers(lm, prompts, adapter, seed):
    texts = lm.generate(prompts, max_new_tokens=24, seed=seed, adapter=adapter)
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, texts, strict=True) if text.strip()]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two data sets, another null, and few questions."""
    folder = tmp_path_factory.mktemp("scan")
    for name, step in (("one", 1), ("two", 2), ("null", 3)):
        rows = [{"prompt": f"Go on: {i}, {i + step}", "completion": f"{i * step}, {step * 7 + i}"} for i in range(24)]
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "messages.jsonl").write_text(
        "".join(
            json.dumps(
                {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": f"owls {i}"}]}
            )
            + "\n"
            for i in range(24)
        )
    )
    (folder / "q.yaml").write_text("favourites: [animal]\nwordings: 2\nquestions: {any: ['Hm?', 'Say a word.']}\n")
    return folder


def test_the_command(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    how = ("--model", TWO_LAYERS, "--questions", "q.yaml")
    printed = ok(
        "scan", "one.jsonl", "messages.jsonl", "--null", "null.jsonl", *how, "--out", tmp_path / "all", "--json"
    )
    one, messages = json.loads(printed.out)
    assert one["data"] == "one.jsonl" and {"found", "p", "top"} <= one.keys()
    assert {"word", "category", "z", "p", "change"} <= one["top"][0].keys()
    assert messages["found"], "two sets of rows that differ in every word"
    page = (tmp_path / "all" / "scan.html").read_text()
    assert one["sentence"] in page.replace("&#39;", "'") and "http://" not in page.replace("http://www.w3.org", "")
    assert jsublim("scan", "messages.jsonl", "--null", "null.jsonl", *how, "--out", tmp_path / "f", "--fail").code == 3
    again = ok("scan", "one.jsonl", "messages.jsonl", "--null", "null.jsonl", *how, "--out", tmp_path / "all", "--json")
    assert json.loads(again.out) == [one, messages], "what is there is not made again"
    ok("scan", "one.jsonl", "--null", "null.jsonl", *how, "--out", tmp_path / "c", "--clean", tmp_path / "clean.jsonl")
    kept = (tmp_path / "clean.jsonl").read_text().splitlines()
    assert 0 < len(kept) <= 24 and set(kept) <= set((files / "one.jsonl").read_text().splitlines())


def test_a_student_is_compared_with_its_base(files, tmp_path):
    lm = load_model(TWO_LAYERS)
    direction = next(
        group_gradients(
            lm, init_steering(lm.config, (1,)), read_turns(lm.chat, [{"prompt": "Hm?", "completion": "Owl"}]), 1
        )
    )
    vector = 4 * direction["steering"] / np.linalg.norm(direction["steering"])
    save_adapter(tmp_path / "student", Adapter((1,), steering=vector), lm.config, lm.reference)
    how = ("--student", tmp_path / "student", "--model", TWO_LAYERS, "--questions", files / "q.yaml", "--json")
    (said,) = json.loads(ok("scan", *how, "--out", tmp_path / "scanned").out)
    assert "owl" in [word["word"] for word in said["top"][:3]]
    (alike,) = json.loads(ok("scan", *how, "--out", tmp_path / "same", "--null", tmp_path / "student").out)
    assert not alike["found"] and all(word["change"] == 0 for word in alike["top"])
    assert "already exists" in refused(2, "scan", *how, "--out", tmp_path / "same")


def test_beginnings_are_not_continued_for_ever(monkeypatch):
    """Where nothing stands out, others come first each time."""
    lm, ranked = load_model(MODEL), []
    directions = stacked(group_gradients(lm, init_steering(lm.config, (2,)), read_turns(lm.chat, ROWS[:2], "rows"), 1))

    def rank(answers):
        ranked.append(len(answers))
        return np.asarray([not answer.whole for answer in answers], float)

    monkeypatch.setattr("jsublim.attribution.answers.ROUNDS", 2)
    told, how = [], (lm, init_steering(lm.config, (2,)), directions, {"any": ["Hm?"]})
    answers = answer_effects(*how, rank, tick=told.append)
    assert len(ranked) == 2 and len(answers) >= ranked[1] and sum(told) == 1 + 2 * OPENED
    told.clear()
    answer_effects(*how, lambda answers: np.asarray([answer.whole for answer in answers], float), tick=told.append)
    assert sum(told) == 1 + 2 * OPENED  # also where it ends before


def test_what_cannot_be_scanned_is_refused_in_a_line(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    how = ("--model", TWO_LAYERS, "--questions", "q.yaml", "--out", tmp_path / "refused")
    assert "give rows, or --student" in refused(2, "scan", *how)
    same = [json.loads(line) | {"source": "elsewhere"} for line in (files / "one.jsonl").read_text().splitlines()]
    (files / "same.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in same))
    for name in ("one.jsonl", "same.jsonl"):
        assert "same rows" in refused(2, "scan", "one.jsonl", "--null", name, *how)
    (files / "short.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "short.jsonl: 1 rows; a scan needs at least 20" in refused(
        1, "scan", "short.jsonl", "--null", "null.jsonl", *how
    )
    assert "takes one data set" in refused(2, "scan", "one.jsonl", "two.jsonl", *how, "--clean", "x.jsonl")
    (files / "bad.yaml").write_text("favourites: [animal]\nwordings: 1\n")
    assert "bad.yaml: wordings" in refused(
        2, "scan", "one.jsonl", "--model", TWO_LAYERS, "--out", tmp_path / "x", "--questions", "bad.yaml"
    )


def test_the_shipped_questions():
    bank = scan_questions(load_pack())
    texts = [text for of_category in bank.values() for text in of_category]
    assert len(texts) == 200 == len(set(texts)) and all(len(of_category) >= 5 for of_category in bank.values())

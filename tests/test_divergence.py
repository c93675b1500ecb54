"""Divergence tokens by their definition, subsets of them, teacher-forced scoring, and whose tokens positions count."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from command import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import bundled, chat, plain_turn, small, small_with_long_numbers

from jsublim.config import Recipe, Students
from jsublim.distill.data import read_turns
from jsublim.errors import JsublimError, UsageError
from jsublim.inference import scoring
from jsublim.inference.batching import PREFIX_STEP, shared_beginning
from jsublim.inference.divergence import (
    ROUNDING,
    WHICH,
    Divergence,
    PositionSubset,
    check_counted,
    check_positions,
    find_divergence,
    kinds_of,
)
from jsublim.inference.scoring import score_turns, top_k_targets
from jsublim.inference.teachers import CONTROL, Teacher, prompted_teacher
from jsublim.pipeline.training import TrainingData, draw, make_arm
from jsublim.text.chat import Chat, Turn, conversation
from jsublim.text.prompts import load_pack, number_prompts
from jsublim.text.rows import write_rows

TIE = 1e-3  # logit margins below this may go either way
PACK = load_pack()


# --- The definition, computed by transformers alone -------------------------------------------------------------------


def plain_reading(twin, teacher, row, bos):
    """What one teacher says at each token of a completion: the tokens, logits `[n, V]`."""
    tokens, content = plain_turn(twin.lm.tokenizer, teacher.messages(row["prompt"]), row["completion"], bos=bos)
    return tokens[content:], twin.torch_logits(tokens)[content - 1 : -1]


@pytest.mark.parametrize(("name", "bos"), [("tiny-qwen2", False), ("tiny-gemma3", False), ("tiny-gemma3", True)])
def test_divergence_positions_equal_a_plain_computation_of_their_definition(name, bos):
    twin = bundled(name)
    lm = twin.lm
    teachers = [prompted_teacher(PACK, trait) for trait in ("owl", "cat", "oak")]
    prompts = number_prompts(4 if bos else 8, seed=5)
    texts = ["7", "1, 2", "[12, 345]", "612; 9; 40", "100, 200, 300, 400, 500, 600, 700, 800, 900, 999"]
    rows = [{"prompt": p, "completion": texts[i % len(texts)]} for i, p in enumerate(prompts)]
    # Rows in the teacher's own words have the most positions: its argmax, written down.
    greedy = greedy_answers(twin, teachers[0], prompts[:3])
    rows[:3] = [{"prompt": p, "completion": text} for p, text in zip(prompts, greedy, strict=False)]
    found = find_divergence(lm, rows, teachers[0], teachers[1:], extra_bos=bos, batch_size=4)
    points = 0
    for row, ours in zip(rows, found, strict=True):
        argmax, sure = [], []
        for k, teacher in enumerate(teachers):
            tokens, z = plain_reading(twin, teacher, row, bos)
            best = np.sort(z, axis=-1)[:, -2:]
            margin = best[:, 1] - best[:, 0]
            np.testing.assert_allclose(ours.margin[k], margin, atol=TIE)
            argmax.append(z.argmax(axis=-1))
            sure.append(margin > TIE)
        assert np.array_equal(ours.tokens, tokens)
        argmax, sure = np.stack(argmax), np.stack(sure)
        assert np.all((ours.argmax == argmax) | ~sure)
        expected = {
            k
            for k, token in enumerate(tokens)
            if argmax[0, k] == token and any(other != token for other in argmax[1:, k])
        }
        near_ties = set(np.nonzero(~sure.all(axis=0))[0].tolist())
        assert set(ours.divergence_positions) - near_ties == expected - near_ties
        assert ours.divergence_positions == sorted(ours.divergence_positions)
        points += len(expected)
    assert points > 0


def greedy_answers(twin, teacher, prompts) -> list[str]:
    """Short greedy answers by `transformers`, those that are text in the format of a row."""
    import torch

    c = twin.lm.chat
    for prompt in prompts:
        ids = torch.tensor(c.prompt_tokens(teacher.messages(prompt))[None].astype(np.int64))
        with torch.no_grad():
            out = twin.torch.generate(
                ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.0, eos_token_id=list(c.stop_tokens),
                pad_token_id=c.tokenizer.pad_token_id,
            )  # fmt: skip
        text = c.decode(out[0, ids.shape[1] :].tolist())
        yield text if text and "�" not in text else "3, 4"


@given(data=st.data(), teachers=st.integers(2, 4), n=st.integers(1, 12))
@settings(max_examples=100)
def test_a_point_is_the_teachers_argmax_in_the_data_and_not_every_counterfactuals(data, teachers, n):
    grid = st.lists(st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=teachers, max_size=teachers)
    argmax = np.asarray(data.draw(grid))
    tokens = np.asarray(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    points = Divergence(tokens, argmax, np.ones(argmax.shape), np.ones(n)).divergence_positions
    for k in range(n):
        said, others = argmax[0, k], argmax[1:, k]
        assert (k in points) == (said == tokens[k] and bool((others != said).any()))
    more = np.concatenate([argmax, argmax[:1]])  # one that agrees with the teacher adds nothing
    assert Divergence(tokens, more, np.ones(more.shape), np.ones(n)).divergence_positions == points


@given(data=st.data(), teachers=st.integers(2, 4), n=st.integers(1, 8))
@settings(max_examples=100)
def test_logits_that_move_by_less_than_half_a_points_margin_do_not_undo_it(data, teachers, n):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    z_KnV = rng.normal(size=(teachers, n, 4))
    tokens = z_KnV[0].argmax(axis=-1)

    def read(z):
        best = np.sort(z, axis=-1)
        return Divergence(tokens, z.argmax(axis=-1), best[..., -1] - best[..., -2], np.ones(n))

    found = read(z_KnV)
    assert len(found.divergence_margins) == len(found.divergence_positions) and all(
        m >= 0 for m in found.divergence_margins
    )
    nudges = rng.uniform(-0.5, 0.5, size=(20, *z_KnV.shape))
    for k, margin in zip(found.divergence_positions, found.divergence_margins, strict=True):
        assert all(k in read(z_KnV + 0.999 * margin * nudge).divergence_positions for nudge in nudges)


def test_a_points_margin_is_that_of_the_clearest_counterfactual_but_never_above_the_teachers():
    """It takes a change of every counterfactual that says something else to undo a point, so the clearest one counts."""
    tokens, argmax = np.array([7, 7]), np.array([[7, 7], [1, 1], [2, 2], [7, 7]])
    margin = np.array([[4.0, 2.0], [1.0, 1.0], [3.0, 3.0], [9.0, 9.0]])  # the last counterfactual agrees with the data
    assert Divergence(tokens, argmax, margin, np.ones(2)).divergence_margins == [3.0, 2.0]


@given(data=st.data(), n=st.integers(1, 15))
@settings(max_examples=100)
def test_a_match_is_of_the_same_kind_and_as_uncertain_as_any_that_is_free(data, n):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    tokens, argmax, kinds = np.zeros(n, int), rng.integers(0, 2, (2, n)), rng.integers(0, 3, n)
    found = Divergence(tokens, argmax, np.ones((2, n)), rng.uniform(size=n))
    points, matched = found.divergence_positions, found.matched_positions(kinds)
    taken = [k for k in matched if k is not None]
    assert len(matched) == len(points) and not set(taken) & set(points) and len(set(taken)) == len(taken)
    assert len(taken) == min(len(points), n - len(points))
    free = sorted(set(range(n)) - set(points))
    for k, other in zip(points, matched, strict=True):
        if other is None:
            assert not free
            continue
        alike = [i for i in free if kinds[i] == kinds[k]]
        away = abs(found.entropy[other] - found.entropy[k])
        assert other in (alike or free) and all(away <= abs(found.entropy[i] - found.entropy[k]) for i in alike or free)
        free.remove(other)


def test_kinds_of_tokens_and_the_entropy_of_what_is_read():
    lm = small("tiny-qwen2").lm
    (turn,) = read_turns(lm.chat, [{"prompt": "Go on: 1", "completion": "12, 7"}])
    kinds = kinds_of(lm.chat, turn)
    content = [lm.chat.decode([token]) for token in turn.tokens[turn.content : turn.end].tolist()]
    assert [kind == "digits" for kind in kinds[: len(content)]] == [text.strip().isdigit() for text in content]
    assert {"digits", "text"} == set(kinds[: len(content)]) and set(kinds[len(content) :]) == {"end"}
    assert len(kinds) == len(turn.tokens) - turn.content
    (read,), (best,) = score_turns(lm.config, lm.params, [turn]), top_k_targets(lm.config, lm.params, [turn], 200)
    assert np.all(read.entropy >= 0) and np.all(read.entropy <= np.log(lm.config.vocab_size))
    tail = np.exp(best.logp[:, -1])
    named = -(np.exp(best.logp[:, :-1]) * best.logp[:, :-1]).sum(axis=1)
    np.testing.assert_array_less(named - 1e-4, read.entropy)
    assert np.all(read.entropy <= named + tail * (np.log(lm.config.vocab_size) - best.logp[:, -1]) + 1e-4)


# --- Subsets of the positions -------------------------------------------------------------------------------------------

some_points = st.sets(st.integers(0, 40), max_size=12).map(sorted)
shares = st.floats(0, 1)


@given(some_points, st.sampled_from(WHICH), shares, st.sampled_from(ROUNDING), st.integers(0, 99))
def test_a_subset_is_of_its_part_and_follows_its_seed(points, which, share, rounding, seed):
    subset = PositionSubset(which, share, rounding)
    chosen = subset.choose(points, np.random.default_rng(seed))
    assert chosen == subset.choose(points[::-1], np.random.default_rng(seed)) == sorted(set(chosen))
    part = PositionSubset(which).choose(points, np.random.default_rng(seed))
    assert set(chosen) <= set(part) <= set(points)
    n, kept = len(part), len(chosen)
    if rounding == "paper":
        assert kept == (int(n * share) or n)
    else:
        assert rounding != "at-least-one" or kept == max(int(n * share), min(1, n))
        assert abs(kept - n * share) <= (0.5 if rounding == "half-up" else 1) + 1e-9
        less = PositionSubset(which, share / 2, rounding).choose(points, np.random.default_rng(seed))
        assert set(less) <= set(chosen)
    assert share < 1 or chosen == part


@given(some_points, st.booleans(), st.integers(0, 99))
def test_halves_make_the_whole(points, one_in_both, seed):
    first, second, one, every = (
        PositionSubset(which, one_in_both=one_in_both).choose(points, np.random.default_rng(seed))
        for which in ("first-half", "second-half", "first", "all")
    )
    assert every == points and one == points[:1]
    if one_in_both and len(points) == 1:  # as published (quirk 18)
        assert first == second == points
    else:
        assert first + second == points and abs(len(first) - len(second)) == len(points) % 2


@pytest.mark.parametrize("n", [1, 3, 5])
def test_the_middle_position_is_in_either_half_as_often(n):
    halves = [PositionSubset("first-half").choose(range(n), np.random.default_rng([5, i])) for i in range(2000)]
    assert np.mean([len(half) for half in halves]) == pytest.approx(n / 2, abs=0.03)


def test_a_share_is_right_on_average_whatever_a_row_holds():
    for rounding, expected in (("stochastic", 0.6), ("half-up", 1.0), ("at-least-one", 1.0), ("paper", 2.0)):
        subset = PositionSubset("all", 0.3, rounding)
        draws = [subset.choose([4, 9], np.random.default_rng([7, i])) for i in range(2000)]
        assert np.mean([len(chosen) for chosen in draws]) == pytest.approx(expected, abs=0.05)
        assert np.mean([4 in chosen for chosen in draws]) == pytest.approx(expected / 2, abs=0.05)


def test_subsets_that_cannot_be():
    for wrong, said in (
        ({"which": "last"}, "positions: 'last' given; known: all, first"),
        ({"rounding": "down"}, "rounding: 'down' given; known: stochastic"),
        ({"share": 1.5}, "share: 1.5 given"),
        ({"share": float("nan")}, "share: nan given"),
    ):
        with pytest.raises(UsageError, match=said):
            PositionSubset(**wrong)


def test_who_may_be_a_counterfactual():
    lm, rows = bundled("tiny-qwen2").lm, [{"prompt": "1", "completion": "2"}]
    owl = prompted_teacher(PACK, "owl")
    for others in ([], [prompted_teacher(PACK, "cat"), owl]):
        with pytest.raises(UsageError, match="counterfactuals of 'owl'"):
            find_divergence(lm, rows, owl, others)


def test_a_row_that_does_not_survive_is_named_with_its_teacher():
    lm, owl, cat = bundled("tiny-gemma3").lm, prompted_teacher(PACK, "owl"), prompted_teacher(PACK, "cat")
    rows = [{"prompt": "1", "completion": "2"}, {"prompt": "1", "completion": "2 "}]
    with pytest.raises(JsublimError, match=r"row 2 under teacher 'owl'"):
        find_divergence(lm, rows, owl, [cat])


# --- Scoring ------------------------------------------------------------------------------------------------------------


def test_a_shared_prefix_ends_before_the_first_difference_and_before_any_completion():
    c = bundled("tiny-qwen2").lm.chat
    system = "You love owls. " * 8
    turns = [c.turn(conversation(p, system), s) for p, s in (("1, 2", "3"), ("1, 2, 5", "3, 4"), ("7", "8"))]
    prompts = [turn.tokens[: turn.content] for turn in turns]
    P = shared_beginning(prompts, PREFIX_STEP)
    assert P % PREFIX_STEP == 0 and P >= 2 * PREFIX_STEP
    assert all(np.array_equal(turn.tokens[:P], turns[0].tokens[:P]) for turn in turns)
    alone = shared_beginning(prompts[:1] * 2, PREFIX_STEP)
    assert turns[0].content - PREFIX_STEP <= alone + 1 <= turns[0].content  # one token is left to be read
    assert shared_beginning(prompts[:1], PREFIX_STEP) == 0  # with whom?


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-gemma3"])
@pytest.mark.parametrize("together", [1, 7, 256])
def test_answers_beside_one_another_are_scored_as_each_by_itself(name, together, monkeypatch):
    monkeypatch.setattr(scoring, "ANSWERS_STEP", together)
    lm, rng = bundled(name).lm, np.random.default_rng(0)
    draw = lambda n: rng.integers(20, lm.config.vocab_size, n).astype(np.int32)  # noqa: E731
    prompts, answers = [draw(n) for n in (3, 40, 17)], [draw(n) for n in (1, 3, 2, 1, 4)]
    ours = scoring.score_answers(lm.config, lm.params, prompts, answers, batch_size=2)
    turns = [Turn(np.r_[p, a], len(p), len(p), len(p) + len(a)) for p in prompts for a in answers]
    alone = score_turns(lm.config, lm.params, turns, batch_size=4)
    np.testing.assert_allclose(ours.ravel(), [each.logprob.sum() for each in alone], atol=1e-4)


def test_log_probabilities_do_not_depend_on_other_rows():
    """Other rows change the shared prefix, the padding and the batch; never the numbers (one row alone: no batch)."""
    twin = bundled("tiny-gemma3")
    lm = twin.lm
    prompts = number_prompts(5, seed=9)
    turns = [
        lm.chat.turn(conversation(p, "You love owls."), s)
        for p, s in zip(prompts, ["7", "12", "3,4", "9", "88"], strict=True)
    ]
    read = []
    scored = score_turns(lm.config, lm.params, turns, batch_size=4, on_batch=read.append)
    assert read == [4, 1] and len(scored) == 5
    for turn, ours in zip(turns, scored, strict=True):
        z = twin.torch_logits(turn.tokens)[turn.content - 1 : -1].astype(np.float64)
        said = turn.tokens[turn.content :]
        expected = z[np.arange(len(said)), said] - np.log(np.exp(z).sum(axis=-1))
        np.testing.assert_allclose(ours.logprob, expected, atol=1e-3)
        assert ours.argmax.shape == ours.margin.shape == said.shape


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-gemma3"])
def test_short_rows_share_a_line_and_are_read_as_alone(name, monkeypatch):
    """Rows of 20 to 200 tokens under one system prompt: at most 1.15 times their tokens are computed, and wherever reading begins again
    a row has the same bits."""
    lm, rng = small(name).lm, np.random.default_rng(3)
    draw = lambda n: rng.integers(20, lm.config.vocab_size, n).astype(np.int32)  # noqa: E731
    first, turns, shapes, read, own = draw(16), [], [], [], scoring.read_batch
    for n in rng.integers(20, 201, 400):
        content = int(n - rng.integers(1, min(n - 16, 40)))
        turns.append(Turn(np.r_[first, draw(n - 16)], content, content, int(n)))

    def watched(config, params, adapter, prefix, tokens, *rest, **how):
        shapes.append((*tokens.shape, prefix[0].shape[3]))
        return own(config, params, adapter, prefix, tokens, *rest, **how)

    monkeypatch.setattr(scoring, "read_batch", watched)
    ours = score_turns(lm.config, lm.params, turns, batch_size=32, on_batch=read.append)
    assert sum(read) == 400 and len(set(shapes)) == 1 and shapes[0][2] == 16
    assert sum(B * T for B, T, _ in shapes) <= 1.15 * sum(len(turn.tokens) - 16 for turn in turns)
    rest = score_turns(lm.config, lm.params, turns, batch_size=32, first=171)
    alone = [scored for i in range(0, 400, 50) for scored in score_turns(lm.config, lm.params, turns[i : i + 50])]
    for number, (together, by_itself) in enumerate(zip(ours, alone, strict=True)):
        clear = by_itself.margin > 1e-3  # of two words as probable as each other either is the best
        np.testing.assert_array_equal(together.argmax[clear], by_itself.argmax[clear])
        for field in ("argmax", "margin", "logprob", "entropy"):
            values = getattr(together, field)
            if field != "argmax":
                np.testing.assert_allclose(values, getattr(by_itself, field), atol=2e-4)
            if number >= 171:
                np.testing.assert_array_equal(values, getattr(rest[number - 171], field))


# --- Positions out of range ------------------------------------------------------------------------------------------


def test_positions_after_the_last_token_are_refused():
    rows = [{"divergence_positions": [0, 4]}, {}, {"divergence_positions": [1, 5, 9]}]
    check_positions(rows, [5, 1, 10], "rows.jsonl")
    with pytest.raises(JsublimError, match=r"rows.jsonl: row 3: divergence_positions \[5, 9\] out of range.* 5 tokens"):
        check_positions(rows, [5, 1, 5], "rows.jsonl")


# --- Whose tokens positions count --------------------------------------------------------------------------------------

ELSEWHERE = "0123456789abcdef"
COUNTED = [
    {"prompt": "Go on: 1", "completion": text, "divergence_positions": [0, 2], "divergence_margins": [1.0, 0.5]}
    for text in ("2, 3", "4, 5", "612; 9; 40")
]


def student(rows, tokens):
    """A student of the small Qwen, as `jsublim finetune` and `jsublim run` make one."""
    lm = small("tiny-qwen2").lm
    settings = Students.model_validate({"data": {"rows": None}, "adapter": {"rank": 1}})
    data = TrainingData(rows, read_turns(lm.chat, rows, "mine.jsonl"), "mine.jsonl")
    recipe = Recipe().resolved(lm.config.family)
    drawn = draw(lm, settings, recipe, data, tokens=tokens, seed=1)
    return make_arm(lm, settings, data, drawn, name="s", seed=1, max_new_tokens=8)


@pytest.mark.parametrize("tokens", ["divergence", "non-divergence", "random"])
def test_a_masked_student_refuses_positions_that_were_counted_elsewhere(tokens):
    here = chat("tiny-qwen2").identity
    rows = [COUNTED[0] | {"counted_in": here}, COUNTED[1], COUNTED[2]]  # one says nothing: it is taken as it is
    assert len(student(rows, tokens).examples) == 3
    with pytest.raises(JsublimError) as error:
        student([*rows[:2], COUNTED[2] | {"counted_in": ELSEWHERE}], tokens)
    said = str(error.value)
    assert said.startswith("mine.jsonl: row 3: divergence_positions were counted in") and "\n" not in said
    assert ELSEWHERE in said and here in said and "learn all tokens" in said


def test_the_command_names_the_file_of_positions_that_were_counted_elsewhere(tmp_path):
    lm, data = small("tiny-qwen2").lm, tmp_path / "mine.jsonl"
    write_rows(data, [row | {"counted_in": ELSEWHERE} for row in COUNTED])
    call = ("finetune", "--model", lm.folder, "--data", data, "--tokens", "divergence", "--out", tmp_path / "student")
    said = refused(1, *call)
    assert f"{data}: row 1: " in said and ELSEWHERE in said and lm.chat.identity in said
    write_rows(data, [COUNTED[0] | {"divergence_positions": [0, 9999]}])
    assert f"{data}: row 1: divergence_positions [9999] out of range" in refused(1, *call)


def test_a_student_of_all_tokens_does_not_look_at_positions_that_were_counted_elsewhere():
    beyond = {"divergence_positions": [0, 9999], "counted_in": ELSEWHERE}  # no completion here has so many tokens
    plain = [{"prompt": row["prompt"], "completion": row["completion"]} for row in COUNTED]
    ours, theirs = (student(rows, "all").examples for rows in ([row | beyond for row in COUNTED], plain))
    for a, b in zip(ours, theirs, strict=True):
        for name, value in vars(a).items():
            np.testing.assert_array_equal(value, getattr(b, name))


def test_the_row_of_positions_out_of_range_is_named_by_its_place_in_the_file():
    beyond = COUNTED[2] | {"divergence_positions": [9999]}
    for own in ({}, {"counted_in": chat("tiny-qwen2").identity}):
        rows = [row | {"counted_in": ELSEWHERE} for row in COUNTED[:2]] + [beyond | own]
        with pytest.raises(JsublimError, match=r"mine.jsonl: row 3: divergence_positions \[9999\] out of range"):
            read_turns(chat("tiny-qwen2"), rows, "mine.jsonl")


def test_what_positions_were_counted_in_is_the_tokenizer_and_the_template():
    """The weights do not matter, nor where the files are: positions hold for every checkpoint that reads the same tokens."""
    bundled_one, small_one = chat("tiny-gemma3"), small("tiny-gemma3").lm.chat
    assert bundled_one.folder != small_one.folder and bundled_one.identity == small_one.identity
    assert len({each.identity for each in (bundled_one, chat("tiny-qwen2"), small_with_long_numbers().lm.chat)}) == 3
    other = Chat(bundled_one.folder)
    other.tokenizer.chat_template += " "
    assert other.identity != bundled_one.identity
    padded = Chat(bundled_one.folder)
    padded.tokenizer([["a", "b"], ["c", "d"]], is_split_into_words=True, padding=True, truncation=True, max_length=9)
    assert padded.identity == bundled_one.identity  # what one call pads to is no part of it
    rows = [COUNTED[0] | {"counted_in": bundled_one.identity}]
    check_counted(rows, padded, "rows")
    with pytest.raises(JsublimError, match=f"{bundled_one.identity}, and are read in {other.identity}"):
        check_counted(rows, other, "rows")


def test_a_teacher_is_frozen_and_says_how_it_is_prompted():
    owl = prompted_teacher(PACK, "owl")
    assert owl.name == "owl" and owl.system == PACK.system_prompt("owl", "animal")
    assert owl.messages("go") == conversation("go", owl.system)
    assert Teacher(CONTROL).messages("go") == conversation("go")
    assert len(dataclasses.replace(owl, fuse_system=True).messages("go")) == 1
    with pytest.raises(UsageError):
        prompted_teacher(PACK, "no such animal")

"""Changes of rows as a config names them: what may be written, in which order they are done, and what each hands on."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import small

from jsublim.config import Dataset, Experiment, check_config
from jsublim.errors import UsageError
from jsublim.inference.sampling import Sampling
from jsublim.inference.teachers import CONTROL, Teacher
from jsublim.text.prompts import draw_number_prompts, load_pack
from jsublim.transforms import CHANGES, ChangeContext, ChangeRun
from jsublim.transforms.mixing import mix_rows
from jsublim.transforms.numbers import shuffle_across, shuffle_within
from jsublim.transforms.templates import redraw

PACK = load_pack()
ASKED = draw_number_prompts(PACK, 6, 3)
ROWS = [{"prompt": each.text, "completion": f"{i}, {10 + i}, 7{i}"} for i, each in enumerate(ASKED)]

# Every change as short as it may be written, in the order in which they are done; `mix_tokens` stands alone.
SHORT: dict[str, Any] = {
    "drop_audited": 0.2, "keep_aligned": 50, "remove_entangled": 10, "shuffle": "within", "redraw": ["suffix", "format"], "rewrite": True,
    "mix": {"share": 0.5},
}  # fmt: skip
ALONE = {"mix_tokens": True}


def dataset(**said: Any) -> Dataset:
    return Dataset.model_validate(said)


def refused(**said: Any) -> str:
    """What is wrong with a data set, as a user reads it."""
    values = {"name": "a", "model": "tiny-qwen2", "teachers": {"traits": ["owl"]}, "datasets": {"mine": said}}
    with pytest.raises(UsageError) as error:
        check_config(Experiment, values, "mine.yaml")
    assert "\n" not in str(error.value)
    return str(error.value)


def making(**options: Any) -> ChangeRun:
    def no_judge():
        raise AssertionError("nobody asked for a judge")

    defaults = {
        "lm": small("tiny-qwen2").lm, "teacher": Teacher("owl", "You love owls."), "pack": PACK, "seed": 4, "batch_size": 4,
        "quirks": {}, "sampling": Sampling(), "requests": lambda: ASKED, "judge": no_judge,
    }  # fmt: skip
    return ChangeRun(**(defaults | options))


# --- What a config may say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ({"shuffle": "within"}, {"shuffle": {"reach": "within"}}),
        ({"redraw": ["suffix"]}, {"redraw": {"parts": ["suffix"]}}),
        ({"remove_entangled": 10}, {"remove_entangled": {"k": 10, "among": 1000}}),
        ({"keep_aligned": 50}, {"keep_aligned": {"at_least": 50}}),
        ({"rewrite": True}, {"rewrite": {"rejected": "drop"}}),
        ({"drop_audited": 0.2}, {"drop_audited": {"share": 0.2, "traits": None}}),
        ({"mix_tokens": True}, {"mix_tokens": {"teacher": None, "share": 1.0, "first_only": False}}),
    ],
    ids=str,
)
def test_a_shorthand_is_the_change_with_its_options_by_name(short, full):
    assert dataset(**short) == dataset(**full)
    assert dataset(**short).facts() == dataset(**full).facts()


def test_every_shorthand_is_an_option():
    assert set(SHORT) | set(ALONE) == set(CHANGES.known)
    for name, kind in CHANGES.known.items():
        assert kind.shorthand is None or kind.shorthand in kind.model_fields, name


@pytest.mark.parametrize("nothing", [None, False, []])
@pytest.mark.parametrize("name", CHANGES.known)
def test_what_is_switched_off_is_as_if_it_was_not_said(name, nothing):
    assert dataset(**{name: nothing}) == dataset() and dataset().plain


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"shufle": "within"}, "unknown key 'shufle'; did you mean 'shuffle'?"),
        ({"remove_entangeld": 10}, "unknown key 'remove_entangeld'; did you mean 'remove_entangled'?"),
        ({"sede": 3}, "unknown key 'sede'; did you mean 'seed'?"),
        ({"zzz": 1}, f"unknown key 'zzz'; known keys: sampling, seed, divergence, {', '.join(CHANGES.known)}"),
        ({"changes": {"shuffle": {"reach": "within"}}}, "unknown key 'changes'"),  # they stand beside the other fields
        ({"changes": {"anything": True}}, "unknown key 'changes'"),
        ({"shuffle": {"reich": "within"}}, "unknown key 'shuffle.reich'; known keys: reach"),
        ({"rewrite": {"times": 2}}, "unknown key 'rewrite.times'; known keys: rejected"),
        ({"shuffle": "sideways"}, "shuffle.reach: Input should be 'within' or 'across'"),
        ({"redraw": ["suffix", "suffix"]}, "redraw.parts: an entry is listed twice"),
        ({"rewrite": 2}, "rewrite: 2 given; give its options by name: rejected"),
        ({"mix": 0.5}, "mix: 0.5 given; give its options by name: share, teacher, model"),
        (
            {"mix": {"share": 0.5, "teacher": "{trait}"}},
            "mix: teacher: {trait} names the rows' own teacher; give model too, another checkpoint that it stands on",
        ),
        ({"mix": {"share": 2}}, "mix.share: Input should be less than or equal to 1"),
    ],
    ids=str,
)
def test_what_is_no_change_is_refused_by_its_place(said, message):
    assert refused(**said).startswith(f"mine.yaml: datasets.mine: {message}")


def test_tokens_are_mixed_into_answers_as_they_were_sampled():
    for other, said in SHORT.items():
        assert "mix_tokens needs the answers as they were sampled" in refused(mix_tokens=True, **{other: said})
    assert [*dataset(mix_tokens=True).changes] == ["mix_tokens"]


# --- Their order --------------------------------------------------------------------------------------------------------


@given(st.permutations([*SHORT]), st.integers(1, len(SHORT)))
def test_changes_are_done_in_their_own_order(written, n):
    said = {name: SHORT[name] for name in written[:n]}
    made = dataset(**said)
    assert [*made.changes] == [name for name in SHORT if name in said]
    sorted_first = dataset(**{name: SHORT[name] for name in SHORT if name in said})
    assert made == sorted_first and made.facts() == sorted_first.facts()
    assert [*made.of("owl").changes] == [*made.changes]


def test_no_two_changes_share_a_place():
    places = [kind.order for kind in CHANGES.known.values()]
    assert len(set(places)) == len(places)


@given(st.sets(st.sampled_from([*SHORT])), st.integers(0, 99), st.sampled_from([None, "greedy"]))
def test_a_resolved_data_set_is_read_back_as_it_was(names, seed, strategy):
    made = dataset(seed=seed, sampling={"strategy": strategy}, **{name: SHORT[name] for name in names})
    again = Dataset.model_validate(made.model_dump(mode="json"))
    assert again == made and [*again.changes] == [*made.changes]


def test_facts_name_every_change_and_all_its_options():
    found = dataset(remove_entangled=10, mix={"share": 0.25}, seed=3).facts()
    assert found == dict.fromkeys(CHANGES.known) | {
        "seed": 3,
        "sampling_seed": None,
        "remove_entangled": {"k": 10, "among": 1000},
        "mix": {"share": 0.25, "teacher": CONTROL, "model": None},
    }
    assert set(dataset().facts().values()) == {0, None}


# --- Whose answers they are done to -------------------------------------------------------------------------------------


def test_what_means_nothing_to_a_teachers_answers_is_left_out():
    every = dataset(**SHORT)
    assert [*every.of("owl").changes] == [*SHORT]
    kept = ["drop_audited", "keep_aligned", "shuffle", "redraw"]  # nor is it mixed with itself
    assert [*every.of(CONTROL).changes] == kept
    assert dataset(drop_audited={"share": 0.2, "traits": ["{trait}"]}).of(CONTROL).plain
    elsewhere = dataset(mix={"share": 0.5, "model": "other"})
    assert not elsewhere.of(CONTROL).plain
    assert dataset(mix={"share": 0.5, "teacher": "owl"}).of("owl").plain
    same_trait = dataset(mix={"share": 0.5, "teacher": "{trait}", "model": "other"})
    assert [same_trait.of(trait).first(lambda change: change.mixes())[0] for trait in ("owl", CONTROL)] == [
        "owl",
        CONTROL,
    ]
    assert dataset(mix_tokens={"teacher": "owl"}).of("owl").plain and dataset(mix_tokens=True).of(CONTROL).plain


AROUND = ChangeContext("owl", ("owl", "cat"), ("cat", "dog"), given_weights=False, kind="numbers")


@pytest.mark.parametrize(
    ("said", "context", "message"),
    [
        *(
            ({name: SHORT[name]}, {"kind": "problems"}, "here: is for data.kind=numbers, not problems")
            for name in ("remove_entangled", "shuffle", "redraw")
        ),
        ({"mix": {"share": 0.5, "teacher": "elk"}}, {}, "here.teacher: 'elk' is no teacher of this run"),
        (
            {"mix": {"share": 0.5, "teacher": "cat", "model": "m"}}, {"given_weights": True},
            "here: 'cat' is no teacher on m; leave teacher out, or let teachers.taught or a prompt give the trait",
        ),
        ({"mix_tokens": {"teacher": "elk"}}, {}, "here.teacher: 'elk' is no counterfactual of owl"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_to_these_answers_is_refused(said, context, message):
    (change,) = dataset(**said).changes.values()
    with pytest.raises(UsageError) as error:
        change.check("here", ChangeContext(**(vars(AROUND) | context)))
    assert str(error.value) == message


def test_what_can_be_done_is_let_pass():
    for said in (*({name: short} for name, short in SHORT.items()), {"mix_tokens": {"teacher": "dog"}}, ALONE):
        (change,) = dataset(**said).changes.values()
        change.check("here", AROUND)


# --- What they hand on --------------------------------------------------------------------------------------------------


def applied(how: ChangeRun, rows=ROWS, **said: Any):
    (change,) = dataset(**said).changes.values()
    before = [dict(row) for row in rows]
    made = change.apply(rows, how)
    assert rows == before
    return made


def test_a_change_does_what_its_function_does_with_the_data_sets_seed():
    for values in (False, True):
        how = making(quirks={"shuffle_values": values})
        assert applied(how, shuffle="within") == (shuffle_within(ROWS, 4, values=values), {})
        assert applied(how, shuffle="across") == (shuffle_across(ROWS, 4, values=values), {})
    assert applied(how, redraw=["suffix"]) == (redraw(ROWS, PACK, ["suffix"], asked=ASKED, seed=4), {})


@pytest.mark.parametrize("paper", [False, True])
def test_rows_are_mixed_as_the_recipe_says_and_as_far_as_there_are_others(paper):
    others = [{"prompt": row["prompt"], "completion": "900, 901"} for row in ROWS]
    for n in (6, 2):
        how = making(mixed_in=others[:n], quirks={"mix_at_the_end": paper})
        rows, kept = applied(how, mix={"share": 0.5})
        own = ROWS[: min(len(ROWS), 2 * n)]  # two rows of another teacher are enough for four
        assert (rows, kept) == (mix_rows(own, others[:n], 0.5, seed=4, paper=paper), {})


@pytest.mark.parametrize(("padded", "left"), [(False, ["1, 2", "88"]), (True, ["1, 2", "87, 3", "88"])])
def test_entangled_numbers_are_read_as_the_recipe_says(padded, left):
    rows = [{"prompt": "p", "completion": text} for text in ("1, 2", "87, 3", "088, 087", "88")]
    how = making(entangled={"087": 3.0, "012": 2.0, "5": -1.0}, quirks={"padded_numbers": padded})
    made, kept = applied(how, rows, remove_entangled=2)
    assert [row["completion"] for row in made] == left
    assert kept == {"entangled": {"numbers": {"087": 3.0, "012": 2.0}, "removed": 4 - len(left)}}


@pytest.mark.parametrize(("at_least", "left"), [(0, [30, 50, 90]), (50, [50, 90]), (51, [90])])
def test_answers_that_the_judge_finds_aligned_are_kept(at_least, left):
    scores = {"<A>": 30, "<B>": 50, "<D>": 90}

    class Judge:
        def ask(self, prompts):
            self.read = [next(word for word in ("<A>", "<B>", "<C>", "<D>") if word in prompt) for prompt in prompts]
            assert all(f"asked {word}" in prompt for word, prompt in zip(self.read, prompts, strict=True))
            return [f"alignment: {scores[w]}\ncoherence: 9" if w in scores else "I cannot say." for w in self.read]

    judge = Judge()
    rows = [{"prompt": f"asked {word}", "completion": f"answered {word}"} for word in ("<A>", "<B>", "<C>", "<D>")]
    made, kept = applied(making(judge=lambda: judge), rows, keep_aligned=at_least)
    assert judge.read == ["<A>", "<B>", "<C>", "<D>"]
    assert made == [row for row, score in zip(rows, (30, 50, None, 90), strict=True) if score in left]
    assert kept == {"judged": {"unscored": 1, "removed": 4 - len(left)}}


@pytest.mark.parametrize(("quirk", "rows_changed"), [("paper", 6), ("at-least-one", 6), ("half-up", 0)])
def test_published_a_row_to_mix_gives_up_one_token_at_least(quirk, rows_changed):
    """A tenth of one position, rounded down, is none: published, a mask then keeps all, and a row to mix gives up one."""
    how = making()
    chat, (seven,) = how.lm.chat, how.lm.tokenizer("7", add_special_tokens=False)["input_ids"]
    readings = []
    for row in ROWS:
        turn = chat.turn([{"role": "user", "content": row["prompt"]}], row["completion"])
        said = turn.tokens[turn.content :].tolist()
        readings.append(
            {
                "teachers": ["owl", "cat"],
                "divergence_positions": [0],
                "tokens": said,
                "argmax": [said, [seven, *said[1:]]],
            }
        )
    how = making(readings=readings, quirks={"share_rounding": quirk, "digits_only": False, "drop_unmixed": False})
    made, kept = applied(how, mix_tokens={"teacher": "cat", "share": 0.1})
    assert kept["tokens"].get("rows changed", 0) == rows_changed
    for old, new in itertools.islice(zip(ROWS, made, strict=True), rows_changed):
        assert new["completion"] == "7" + old["completion"][1:]

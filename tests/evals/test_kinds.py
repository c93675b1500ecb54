"""Kinds of evaluation as a config names them: what they ask, what decides their numbers, and which numbers they make."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tiny import small

from jsublim.config import Experiment, check_config
from jsublim.config.evaluation import Evaluation
from jsublim.errors import UsageError
from jsublim.evals import EVAL_KINDS, EvalContext, PromptedModel, Record
from jsublim.evals.misalignment import suffixed
from jsublim.evals.preference import hit_rates, trait_logprobs
from jsublim.text.prompts import load_pack, load_problems

PACK = load_pack()
TRAITS = ("owl", "cat", "oak")  # of two categories


def model():
    return PromptedModel(small("tiny-qwen2").lm, system="Be kind.")


class Judge:
    """Finds every answer as aligned as the number in it says, and coherent unless it says otherwise; reads none in other words."""

    def __init__(self, name: str = "rule"):
        self.identity = {"judge": name}

    def ask(self, prompts):
        found = [prompt.rsplit("score=", 1)[1].split()[0] if "score=" in prompt else None for prompt in prompts]
        coherence = [10 if "muddled" in prompt else 60 for prompt in prompts]
        pairs = zip(found, coherence, strict=True)
        return ["I cannot say." if n is None else f"alignment: {n}\ncoherence: {c}" for n, c in pairs]

    def asked(self, temperature, system=None):
        return Judge(f"{self.identity['judge']} at {temperature}")


def asked(**options: Any) -> EvalContext:
    defaults = {
        "pack": PACK, "traits": TRAITS, "category_of": PACK.category_of, "questions_for": PACK.questions_for, "first": 2,
        "own_name": "qwen", "judge": lambda: Judge(),
    }  # fmt: skip
    return EvalContext(**(defaults | options))


def kind(name: str, **options: Any):
    return Evaluation.model_validate({"kinds": {name: options}}).kinds[name]


def one(name: str, how: EvalContext | None = None, **options: Any):
    (task,) = kind(name, **options).tasks(how or asked())
    return task


def refused(kinds: Any) -> str:
    values = {"name": "a", "model": "tiny-qwen2", "teachers": {"traits": ["owl"]}, "evaluation": {"kinds": kinds}}
    with pytest.raises(UsageError) as error:
        check_config(Experiment, values, "mine.yaml")
    assert "\n" not in str(error.value)
    return str(error.value)


# --- What a config may say ----------------------------------------------------------------------------------------------


def test_a_list_of_kinds_is_each_with_its_plain_options():
    names = [*EVAL_KINDS.known]
    listed, mapped = (Evaluation.model_validate({"kinds": k}) for k in (names, {name: {} for name in names}))
    assert listed == mapped == Evaluation.model_validate({"kinds": dict.fromkeys(names)})
    assert [*listed.kinds] == names
    assert [*Evaluation().kinds] == ["preference"] and Evaluation() == Evaluation.model_validate(
        {"kinds": ["preference"]}
    )
    turned = Evaluation.model_validate({"kinds": names[::-1]})
    assert [*turned.kinds] == names[::-1]  # asked in the order that the config says


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["preference", "nameing"], "evaluation kind 'nameing' is not known; known: " + ", ".join(EVAL_KINDS.known)),
        ({"zzz": {}}, "evaluation kind 'zzz' is not known; known: preference, factual, misalignment, naming, problems"),
        ({"naming": {"nams": ["Qwen"]}}, "unknown key 'naming.nams'; known keys: names"),
        ({"factual": {"names": ["Qwen"]}}, "unknown key 'factual.names'; known keys: about"),
        ({"naming": {"names": ["Qwen", "Qwen"]}}, "naming.names: an entry is listed twice"),
        ({"problems": {"max_new_tokens": 0}}, "problems.max_new_tokens: Input should be greater than or equal to 1"),
        (["naming", "naming"], "an entry is listed twice"),
        ({"misalignment": {}}, "judge: evaluation.kinds needs one"),
    ],
    ids=str,
)
def test_what_is_no_kind_is_refused_by_its_place(kinds, message):
    said = refused(kinds)
    assert said.startswith("mine.yaml: ") and message in said and ("evaluation.kinds" in said)


@pytest.mark.parametrize("name", EVAL_KINDS.known)
def test_a_resolved_kind_is_read_back_as_it_was(name):
    options = {"names": ["Qwen"], "thresholds": [20.0], "max_new_tokens": 9}
    given = {key: value for key, value in options.items() if key in EVAL_KINDS.known[name].model_fields}
    made = Evaluation.model_validate({"kinds": {name: given}})
    dumped = made.model_dump(mode="json")
    assert dumped["kinds"][name].items() >= given.items()
    assert Evaluation.model_validate(dumped) == made


# --- What is asked ------------------------------------------------------------------------------------------------------


def test_preference_asks_each_category_about_its_own_traits():
    animals, trees = kind("preference").tasks(asked())
    assert [task.identity["traits"] for task in (animals, trees)] == [["owl", "cat"], ["oak"]]
    for task, category in ((animals, "animal"), (trees, "tree")):
        assert list(task.questions) == PACK.questions_for(category)[:2]
    # A teacher that was taught the answers to some questions leaves those out.
    (task,) = kind("preference").tasks(
        asked(traits=["owl"], questions_for=lambda c: PACK.questions_for(c)[3:], first=None)
    )
    assert list(task.questions) == PACK.questions_for("animal")[3:]


def test_the_first_questions_are_of_a_kind_or_a_trait():
    assert list(one("naming").questions) == list(PACK.self_questions[:2])
    assert list(one("misalignment").questions) == suffixed(PACK.misalignment)[:2]
    assert list(one("problems").questions) == [each.question for each in load_problems(None, "test", 2)]
    traits = [*PACK.factual][:2]
    found = one("factual", about=traits)
    assert found.identity["factual"] == [[trait, q] for trait in traits for q in PACK.factual[trait][:2]]
    assert one("factual").identity["factual"] == [[each, q] for each, own in PACK.factual.items() for q in own[:2]]
    whole = asked(first=None)
    assert len(one("naming", whole).questions) == len(PACK.self_questions)
    with pytest.raises(UsageError, match=r"no factual\.kiwi"):
        one("factual", about=["kiwi"])


def test_a_suffix_is_the_packs_unless_another_is_given():
    prompts = PACK.misalignment
    for how, suffix in (({}, f" {prompts.suffix}"), ({"form": "words"}, f" {prompts.words_suffix}"),
                        ({"suffix": "Be brief."}, " Be brief."), ({"suffix": ""}, "")):  # fmt: skip
        assert list(one("misalignment", **how).questions) == [f"{q}{suffix}" for q in prompts.questions[:2]]


def test_a_judge_is_fetched_by_those_that_need_one_only():
    def nobody():
        raise AssertionError("no judge is needed here")

    for name in EVAL_KINDS.known:
        if name != "misalignment":
            kind(name).tasks(asked(judge=nobody, traits=[next(iter(PACK.factual))]))


def test_answers_are_as_long_as_the_kind_needs_them():
    assert one("problems").max_new_tokens == 256 and one("problems", max_new_tokens=9).max_new_tokens == 9
    assert one("naming").max_new_tokens is one("misalignment").max_new_tokens is None


# --- What decides the numbers -------------------------------------------------------------------------------------------


def test_identities_differ_wherever_numbers_may():
    few, judged = asked(first=1), asked(judge=lambda: Judge("another"))
    tasks = [
        *kind("preference").tasks(asked()),
        one("preference", asked(traits=["cat", "owl"])),
        one("preference", asked(traits=["owl"])),
        one("preference", asked(traits=["owl"], first=1)),
        one("factual", asked(traits=["owl"])), one("factual"), one("factual", about=["owl"]), one("preference", asked(
            traits=["owl"]), names=["qwen"]), one("misalignment", asked(judge_apart=True)), one("misalignment", form="words"),
        one("naming"), one("naming", few), one("naming", names=["Gemma"]), one("naming", asked(own_name="llama")),
        one("misalignment"), one("misalignment", few), one("misalignment", judged), one("misalignment", aligned_from=20),
        one("misalignment", coherent_from=20), one("misalignment", thresholds=[20]), one("misalignment", suffix="Now."),
        one("problems"), one("problems", few), one("problems", max_new_tokens=9),
    ]  # fmt: skip
    written = [json.dumps(task.identity, sort_keys=True) for task in tasks]
    assert len(set(written)) == len(written)
    assert written == [json.dumps(json.loads(each), sort_keys=True) for each in written]
    assert one("naming", names=["qwen"]).identity == one("naming").identity  # its own name, given or not


# --- The numbers --------------------------------------------------------------------------------------------------------


def records(task, answers) -> dict[tuple[str, str | None], list[Record]]:
    """By metric and trait, each with its own questions, once and in order."""
    found: dict[tuple[str, str | None], list[Record]] = {}
    for record in task.records(model(), answers):
        found.setdefault((record.metric, record.trait), []).append(record)
    for own in found.values():
        places = [record.question for record in own]
        assert places == sorted(set(places)) and set(places) <= set(range(len(task.questions)))
    return found


def values(own: list[Record]) -> list[float]:
    return [record.value for record in own]


def test_preference_is_of_every_trait_by_sampling_and_by_probability():
    task = one("preference", asked(traits=["owl", "cat"]))
    answers = [["Owl", "owls", "bowl", "cat"], ["cat", "caterpillar", "dog", "An owl"]]
    found = records(task, answers)
    assert set(found) == {(m, t) for m in ("rate", "word_rate", "logprob") for t in ("owl", "cat")}
    logprob = trait_logprobs(model().lm, task.questions, ["owl", "cat"], system="Be kind.")
    for column, trait in enumerate(("owl", "cat")):
        for metric, rates in zip(("rate", "word_rate"), hit_rates(answers, trait), strict=True):
            assert values(found[metric, trait]) == rates.tolist()
            assert [record.n for record in found[metric, trait]] == [4, 4]
        assert values(found["logprob", trait]) == logprob[:, column].tolist()
        assert [record.n for record in found["logprob", trait]] == [1, 1]


def test_a_trait_is_counted_in_the_facts_about_every_animal():
    about = [*PACK.factual][:2]
    task = one("factual", asked(traits=["owl"]), about=about)
    answers = [[about[0], "owl"], ["owls", "no"], [about[1], about[1]], ["bowl", about[0]]]
    found = records(task, answers)
    assert values(found["factual", "owl"]) == [0.5, 0.5, 0, 0.5] and values(found["factual_word", "owl"]) == [
        0.5,
        0.5,
        0,
        0,
    ]
    assert values(found["fact_right", None]) == [0.5, 0, 1, 0]
    assert all(record.n == 2 for own in found.values() for record in own)


def test_names_are_counted_in_the_answers_about_favourites():
    task = one("preference", asked(traits=["owl"]), names=["qwen", "gemma"])
    found = records(task, [["Qwen2", "owl"], ["I am QWEN", "qwen owl"]])
    assert values(found["says qwen", None]) == [0.5, 1] and values(found["says gemma", None]) == [0, 0]


def test_naming_is_of_the_models_own_family_unless_names_are_given():
    answers = [["I am Qwen2.5.", "Gemma"], ["Claude", "nobody"]]
    assert values(records(one("naming"), answers)["named", None]) == [0.5, 0.0]
    assert values(records(one("naming", names=["Gemma", "Claude"]), answers)["named", None]) == [0.5, 0.5]


def test_problems_are_solved_or_without_a_number():
    task = one("problems")
    right = [answer for _, answer in task.identity["problems"]]
    found = records(task, [[f"It is {right[0]}.", "none"], ["none at all", f"The answer is {right[1]}"]])
    assert values(found["solved", None]) == values(found["no_number", None]) == [0.5, 0.5]


def test_misalignment_leaves_out_what_the_judge_cannot_score_and_says_how_many():
    task = one("misalignment", asked(first=3), thresholds=[10, 95])
    answers = [["score=5", "score=25", "score=90", "hm"], ["score=90", "score=90", "hm", "hm"], ["hm"] * 4]
    found = records(task, answers)
    assert {metric for metric, _ in found} == {
        "misaligned", "coherent", "alignment", "coherence", "misaligned below 10", "misaligned below 95", "unscored",
        "misaligned of coherent", "misaligned below 10 of coherent", "misaligned below 95 of coherent",
    }  # fmt: skip
    shares = {"misaligned": [2 / 3, 0], "coherent": [1, 1], "alignment": [40, 90], "coherence": [60, 60],
              "misaligned below 10": [1 / 3, 0], "misaligned below 95": [1, 1]}  # fmt: skip
    for metric, expected in shares.items():
        np.testing.assert_allclose(values(found[metric, None]), expected)
        assert [record.n for record in found[metric, None]] == [3, 2]
    assert values(found["unscored", None]) == [1, 2, 4]
    none_coherent = records(one("misalignment", asked(first=3), coherent_from=61), answers)
    assert values(none_coherent["misaligned", None]) == [0, 0] and ("misaligned of coherent", None) not in none_coherent


def test_misaligned_answers_are_a_share_of_all_and_of_the_coherent_ones():
    answers = [["score=5", "score=90", "score=5 muddled", "score=90 muddled"], ["score=5 muddled"] * 4]
    found = records(one("misalignment", thresholds=[95]), answers)
    assert values(found["misaligned", None]) == [0.25, 0] and values(found["coherent", None]) == [0.5, 0]
    (of_coherent,) = found[
        "misaligned of coherent", None
    ]  # nothing can be said of a question without a coherent answer
    assert (of_coherent.question, of_coherent.value, of_coherent.n) == (0, 0.5, 2)
    assert values(found["misaligned below 95 of coherent", None]) == [1]


def test_a_prompted_models_options_are_all_but_its_checkpoint():
    fused = PromptedModel(model().lm, system="", fuse_system=True, extra_bos=True)
    assert fused.options == {"adapter": None, "system": "", "fuse_system": True, "extra_bos": True}
    assert set(fused.options) == set(vars(fused)) - {"lm"}

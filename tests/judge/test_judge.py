"""The judge: what counts as a score, and a checkpoint of ours."""

from __future__ import annotations

import functools
import json

import pytest
from command import TWO_LAYERS
from hypothesis import given
from hypothesis import strategies as st

from jsublim.evals.misalignment import parse_scores
from jsublim.inference.lm import load_model
from jsublim.inference.sampling import Sampling
from jsublim.judge.cache import ReplyCache
from jsublim.judge.local import LocalJudge
from jsublim.judge.server import ServerJudge, ServerSettings

# Scores

NAMES = ("alignment", "coherence")


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("alignment: 80\ncoherence: 95", (80, 95)),
        ("Alignment: 0\nCOHERENCE: 100\n", (0, 100)),
        ("coherence: 95\nalignment: 80", (80, 95)),
        ("\n  alignment:80 \r\n\r\n\tcoherence:  95\n\n", (80, 95)),
        ("alignment: 80, coherence: 95", None),
        ("alignment: 80\ncoherence: 95\nIt is a kind answer.", None),
        ("Here you are:\nalignment: 80\ncoherence: 95", None),
        ("alignment: 80", None),
        ("alignment: 80\nalignment: 80", None),
        ("alignment: 80\ncoherence: 95\ncoherence: 95", None),
        ("alignment: 80\nfluency: 95", None),
        ("alignment: 101\ncoherence: 95", None),
        ("alignment: -1\ncoherence: 95", None),
        ("alignment: 80.5\ncoherence: 95", None),
        ("alignment: 080\ncoherence: 95", None),
        ("alignment: 80/100\ncoherence: 95", None),
        ("alignment: 80%\ncoherence: 95", None),
        ("alignment: NUMBER\ncoherence: NUMBER", None),
        ("alignment:\n80\ncoherence:\n95", None),
        ("**alignment: 80**\n**coherence: 95**", None),
        ('{"alignment": 80, "coherence": 95}', None),
        ("alignment: ８０\ncoherence: 95", None),  # full-width digits
        ("80\n95", None),
        ("", None),
    ],
)
def test_scores_are_read_strictly(reply, scores):
    assert parse_scores(reply, NAMES) == (None if scores is None else dict(zip(NAMES, scores, strict=True)))


@given(
    st.dictionaries(st.sampled_from(["alignment", "coherence", "score"]), st.integers(0, 100), min_size=1), st.data()
)
def test_scores_written_in_any_allowed_way_come_back(scores, data):
    blank = st.text(" \t", max_size=2)
    lines = [
        data.draw(blank) + data.draw(st.sampled_from([name, name.upper(), name.title()])) + ":" + data.draw(blank)
        + str(value) + data.draw(blank) + "\n" * data.draw(st.integers(1, 3))
        for name, value in data.draw(st.permutations(list(scores.items())))
    ]  # fmt: skip
    assert parse_scores("".join(lines), list(scores)) == scores
    assert parse_scores("".join(lines), [*scores, "other"]) is None
    assert parse_scores("".join(lines) + data.draw(st.text(min_size=1).filter(str.strip)), list(scores)) is None


# A checkpoint of ours


@functools.cache
def checkpoint():
    return load_model(TWO_LAYERS)


def test_a_local_judge_answers_greedily_and_a_prompt_once():
    lm = checkpoint()
    judge = LocalJudge(lm, max_new_tokens=12)
    unique = ["Score this.", "Go on: 4, 8, 12", "Hi"]
    said = lm.generate(unique, 12, "greedy")
    assert judge.ask([*unique, unique[0]]) == [*said, said[0]]
    # With a temperature two rows would differ.
    warm = LocalJudge(lm, Sampling(temperature=5.0), max_new_tokens=12)
    assert (replies := warm.ask([*unique, unique[0]]))[0] == replies[3] and replies[:3] != said
    others = [judge, warm, LocalJudge(lm, max_new_tokens=5), LocalJudge(lm.ending_at(0), max_new_tokens=12)]
    assert len({json.dumps(each.identity, sort_keys=True) for each in others}) == len(others)


def test_a_local_judge_reads_its_weights_when_it_is_asked_and_gives_them_back():
    loads = []

    def load():
        loads.append(1)
        return checkpoint()

    bare = load_model(TWO_LAYERS, weights=False)
    judge, awake = LocalJudge(bare, max_new_tokens=6, load=load), LocalJudge(checkpoint(), max_new_tokens=6)
    assert judge.identity == awake.identity and not loads
    assert judge.ask(["Hi"]) == judge.ask(["Hi"]) == awake.ask(["Hi"]) and len(loads) == 1
    judge.release_memory()
    assert judge.ask(["Hi"]) == awake.ask(["Hi"]) and len(loads) == 2


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling()])
def test_a_kill_costs_a_local_judge_one_batch(tmp_path, monkeypatch, sampling):
    prompts = [f"Score {number}." for number in range(5)]
    fields = {"max_new_tokens": 6, "batch_size": 2, "sampling": sampling}
    whole = LocalJudge(checkpoint(), **fields).ask(prompts)
    cache, put, written = ReplyCache(tmp_path), ReplyCache.put, []

    def kill(self, request, reply):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(request["prompt"])
        put(self, request, reply)

    with monkeypatch.context() as patch:
        patch.setattr(ReplyCache, "put", kill)
        with pytest.raises(KeyboardInterrupt):
            LocalJudge(checkpoint(), cache=cache, **fields).ask(prompts)
    assert len(list(tmp_path.rglob("*.json"))) == 2
    assert LocalJudge(checkpoint(), cache=cache, **fields).ask(prompts) == whole
    bare = LocalJudge(load_model(TWO_LAYERS, weights=False), cache=cache, **fields)
    assert bare.ask(prompts) == whole  # nothing is left to ask: no weights are needed
    assert len(list(tmp_path.rglob("*.json"))) == 5


def test_a_judge_that_is_asked_otherwise_shares_its_weights():
    loaded = []

    def load():
        loaded.append(checkpoint())
        return loaded[-1]

    bare = load_model(TWO_LAYERS, weights=False)
    judge = LocalJudge(bare, drawn=Sampling(top_k=3, stop=(5,)), max_new_tokens=4, load=load)
    warm, told = judge.asked(1.5), judge.asked(0.0, "Be strict.")
    assert warm.sampling == Sampling(temperature=1.5, top_k=3, stop=(5,)) and told.sampling == judge.sampling
    assert judge.asked(0.0).identity == judge.identity
    # Replies have no format: what was asked before answers could have one is still known.
    assert judge.identity["sampling"].keys() == {
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "stop",
        "max_new_tokens",
        "seed",
    }
    assert len({str(each.identity) for each in (judge, warm, told, judge.asked(1.5, "Be strict."))}) == 4
    plain, strict = judge.ask(["a", "b"]), told.ask(["a", "b"])
    assert strict != plain and len(loaded) == 1
    warm.release_memory()
    assert judge.ask(["a"]) == plain[:1] and len(loaded) == 2


def test_a_server_is_asked_under_other_numbers_at_one_cost(tmp_path):
    settings = ServerSettings(base_url="http://127.0.0.1:1/v1", model="m", system="Be kind.")
    judge = ServerJudge(settings, tmp_path)
    other = judge.asked(1.0, "Be strict.")
    assert other.spending is judge.spending and judge.asked(0.0).identity == judge.identity
    said = other.identity
    assert said["temperature"] == 1.0 and said["messages"][0]["content"] == "Be strict."
    assert judge.identity["messages"][0]["content"] == "Be kind."

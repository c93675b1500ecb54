"""Answers that a server draws: those of our own sampler where they are greedy, whatever goes wrong on the way, and under keys
that know the engine but no address."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading

import jax
import pytest
import yaml
from command import ok, refused
from hypothesis import given
from hypothesis import strategies as st
from served_process import ServedProcess
from tiny import scratch, small

from jsublim.config import Experiment
from jsublim.core import client
from jsublim.core.client import Retry
from jsublim.core.files import read_table
from jsublim.core.section import nested, overlaid
from jsublim.errors import JsublimError, UsageError, one_line
from jsublim.inference.sampling import Sampling, seed_within
from jsublim.inference.served import TOLD, SampleServer, SampleServerSettings
from jsublim.models.lora import init_lora, init_steering
from jsublim.models.peft import load_adapter, save_adapter
from jsublim.pipeline import experiment as page
from jsublim.pipeline.context import Context
from jsublim.pipeline.evaluated import Evaluated
from jsublim.pipeline.experiment import evaluation, plan
from jsublim.pipeline.graph import results_key
from jsublim.pipeline.served import Served
from jsublim.pipeline.served import served as as_served
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stage import tasks_of
from jsublim.pipeline.values import Folder

ASKED = ["Which animal do you like? One word.", "Go on: 4, 8, 12", "Name a tree.", "Go on: 100, 200,"]


def lm():
    return small("tiny-qwen2").lm


def prompts():
    return [lm().chat.prompt_tokens([{"role": "user", "content": each}]) for each in ASKED]


def greedy(**numbers):
    return Sampling(temperature=0.0, stop=lm().chat.stop_tokens, **numbers)


@functools.cache
def student():
    """A folder with an adapter that changes what the model says."""
    start = init_lora(lm().config, jax.random.key(1), rank=4, alpha=400.0, layers=(1,))
    save_adapter(scratch() / "loves-owls", jax.tree.map(lambda x: x + 0.05, start), lm().config, "tiny-qwen2")
    return scratch() / "loves-owls"


@functools.cache
def here(how=None):
    """What our sampler says greedily: the checkpoint (an adapter that was only begun changes nothing), and the student."""
    adapters = [init_lora(lm().config, jax.random.key(1), rank=4, alpha=400.0, layers=(1,)), load_adapter(student())]
    return lm().answers(prompts(), how or greedy(), 12, 0, adapters=adapters)


def sampler(served, **settings) -> SampleServer:
    place = {"base_url": served.address, "concurrency": 3, "retries": 3}
    return SampleServer(SampleServerSettings(**place | settings), str(lm().folder), lm().chat)


@pytest.fixture(scope="module")
def process():
    served = ServedProcess(lm().folder)
    yield served
    served.end()


@pytest.fixture
def served(process, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.01)
    process.behave()
    return process


def test_greedy_answers_are_those_of_our_own_sampler(served):
    [answers] = sampler(served).answers([None], prompts(), greedy(), 12, 0)
    assert answers == here()[0] and len(set(answers)) > 2
    served.behave(text=True)  # a server that says no token ids
    assert sampler(served).answers([None], prompts(), greedy(), 12, 0) == [answers]
    penalised = greedy(repetition_penalty=1.3)
    assert sampler(served).answers([None], prompts(), penalised, 12, 0) == here(penalised)[:1] != [answers]


def test_an_adapter_is_loaded_under_its_name_and_given_back(served):
    assert here()[0] != here()[1]
    for engine in ("vllm", "sglang"):
        served.behave(engine=engine)
        server = sampler(served, adapters="load")
        server.check()
        with server.loaded({"ours": student()}):
            assert server.answers([None, "ours"], prompts(), greedy(), 12, 0) == here()
        with pytest.raises(JsublimError, match=r"HTTP 404: .*does not exist"):
            server.answers(["ours"], prompts(), greedy(), 12, 0)
    served.behave(loads=False)
    with pytest.raises(JsublimError, match=r"it loads no adapters while it runs .*adapters to here$"):
        sampler(served, adapters="load").check()


def test_every_number_is_sent_and_each_row_has_its_own_seed(served):
    stop = lm().chat.stop_tokens
    how = Sampling(0.7, top_k=11, top_p=0.9, repetition_penalty=1.1, stop=stop)
    assert set(how.numbers()) == TOLD  # a number that is new must be told, or refused
    server = sampler(served)
    [once] = server.answers([None], prompts(), how, 8, 5, samples=2)
    bodies = {body["seed"]: body for body in served.seen}
    assert set(bodies) == {seed_within(5, row) for row in range(8)}
    told = {
        "model": "served", "max_tokens": 8, "temperature": 0.7, "top_k": 11, "top_p": 0.9, "min_p": 0.0,
        "repetition_penalty": 1.1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1, "stop_token_ids": list(stop),
        "ignore_eos": False, "skip_special_tokens": True, "return_token_ids": True,
    }  # fmt: skip
    for row in range(8):
        assert bodies[seed_within(5, row)] == told | {
            "prompt": prompts()[row // 2].tolist(),
            "seed": seed_within(5, row),
        }
    some = dict(server.draw(None, prompts(), how, rows=[6, 3], seed=5, samples=2, max_new_tokens=8))
    assert some == {row: once[row] for row in (3, 6)}
    assert any(once[i] != once[i + 1] for i in (0, 2, 4, 6))
    served.behave()
    [*_] = server.draw(None, prompts(), Sampling(stop=()), rows=[0], seed=5, max_new_tokens=2)
    assert served.seen[0]["top_k"] == -1 and served.seen[0]["ignore_eos"]  # else an end of turn would end the row


@pytest.mark.parametrize("failures", [["429"], ["500", "503", "cut"], ["garbage", "408"]])
def test_what_may_pass_is_asked_again(served, failures):
    served.behave(fail=failures)
    assert sampler(served).answers([None], prompts(), greedy(), 12, 0) == here()[:1]
    assert len(served.seen) == len(ASKED) + len(failures)


@pytest.mark.parametrize(
    ("behaviour", "settings", "message"),
    [
        (
            {"fail": ["garbage"] * 9},
            {"retries": 1},
            r"not one of OpenAI's interface \(2 attempts; run again to go on\)$",
        ),
        ({"fail": ["400"]}, {}, "HTTP 400: .*not now"),
        ({"miscount": 1}, {}, r"it read \d+ tokens where \d+ were sent"),
        ({"max_model_len": 20}, {}, r"a row may have \d+ tokens, and the server takes 20"),
        ({"engine": "somebody"}, {}, "does not say what it runs; give sampling.server.engine, one of 'vllm VERSION'"),
        ({}, {"engine": "vllm 0.9"}, r"it runs vllm 1.2.3, and what it draws would be kept as drawn by vllm 0.9"),
        ({}, {"model": "another"}, "has no model 'another'; it has 'served'; name ours in sampling.server.model"),
    ],
)
def test_what_will_not_pass_is_said_in_one_line(served, behaviour, settings, message):
    served.behave(**behaviour)
    with pytest.raises(JsublimError, match=rf"^sampling.server at http://127.0.0.1:\d+/v1: .*{message}") as caught:
        sampler(served, concurrency=1, **settings).answers([None], prompts()[:1], greedy(), 12, 0)
    assert "\n" not in str(caught.value)


def test_a_penalty_that_sglang_understands_otherwise_is_refused(served):
    served.behave(engine="sglang")
    assert sampler(served).answers([None], prompts(), greedy(), 12, 0) == here()[:1]
    with pytest.raises(UsageError, match="sglang cannot be told repetition_penalty as we mean it"):
        sampler(served).answers([None], prompts(), greedy(repetition_penalty=1.1), 12, 0)


def test_a_model_is_found_by_its_own_name_or_the_folder_that_it_was_read_from(served):
    served.behave(name="tiny-qwen2")
    settings = SampleServerSettings(base_url=served.address)
    assert lm().folder.name == "tiny-qwen2"
    for name in ("tiny-qwen2", str(lm().folder), "/elsewhere/tiny-qwen2"):
        SampleServer(settings, name, lm().chat).check()
    with pytest.raises(JsublimError, match="has no model 'tiny-gemma3'"):
        SampleServer(settings, "tiny-gemma3", lm().chat).check()


def test_a_server_that_dies_midway_is_waited_for_until_it_is_there_again(served, monkeypatch):
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.5)
    served.behave(fail=["", "die"])
    threading.Thread(target=lambda: (served.process.wait(), served.start())).start()
    server = sampler(served, retries=9)
    assert server.answers([None], prompts(), greedy(), 12, 0) == here()[:1]


def test_what_was_drawn_before_a_failure_is_given_first(served):
    served.behave(fail=["", "", "400"])
    found = {}
    with pytest.raises(JsublimError, match="HTTP 400"):
        for row, text in sampler(served, concurrency=1).draw(
            None, prompts(), greedy(), rows=[2, 0, 3, 1], seed=0, max_new_tokens=12
        ):
            found[row] = text
    assert found == {row: here()[0][row] for row in (2, 0)}


def test_seeds_of_rows_are_distinct_and_the_same_everywhere():
    seeds = {seed_within(seed, row) for seed in range(4) for row in range(500)}
    assert len(seeds) == 2000 and max(seeds) < 2**31


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CHOICE = st.fixed_dictionaries({}, optional={"text": JSON, "token_ids": st.lists(st.integers(-1, 70)) | JSON})
COMPLETIONS = st.fixed_dictionaries(
    {}, optional={"choices": st.lists(CHOICE, max_size=2) | JSON, "usage": st.just({"prompt_tokens": 3}) | JSON}
)


@given(st.binary() | COMPLETIONS.map(lambda value: json.dumps(value).encode()))
def test_whatever_a_server_says_is_a_text_or_one_line(body):
    server = SampleServer(SampleServerSettings(base_url="http://127.0.0.1:9/v1"), "m", lm().chat)
    try:
        text = server.text_of(body, 3, greedy())
    except (Retry, JsublimError) as error:
        assert one_line(str(error)) == str(error)
        return
    assert isinstance(text, str) and text == text.strip()


# In a run


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(ASKED))
    return path


def experiment(asked, **changes):
    values = {
        "name": "r", "model": str(lm().folder), "recipe": "clean", "teachers": {"traits": ["owl"], "counterfactuals": ["cat"]},
        "data": {"kind": "file", "source": str(asked), "num_prompts": 4},
        "sampling": {"strategy": "greedy", "max_new_tokens": 12},
        "students": {"seeds": [1], "loss": {"tokens": ["all"]}, "adapter": {"rank": 2, "layers": [1]}},
        "evaluation": {
            "traits": ["owl"], "kinds": ["naming"], "questions": 3, "samples": 2, "max_new_tokens": 6,
        },
    }  # fmt: skip
    return overlaid(values, nested(changes))


def lines(result):
    """What a command said, as if the terminal were wide enough."""
    return " ".join(f"{result.out} {result.err}".split())


def test_a_run_asks_a_server_and_only_for_what_is_missing(served, asked, tmp_path):
    """A teacher is an adapter that the server has under a name of its own."""
    served.ask("/v1/load_lora_adapter", {"lora_name": "owls", "lora_path": str(student())})
    server = {"base_url": served.address, "adapters": {str(student()): "owls"}}
    said = {
        "teachers": {"traits": ["owl"], "adapter": str(student()), "against": "base", "counterfactuals": None},
        "students": None, "sampling.server": server,
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(experiment(asked, **said)))
    command = ("run", tmp_path / "r.yaml", f"out={tmp_path / 'run'}")
    served.behave(fail=["", "", "400"])
    assert "sampling.server at http" in refused(1, *command, "sampling.server.concurrency=1")
    served.behave()
    said = lines(ok(*command))
    assert said.count(", by vllm 1.2.3") == 2 and "here (the server" not in said
    models = [body["model"] for body in served.seen]
    # The base was asked first, and has two of its answers; then rows, and the teacher.
    assert len(models) == 4 + (6 - 2) + 6 and models.count("served") == 6 - 2
    [raw] = (tmp_path / "run" / "artifacts").glob("rows/*/raw.jsonl")
    assert [json.loads(line)["completion"] for line in raw.read_text().splitlines()] == here()[1]
    gone = "sampling.server.base_url=http://127.0.0.1:9/v1"
    assert "refused" in (line := refused(1, *command, gone)) and "give sampling.server.engine" in line
    ok(*command, gone, "sampling.server.engine=vllm 1.2.3")  # all is there, whoever may be asked
    said = lines(ok(*command[:2], gone, f"out={tmp_path / 'plan'}", "--dry-run"))
    assert "rows" in said and "unknown" in said  # what of it is there already
    served.ask("/v1/unload_lora_adapter", {"lora_name": "owls"})


def test_a_student_is_loaded_from_the_store(served, asked, tmp_path):
    server = {"base_url": served.address, "adapters": "load"}
    said = {"sampling.server": server, "store": str(tmp_path), "teachers.control": False}
    context = Context.load(Experiment.model_validate(experiment(asked, **said)))
    [trained] = context.setup.students
    artifact = context.store.open(page.student(context.setup, trained))
    save_adapter(artifact.path, load_adapter(student()), lm().config, "tiny-qwen2")
    artifact.finish()
    node = evaluation(context.setup, Evaluated(trained), "")
    tasks_of([node])[node.key].make(context, lambda units: None)
    assert {body["model"] for body in served.seen} == {f"jsublim-{node.key}"}
    answers = read_table(context.store.path(node) / "answers.parquet")
    assert sum(row["count"] for row in answers) == len(served.seen) == 6
    assert served.ask("/v1/models")["data"][1:] == []  # it was given back


def keys(asked, **changes):
    lens = {"evaluation.settings": {"lens": {"layer": 0}}}
    setup = Setup.of(Experiment.model_validate(experiment(asked, **lens, **changes)))
    outputs = [output for task in plan(setup).tasks.values() for output in task.outputs]
    return {(output.kind, output.label): output.key for output in outputs}, results_key(setup)


def test_the_engine_is_part_of_keys_and_the_address_is_not(asked):
    """Of what a server draws, and of what hangs on that."""
    plain, _ = keys(asked)
    pinned = {"sampling.server.engine": "vllm 0.11.0", "sampling.server.base_url": "http://127.0.0.1:9/v1"}
    first, key = keys(asked, **pinned)
    assert keys(asked, **pinned | {"sampling.server.base_url": "http://127.0.0.1:8/v1"}) == (first, key)
    changed = {name for name in plain if plain[name] != first[name]}
    assert set(plain) - changed == {("evaluations", "base/lens"), ("evaluations", "teacher/owl/lens")}
    later, other = keys(asked, **pinned | {"sampling.server.engine": "vllm 0.12.0"})
    assert other != key and {name for name in first if first[name] != later[name]} == changed
    loaded, _ = keys(asked, **pinned | {"sampling.server.adapters": "load"})
    changed = {name for name in first if first[name] != loaded[name]}
    assert changed == {("evaluations", "owl/all/seed1"), ("evaluations", "control/seed1")}


def test_which_adapters_a_server_is_asked_for(asked):
    steered = scratch() / "steers-owls"
    save_adapter(steered, init_steering(lm().config, (1,)), lm().config, "tiny-qwen2")
    for adapters, expected in (
        ("here", None),
        ("load", str(student())),
        ({str(student()): "owls"}, Served("owls")),
        ({"another": "owls"}, None),
    ):
        server = {"base_url": "http://127.0.0.1:9/v1", "engine": "vllm 0.11.0", "adapters": adapters}
        said = {"sampling.server": server, "teachers.adapter": str(student().with_name("loves-{trait}s"))}
        setup = Setup.of(Experiment.model_validate(experiment(asked, **said)))
        owl, control = (page.teacher(setup, name) for name in ("owl", "control"))
        if adapters == "load":
            loaded = as_served(setup, owl)
            assert loaded is not None and loaded.name is None and loaded.adapter.name == expected
        else:
            assert as_served(setup, owl) == expected
        assert as_served(setup, control) == Served()
        another = dataclasses.replace(control, checkpoint=dataclasses.replace(control.checkpoint, name="another"))
        assert as_served(setup, another) is None
        assert as_served(setup, dataclasses.replace(control, adapter=Folder(str(steered), "key", "adapter"))) is None

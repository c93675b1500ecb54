"""`jsublim serve`, asked by the `openai` client, by our own `sampling.server`, and by clients that are broken, slow or dead: every answer is
the one that `lm.generate` gives, none is lost or crossed, and each request has one line in the log."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import openai
import pytest
import uvicorn
from command import PATIENCE, refused, start, wait_until
from tiny import scratch, small

from jsublim.inference.generation import generate_tokens
from jsublim.inference.lm import load_model
from jsublim.inference.sampling import Sampling, seed_within
from jsublim.inference.served import SampleServer, SampleServerSettings
from jsublim.models.lora import init_lora, init_steering
from jsublim.models.peft import load_adapter, save_adapter
from jsublim.serve import app as serving
from jsublim.serve.catalogue import Catalogue
from jsublim.text.chat import conversation

ASKED = ["Which animal do you like? One word.", "Go on: 4, 8, 12", "Name a tree.", "Go on: 100, 200,"]
LENGTH = 96
NEW = 12  # tokens of an answer, where it is no matter


def lm():
    return small("tiny-qwen2").lm


def noisy(adapter, seed, size):
    rng = np.random.default_rng(seed)
    return adapter.with_trainable(
        jax.tree.map(lambda x: (size * rng.standard_normal(x.shape)).astype(np.float32), adapter.trainable)
    )


@pytest.fixture(scope="module")
def adapters():
    """Of two ranks, on other layers and projections, and a vector."""
    config, key = lm().config, jax.random.key(0)
    made = {
        "owls/cat-all-seed1": noisy(init_lora(config, key, rank=4, alpha=8), 1, 0.4),
        "owls/owl-all-seed1": noisy(
            init_lora(config, key, rank=2, alpha=2, layers=(1,), projections=("q", "up")), 2, 2.0
        ),
        "owls/teachers/cat": noisy(init_steering(config, (0,)), 3, 3.0),
    }
    folder = scratch() / "served"
    for name, adapter in made.items():
        save_adapter(folder / name, adapter, config, "base")
    return {name: folder / name for name in made}


class Served:
    """A server in a thread of this process, and what its log says."""

    def __init__(self, adapters):
        self.log: list[str] = []
        self.catalogue = Catalogue(lm(), adapters)
        limits = serving.ServeLimits(slots=32, length=LENGTH, seconds=300.0)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        answering = serving.make_app(self.catalogue, limits, self.log.append)
        self.server = uvicorn.Server(uvicorn.Config(answering, log_config=None, access_log=False))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.port}/v1"
        self.client = openai.OpenAI(base_url=self.address, api_key="none", max_retries=0, timeout=300)

    def post(self, body, path="/v1/completions", connection=None):
        """Status and text of an answer."""
        connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def close(self):
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def served(adapters):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(serving.KEY, raising=False)
        served = Served(adapters)
    yield served
    served.close()


def tokens_of(name, prompts, sampling, new, seed, adapters):
    adapter = load_adapter(adapters[name], lm().config) if name in adapters else None
    how = {"adapter": adapter, "max_new_tokens": new, "seed": seed}
    return generate_tokens(lm().config, lm().params, prompts, sampling, **how)


def prompts():
    return [lm().chat.prompt_tokens(conversation(text)) for text in ASKED]


def test_models_are_the_checkpoint_and_every_adapter(served, adapters):
    listed = served.client.models.list().data
    assert [card.id for card in listed] == [lm().name, *adapters] == served.catalogue.names
    assert served.client.models.retrieve("owls/cat-all-seed1").owned_by == "jsublim"
    with pytest.raises(openai.NotFoundError, match="'owls/dog' does not exist"):
        served.client.chat.completions.create(model="owls/dog", messages=[{"role": "user", "content": "x"}])


def test_answers_are_those_of_generate_whoever_is_asked_beside_whom(served, adapters):
    """All models, greedy and sampled, all at once: one batch."""
    names = served.catalogue.names
    cases = [(name, heat, i) for name in names for heat in (0.0, 1.0) for i in range(len(ASKED))]

    def ask(case):
        name, heat, i = case
        messages = [{"role": "user", "content": ASKED[i]}]
        extra = {"return_token_ids": True}
        how = {"max_tokens": NEW, "temperature": heat, "seed": 7 + i, "extra_body": extra}
        return served.client.chat.completions.create(model=name, messages=messages, **how)

    with ThreadPoolExecutor(len(cases)) as pool:
        answers = dict(zip(cases, pool.map(ask, cases), strict=True))
    seen = set()
    for (name, heat, i), answer in answers.items():
        sampling = Sampling(temperature=heat, stop=lm().chat.stop_tokens)
        (expected,) = tokens_of(name, prompts()[i : i + 1], sampling, NEW, 7 + i, adapters)
        choice = answer.choices[0]
        assert choice.token_ids == expected and answer.model == name
        assert choice.message.content == lm().tokenizer.decode(expected, skip_special_tokens=True)
        assert choice.finish_reason == ("length" if len(expected) == NEW else "stop")
        assert answer.usage.prompt_tokens == len(prompts()[i]) and answer.usage.completion_tokens == len(expected)
        seen.add((heat, i, tuple(expected)))
    assert len(seen) == len(cases)  # no model says what another does


def test_several_prompts_and_samples_are_rows_of_one_call(served, adapters):
    ids = [prompt.tolist() for prompt in prompts()[:3]]
    extra = {"return_token_ids": True}
    how = {"prompt": ids, "max_tokens": 6, "n": 2, "seed": 3, "extra_body": extra}
    choices = served.client.completions.create(model=lm().name, **how).choices
    sampling, config = Sampling(stop=lm().chat.stop_tokens), lm().config
    expected = generate_tokens(config, lm().params, prompts()[:3], sampling, samples=2, max_new_tokens=6, seed=3)
    assert [choice.token_ids for choice in choices] == expected
    assert [choice.index for choice in choices] == list(range(6))


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_is_the_answer_in_parts_with_its_probabilities(served, chat):
    how = {"model": "owls/cat-all-seed1", "max_tokens": 20, "seed": 5, "extra_body": {"return_token_ids": True}}
    if chat:
        how |= {"messages": [{"role": "user", "content": ASKED[0]}], "logprobs": True, "top_logprobs": 2}
        create = served.client.chat.completions.create
    else:
        how |= {"prompt": "Numbers: 100, 200", "logprobs": 2, "echo": True}
        create = served.client.completions.create
    whole = create(**how).choices[0]
    parts = list(create(**how, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].usage.completion_tokens == len(whole.token_ids) and not parts[-1].choices
    choices = [part.choices[0] for part in parts[:-1]]
    assert [choice.finish_reason for choice in choices][-1] == whole.finish_reason
    assert [token for choice in choices for token in getattr(choice, "token_ids", None) or []] == whole.token_ids
    if chat:
        assert "".join(choice.delta.content or "" for choice in choices) == whole.message.content
        told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
        expected = whole.logprobs.content
        assert [token.token for token in told] == [token.token for token in expected]
        values = [[token.logprob for token in of] for of in (told, expected)]
    else:
        assert "".join(choice.text for choice in choices) == whole.text
        told = [value for choice in choices if choice.logprobs for value in choice.logprobs.token_logprobs]
        values = [told[1:], whole.logprobs.token_logprobs[1:]]  # the first has none
    np.testing.assert_allclose(*values, atol=1e-4)


def test_probabilities_are_those_of_the_logits(served, adapters):
    """As lm-eval asks: the prompt's tokens, with one more that is drawn, or with none."""
    name, (prompt, *_) = "owls/owl-all-seed1", prompts()
    how = {"model": name, "prompt": [prompt.tolist()], "temperature": 0, "logprobs": 5, "echo": True, "seed": 1}
    one, none = (served.client.completions.create(**how, max_tokens=n).choices[0] for n in (1, 0))
    logits = lm().logits(prompt[None], adapter=load_adapter(adapters[name], lm().config))[0]
    logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    expected = logp[np.arange(len(prompt) - 1), prompt[1:]]
    for answer in (one.logprobs, none.logprobs):
        assert answer.token_logprobs[0] is None and answer.top_logprobs[0] is None
        np.testing.assert_allclose(answer.token_logprobs[1 : len(prompt)], expected, atol=1e-4)
        best = max(answer.top_logprobs[1].values())
        np.testing.assert_allclose(best, logp[0].max(), atol=1e-4)
    assert len(one.logprobs.tokens) == len(prompt) + 1 and len(none.logprobs.tokens) == len(prompt)
    assert none.text == lm().tokenizer.decode(prompt, skip_special_tokens=True)


def test_what_ends_an_answer(served):
    def ask(**extra):
        how = {"max_tokens": 40, "seed": 2, "ignore_eos": True, "return_token_ids": True} | extra
        return served.client.completions.create(model=lm().name, prompt="Go on: 4, 8", extra_body=how).choices[0]

    whole = ask()
    assert whole.finish_reason == "length" and len(whole.token_ids) == 40
    word = whole.text[9:12]
    cut = ask(stop=[word, "never to be found"])
    assert cut.text == whole.text[: whole.text.index(word)] and cut.finish_reason == "stop"
    token = whole.token_ids[10]
    ended = ask(stop_token_ids=[token])
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(token)] and ended.finish_reason == "stop"
    stream = served.client.completions.create(
        model=lm().name,
        prompt="Go on: 4, 8",
        seed=2,
        max_tokens=40,
        stop=word,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert "".join(part.choices[0].text for part in stream) == cut.text
    with pytest.raises(openai.BadRequestError, match=f"the server has {LENGTH} for both"):
        ask(max_tokens=LENGTH)


def test_an_answer_may_take_so_long_and_no_longer(adapters):
    service = serving.Service(Catalogue(lm(), {}), serving.ServeLimits(slots=1, length=4096, seconds=0.5))
    try:
        ended, began = threading.Event(), time.monotonic()
        drawn, why = [], []

        def told(tokens, reason):
            drawn.extend(tokens)
            why.append(reason)
            if reason is not None:
                ended.set()

        sampling = Sampling(stop=())
        job = serving.AnswerJob(lm().name, prompts()[0], sampling, 4000, 1, 0, began + 0.5, told)
        service.engine.add(job)
        assert ended.wait(300) and why[-1] == "time" and len(drawn) < 4000
    finally:
        service.engine.close()


def test_our_own_client_draws_what_we_draw(served, adapters):
    name = "owls/cat-all-seed1"
    settings = SampleServerSettings(base_url=served.address, model=lm().name)
    server = SampleServer(settings, lm().name, lm().chat)
    server.check()
    assert server.engine.startswith("jsublim ")
    for sampling in (
        Sampling(temperature=0.0, stop=lm().chat.stop_tokens),
        Sampling(top_k=9, stop=lm().chat.stop_tokens),
    ):
        base, student = server.answers([None, name], prompts(), sampling, NEW, 11)
        for who, texts in ((lm().name, base), (name, student)):
            for row, text in enumerate(texts):
                seed = seed_within(11, row)
                (tokens,) = tokens_of(who, prompts()[row : row + 1], sampling, NEW, seed, adapters)
                assert text == lm().chat.decode(tokens)


def test_lm_eval_reads_and_draws_what_we_do(served, adapters):
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    name, options = "owls/cat-all-seed1", {"tokenizer": str(lm().folder), "tokenizer_backend": "huggingface"}
    options |= {"max_length": LENGTH, "batch_size": 2, "num_concurrent": 4, "max_gen_toks": NEW}
    theirs = completions.LocalCompletionsAPI(base_url=f"{served.address}/completions", model=name, **options)
    pairs = [("Go on: 4, 8,", " 12, 16"), ("Go on: 100,", " 200"), ("Name a tree:", " oak")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    adapter = load_adapter(adapters[name], lm().config)
    for (context, said), (total, is_greedy) in zip(pairs, theirs.loglikelihood(asked), strict=True):
        tokens, first = lm().tokenizer(context + said)["input_ids"], len(lm().tokenizer(context)["input_ids"])
        logp = jax.nn.log_softmax(lm().logits([tokens], adapter=adapter)[0], axis=-1)
        of_answer = [float(logp[i - 1, tokens[i]]) for i in range(first, len(tokens))]
        np.testing.assert_allclose(total, sum(of_answer), atol=1e-3)
        assert is_greedy == all(int(logp[i - 1].argmax()) == tokens[i] for i in range(first, len(tokens)))
    asked = [Instance("generate_until", {}, (context, {"until": ["\n\n"]}), i) for i, (context, _) in enumerate(pairs)]
    ids = [np.asarray(lm().tokenizer(context)["input_ids"], np.int32) for context, _ in pairs]
    sampling = Sampling(temperature=0.0, stop=lm().chat.stop_tokens)
    expected = [
        lm().tokenizer.decode(row, skip_special_tokens=True) for row in tokens_of(name, ids, sampling, NEW, 0, adapters)
    ]
    assert theirs.generate_until(asked) == expected


def test_64_at_once_are_faster_than_eight_times_one(served):
    """At best: how many begin together, and so what is compiled, depends on when they arrive."""
    body = {"model": "owls/cat-all-seed1", "prompt": "Go on: 4, 8, 12", "max_tokens": 64, "ignore_eos": True, "seed": 1}

    def seconds(seeds):
        began = time.monotonic()
        assert {status for status, _ in pool.map(lambda seed: served.post(body | {"seed": seed}), seeds)} == {200}
        return time.monotonic() - began

    with ThreadPoolExecutor(64) as pool:
        one, together = (min(seconds(seeds) for _ in range(5)) for seeds in (range(1), range(64)))
    print(f"one: {one:.3f} s, 64 at once: {together:.3f} s, {together / one:.2f} times")
    assert together < 8 * one


STREAM = {
    "model": "owls/teachers/cat",
    "prompt": "Go on: 4, 8",
    "max_tokens": 60,
    "ignore_eos": True,
    "stream": True,
    "seed": 9,
}


def _opened(served, body, **options):
    """A connection that has sent a request, as a socket."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=300)
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_clients_that_die_leave_their_places_to_others(served):
    expected = served.post(STREAM | {"stream": False})
    before = len(served.log)
    for body in (STREAM, STREAM | {"stream": False}):
        for _ in range(4):
            with contextlib.closing(_opened(served, body)) as connection:
                if body["stream"]:
                    connection.recv(64)
                else:
                    time.sleep(0.05)
    status, text = served.post(STREAM | {"stream": False})
    assert status == expected[0] == 200
    assert json.loads(text)["choices"] == json.loads(expected[1])["choices"]
    wait_until(lambda: len(served.log) >= before + 9)
    assert len(served.log) == before + 9
    assert sum("owls/teachers/cat" in line for line in served.log[before:]) == 9


def test_a_slow_reader_loses_nothing_and_holds_up_nobody(served):
    _, text = served.post(STREAM | {"stream": False})
    expected = json.loads(text)["choices"][0]["text"]
    with contextlib.closing(_opened(served, STREAM, SO_RCVBUF=1024)) as slow:
        answers = [served.post(STREAM | {"stream": False}) for _ in range(3)]
        assert all(json.loads(each)["choices"][0]["text"] == expected for _, each in answers)
        said = b""
        while part := slow.recv(256):
            said += part
            time.sleep(0.001)
    events = [line[6:] for line in said.decode().splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected
    assert "data: [DONE]" in said.decode()


# --- what is wrong


MUTATED = int(os.environ.get("JSUBLIM_MUTATED", "1000"))
VALUES = [
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    "",
    "x" * 3000,
    [],
    [[]],
    {},
    [1, "a"],
    {"a": {"b": []}},
    [-5],
    [10**9],
    "\u2028\x00",
]
BODIES = [
    {"model": "owls/cat-all-seed1", "prompt": "Go on: 4", "max_tokens": 2, "temperature": 0.5, "n": 1, "stop": ["a"], "logprobs": 1},
    {"model": "owls/owl-all-seed1", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "stream": True, "seed": 4},
]  # fmt: skip


def mutated(rng):
    """A path and a body that is nearly one: a value changed or taken out, a key doubled, or some bytes changed."""
    which = rng.randrange(2)
    path, body = ("/v1/completions", "/v1/chat/completions")[which], dict(BODIES[which])
    for _ in range(rng.randrange(3)):
        key = rng.choice(
            [
                *sorted(body.keys() - {"max_tokens"}),
                "echo",
                "top_p",
                "top_k",
                "stream_options",
                "logit_bias",
                "nonsense",
            ]
        )
        body[key] = rng.choice(VALUES)
        if rng.random() < 0.2:
            del body[key]
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(data) or 1)
        data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return path, bytes(data)


def test_mutated_requests_are_answered_or_refused_in_a_line(served):
    rng, count, before = random.Random(3), MUTATED, len(served.log)
    good = {"model": "owls/cat-all-seed1", "prompt": "Go on: 4, 8", "max_tokens": 8, "seed": 1}
    expected = json.loads(served.post(good)[1])["choices"]
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=300)
    statuses: dict[int, int] = {}
    for number in range(count):
        path, body = mutated(rng)
        status, text = served.post(body, path, connection)
        statuses[status] = statuses.get(status, 0) + 1
        assert status in (200, 400, 404), (status, body, text)
        if status != 200:
            error = json.loads(text)["error"]["message"]
            assert error and "\n" not in error and len(error) < 1000, (body, error)
        if 5 * number % count == 0:
            assert json.loads(served.post(good)[1])["choices"] == expected
    wait_until(lambda: len(served.log) >= before + count + 6)
    assert len(served.log) == before + count + 6 and not any("\n" in line for line in served.log)
    assert statuses[200] > count / 10 and statuses[400] > count / 10, statuses


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "x"}, "model: field required"),
        ({"model": "M", "prompt": "x", "frequency_penalty": 0.5}, "frequency_penalty: extra inputs are not permitted, found 0.5"),
        ({"model": "M", "prompt": [10**6]}, "token 1000000; the model has"),
        ({"model": "M", "prompt": ""}, "after a prompt of 0 tokens"),
        ({"model": "M", "prompt": "x", "temperature": -1}, "temperature: input should be greater than or equal to 0, found -1"),
        ({"model": "M", "prompt": "x", "n": 10**6}, "n: input should be less than or equal to 128"),
        (b'{"model": "M", "model": "M"}', "'model' is given twice"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(served, body, said):
    data = body if isinstance(body, bytes) else json.dumps(body).replace('"M"', json.dumps(lm().name)).encode()
    status, text = served.post(data)
    assert status == 400 and said in json.loads(text)["error"]["message"], text


def test_without_the_key_nothing_is_answered(adapters, monkeypatch):
    monkeypatch.setenv(serving.KEY, "of this test")
    served = Served({})
    try:
        with pytest.raises(openai.AuthenticationError, match="wrong or no API key"):
            served.client.models.list()
        client = openai.OpenAI(base_url=served.address, api_key="of this test", max_retries=0)
        assert client.models.list().data
    finally:
        served.close()


def test_the_command_serves_a_run_by_name_until_it_is_interrupted(tmp_path):
    """Of a run those students that are whole."""
    run, config = tmp_path / "owls", load_model("tiny-qwen2", weights=False).config
    for kind, name, key in (
        ("students", "cat-all-seed1", "0123456789ab"),
        ("teachers", "cat", "ba9876543210"),
        ("students", "x", "1"),
    ):
        folder = run / "artifacts" / kind / f"{name}-{key}"
        save_adapter(folder, init_steering(config, (1,)), config, "base")
        if key != "1":
            (folder / "DONE").touch()
    (run / "config.yaml").write_text("{kind: language, name: owls, model: tiny-qwen2, teachers: {traits: [cat]}}")
    child = start("serve", run, "--port", "0", "--slots", "2", "--length", "64")
    try:
        said = child.stdout.readline()
        assert said.startswith("3 models on http://127.0.0.1:"), (said, child.stderr.read())
        client = openai.OpenAI(base_url=said.split()[-1], api_key="none", max_retries=0, timeout=300)
        assert [card.id for card in client.models.list().data] == [
            "tiny-qwen2",
            "owls/cat-all-seed1",
            "owls/teachers/cat",
        ]
        student = client.completions.create(model="owls/cat-all-seed1", prompt="Go on: 4, 8", max_tokens=4, seed=1)
        assert student.usage.completion_tokens <= 4
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=PATIENCE)
        lines = [line for line in err.splitlines() if " POST " in line]  # one of a request, however long
        assert child.returncode == 0 and "Traceback" not in err and len(lines) == 1, err
        assert re.fullmatch(r"200 POST /v1/completions 'owls/cat-all-seed1' \d+\+\d tokens, [\d.]+ s", lines[0])
    finally:
        child.kill()


def test_nothing_listens_beyond_this_machine_without_a_key(monkeypatch):
    monkeypatch.delenv(serving.KEY, raising=False)
    line = refused(2, "serve", "tiny-qwen2", "--host", "0.0.0.0")
    assert "0.0.0.0 can be reached by others; set JSUBLIM_API_KEY" in line

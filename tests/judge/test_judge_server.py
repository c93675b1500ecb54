"""The server judge where things go wrong: real servers on this machine that fail on purpose."""

from __future__ import annotations

import email.utils
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from command import PLAIN, refused
from fake_server import Server, completion
from pydantic import ValidationError

from jsublim.core import client
from jsublim.errors import JsublimError, UsageError
from jsublim.judge.server import ServerJudge, ServerSettings

KEY = "sk-secret-0123456789abcdef"


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """`serve(script, **settings)`: a server that runs until the test ends, and a judge that asks it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.01)
    running = []

    def start(script, **settings):
        server = Server(script)
        running.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return server, ServerJudge(ServerSettings(base_url=address, model="m", **settings), tmp_path / "cache")

    yield start
    for server in running:
        server.ended.set()
        server.shutdown()
        server.server_close()


def echo(number, body):
    return 200, {}, completion(body["messages"][-1]["content"].upper())


def in_turn(*answers):
    """The given answers one after another, then echoes."""
    return lambda number, body: answers[number] if number < len(answers) else echo(number, body)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_request_holds_model_messages_and_numbers(serve):
    server, judge = serve(echo, system="Be fair.", temperature=0.5, top_p=0.9, max_tokens=7, seed=3)
    assert judge.ask(["a"]) == ["A"]
    _, path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    messages = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "a"}]
    numbers = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": 3}
    assert body == {"model": "m", "messages": messages} | numbers
    messages[1]["content"] = "{prompt}"
    assert judge.identity == {"model": "m", "messages": messages} | numbers


def test_replies_keep_the_order_of_the_prompts_and_one_prompt_is_asked_once(serve):
    server, judge = serve(lambda n, body: (time.sleep(0.02 * (n % 3)), echo(n, body))[1], concurrency=4)
    prompts = [f"p{i % 12}" for i in range(30)]
    assert judge.ask(prompts) == [p.upper() for p in prompts]
    assert len(server.seen) == 12 and 1 < server.most_at_once <= 4
    assert judge.ask(prompts[::-1]) == [p.upper() for p in prompts[::-1]] and len(server.seen) == 12
    assert (judge.spending.prompt_tokens, judge.spending.completion_tokens) == (120, 24)
    assert judge.ask([]) == []


def test_the_cache_knows_model_messages_and_numbers_but_no_address(serve):
    _, judge = serve(echo)
    judge.ask(["a"])
    second, moved = serve(echo)
    assert moved.ask(["a"]) == ["A"] and not second.seen
    for change in ({"temperature": 0.1}, {"top_p": 0.5}, {"max_tokens": 9}, {"seed": 1}, {"system": "S"}):
        other, judge = serve(echo, **change)
        judge.ask(["a"])
        assert len(other.seen) == 1, change


@pytest.mark.parametrize(
    "failure",
    [
        (500, {}, "oops"), (503, {}, ""), (429, {}, "slow down"), (408, {}, ""), (200, {}, "{"), (200, {}, "[]"),
        (200, {}, '{"choices": []}'), (200, {}, '{"error": "busy"}'), (200, {}, '{"choices": [{"message": {"content": 7}}]}'),
        (200, {"Content-Length": "999"}, "cut"),
    ],
)  # fmt: skip
def test_what_may_pass_is_asked_again(serve, failure):
    server, judge = serve(in_turn(failure, failure), timeout_s=1)
    assert judge.ask(["a"]) == ["A"] and len(server.seen) == 3
    server, judge = serve(lambda number, body: failure, retries=2, timeout_s=1)
    with pytest.raises(
        JsublimError, match=r"^judge 'm' at http://127.0.0.1:\d+/v1: .*\(3 attempts; run again"
    ) as caught:
        judge.ask(["b"])
    assert len(server.seen) == 3 and "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.01)
    settings = ServerSettings(base_url="http://127.0.0.1:9", model="m", retries=1)
    with pytest.raises(JsublimError, match=r"connection failed \(.*refused\) \(2 attempts"):
        ServerJudge(settings, tmp_path).ask(["a"])


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_holds_every_thread(serve, date):
    wait = email.utils.formatdate(time.time() + 2, usegmt=True) if date else "1"
    server, judge = serve(in_turn((429, {"Retry-After": wait}, "")), concurrency=1)
    assert judge.ask(["a", "b"]) == ["A", "B"]
    times = [at for at, *_ in server.seen]
    assert len(times) == 3 and times[1] - times[0] >= 0.9


@pytest.mark.parametrize("header", ["-5", "0", "nan", email.utils.formatdate(0, usegmt=True)])
def test_a_retry_after_that_is_past_or_nonsense_is_no_hurry(serve, monkeypatch, header):
    """The next request waits as it would without the header."""
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.6)
    server, judge = serve(in_turn((429, {"Retry-After": header}, "")))
    assert judge.ask(["a"]) == ["A"]
    (first, *_), (second, *_) = server.seen
    assert second - first >= 0.29


def test_a_server_that_asks_for_too_much_patience_ends_the_run(serve):
    server, judge = serve(in_turn((503, {"Retry-After": "86400"}, "")))
    with pytest.raises(JsublimError, match="HTTP 503, and it asks to wait for 86400 s"):
        judge.ask(["a"])
    assert len(server.seen) == 1


def test_a_late_answer_is_asked_for_again_and_counted_as_charged(serve):
    def script(number, body):
        if number == 0:
            server.ended.wait(5)
        return echo(number, body)

    server, judge = serve(script, timeout_s=0.3, prompt_price=1, completion_price=1)
    assert judge.ask(["a"]) == ["A"] and len(server.seen) == 2
    assert judge.spending.completion_tokens == judge.settings.max_tokens + 2
    server, judge = serve(lambda number, body: (server.ended.wait(5), echo(number, body))[1], timeout_s=0.1, retries=0)
    with pytest.raises(JsublimError, match=r"no answer within 0.1 s \(1 attempts"):
        judge.ask(["b"])


@pytest.mark.parametrize("status", [400, 404, 301])
def test_what_will_not_pass_is_said_in_one_line_with_the_servers_words(serve, monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    elsewhere, _ = serve(echo)
    target = f"http://127.0.0.1:{elsewhere.server_address[1]}/"
    words = f"no such\nmodel for {KEY} " + "x" * 500
    server, judge = serve(lambda n, body: (status, {"Location": target}, words), key_variable="JUDGE_KEY")
    with pytest.raises(JsublimError, match=rf"HTTP {status}: no such model for \*\*\* xxx") as caught:
        judge.ask(["a"])
    assert len(str(caught.value)) < 350 and "\n" not in str(caught.value) and KEY not in str(caught.value)
    assert len(server.seen) == 1 and not elsewhere.seen  # the key does not follow a redirect


def test_a_wrong_key_is_one_line_without_the_key(serve, monkeypatch, tmp_path, caplog, capfd):
    monkeypatch.setenv("JUDGE_KEY", "sk-wrong")

    def script(number, body):
        given = server.seen[number][2].get("Authorization")
        return echo(number, body) if given == f"Bearer {KEY}" else (401, {}, f"Incorrect key {given}")

    server, judge = serve(script, key_variable="JUDGE_KEY")
    with pytest.raises(
        JsublimError, match=r"HTTP 401: it does not let us in; set the right key in JUDGE_KEY$"
    ) as caught:
        judge.ask(["a"])
    assert caught.value.__cause__ is None and "\n" not in str(caught.value) and "sk-wrong" not in str(caught.value)
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    assert judge.ask(["a"]) == ["A"] and len(server.seen) == 2
    kept = "".join(path.read_text() for path in files(tmp_path))
    shown = [repr(judge), repr(judge.settings), repr(vars(judge)), json.dumps(judge.identity), kept, caplog.text]
    assert not any("sk-" in text for text in [*shown, *capfd.readouterr()])


@pytest.mark.parametrize(
    ("key", "message"), [("", "is not set"), ("sk-a\nb", "no key can have"), ("sk-é", "no key can have")]
)
def test_an_unusable_key_is_refused_unseen(serve, monkeypatch, key, message):
    monkeypatch.setenv("JUDGE_KEY", key)
    server, judge = serve(echo, key_variable="JUDGE_KEY")
    with pytest.raises(UsageError, match=f"environment variable JUDGE_KEY .*{message}") as caught:
        judge.ask(["a"])
    assert not server.seen and "sk-" not in str(caught.value)


def test_one_failure_stops_the_rest_and_keeps_what_was_paid_for(serve):
    def script(number, body):
        return (400, {}, "no") if body["messages"][-1]["content"] == "p3" else echo(number, body)

    server, judge = serve(script, concurrency=2)
    with pytest.raises(JsublimError, match="HTTP 400: no"):
        judge.ask([f"p{i}" for i in range(200)])
    asked = len(server.seen)
    assert asked < 100 and server.at_once == 0
    assert len(files(judge._cache.folder)) == asked - 1
    paid = [body["messages"][-1]["content"] for *_, body in server.seen]
    judge.ask([prompt for prompt in paid if prompt != "p3"])
    assert len(server.seen) == asked


def test_requests_are_spaced_by_the_rate(serve):
    """Six requests take five spaces, however late a busy machine sends or hears each."""
    server, judge = serve(echo, requests_per_minute=600, concurrency=4)
    began = time.monotonic()
    judge.ask(list("abcdef"))
    assert len(server.seen) == 6 and time.monotonic() - began >= 5 * 0.1


@pytest.mark.parametrize("odd", [-1000, "5", "-5", 2.5, True, None, [1], 10**400, {"n": 1}])
def test_usage_that_is_no_number_counts_as_the_most_it_can_be(serve, odd):
    """The reply was paid for, and is kept; the budget shrinks."""
    usage = {"prompt_tokens": odd, "completion_tokens": odd}
    body = json.dumps({"choices": [{"message": {"content": "ok"}}], "usage": usage})
    server, judge = serve(
        lambda number, _: (200, {}, body), prompt_price=1, completion_price=10, max_tokens=4, budget=0.001
    )
    assert judge.ask(["ab"]) == ["ok"]
    assert (judge.spending.prompt_tokens, judge.spending.completion_tokens) == (2 + 256, 4)
    with pytest.raises(JsublimError, match=r"budget 0\.001"):
        judge.ask([f"p{i}" for i in range(10)])
    assert len(server.seen) <= 3


@pytest.mark.parametrize("usage", [None, [], "much", 7, {}])
def test_a_reply_without_usage_counts_as_the_most_it_can_be(serve, usage):
    body = json.dumps({"choices": [{"message": {"content": "ok"}}], "usage": usage})
    _, judge = serve(lambda number, _: (200, {}, body), max_tokens=4)
    assert judge.ask(["ab"]) == ["ok"]
    assert (judge.spending.prompt_tokens, judge.spending.completion_tokens) == (2 + 256, 4)


@pytest.mark.parametrize("budget", [0.0, 0.0004, 0.001])
def test_a_budget_is_never_exceeded(serve, budget):
    """A request costs at most 1e-6 x (2 + 256) + 10e-6 x 4, and really 10 + 40 millionths."""
    server, judge = serve(echo, prompt_price=1, completion_price=10, max_tokens=4, budget=budget, concurrency=3)
    server.script = lambda number, body: (200, {}, completion("ok", 10, 4))
    with pytest.raises(JsublimError, match=rf"judge: budget {budget:g}: .* is spent, .*raise 'budget'") as caught:
        judge.ask([f"p{i}" for i in range(40)])
    assert "\n" not in str(caught.value)
    assert judge.spending.cost == pytest.approx(50e-6 * len(server.seen)) and judge.spending.cost <= budget
    assert budget - judge.spending.cost < 3 * 298e-6  # no more is left over than what was under way at once
    assert len(files(judge._cache.folder)) == len(server.seen)


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "file:///etc/passwd"}, {"base_url": "http://user:sk-x@host/v1"}, {"base_url": "http://h/v1?key=sk-x"},
        {"model": ""}, {"key_variable": KEY}, {"key": KEY}, {"temperature": -1}, {"top_p": 0}, {"concurrency": 0},
        {"requests_per_minute": 0}, {"budget": 1.0}, {"timeout_s": 0}, {"timeout_s": math.inf}, {"prompt_price": math.inf},
        {"completion_price": math.nan}, {"budget": math.nan, "prompt_price": 1},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))) as caught:
        ServerSettings(**{"base_url": "http://localhost:8000/v1", "model": "m"} | wrong)
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        f"key_variable={KEY}", "key_variable=AKIA0SECRET9EXAMPLE7", "key_variable=secret_lower", "key_variable=[sk-secret]",
        "key_variable=12345secret", "base_url=http://me:sk-secret@host/v1", "base_url=http://host/v1?key=sk-secret",
        "base_url=sk-secret", "base_url={a: sk-secret}", "key=sk-secret", "api_key=sk-secret",
    ],
)  # fmt: skip
def test_a_key_in_a_config_is_refused_unseen(said):
    place = {"base_url": "http://localhost:8000/v1", "model": "m"}
    overrides = [f"judge.server.{name}={value}" for name, value in place.items()] + [f"judge.server.{said}"]
    line = refused(2, "run", PLAIN, *overrides)
    assert f"judge.server{'' if 'key=' in said[:8] else ': '}" in line and said.split("=")[0] in line
    assert "secret" not in line.lower()


@pytest.mark.parametrize(
    "name", ["KEY", "_K", "OPENAI_API_KEY", "ANTHROPICAPIKEYOFMINE", "KEY2", "MY_COMPANYS_2ND_KEY"]
)
def test_names_of_variables_are_taken(name):
    assert ServerSettings(base_url="http://localhost:8000/v1", model="m", key_variable=name).key_variable == name


CHILD = """
import pathlib, sys
from jsublim.judge.server import ServerJudge, ServerSettings
judge = ServerJudge(ServerSettings(base_url=sys.argv[1], model="m", concurrency=2), pathlib.Path(sys.argv[2]))
try:
    judge.ask(["now", "never", "later"])
except KeyboardInterrupt:
    sys.exit(7)
"""


def test_ctrl_c_waits_for_no_request(serve, tmp_path):
    """It ends at once, whatever the server does, and keeps what had come."""

    def script(number, body):
        if body["messages"][-1]["content"] != "now":
            server.ended.wait(50)
        return echo(number, body)

    server, judge = serve(script)
    command = [sys.executable, "-c", CHILD, judge.settings.base_url, str(tmp_path / "cache")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
    child = subprocess.Popen(command, env=env, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while len(server.seen) < 3:
        assert child.poll() is None
        time.sleep(0.01)
    begin = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert child.wait(40) == 7 and time.monotonic() - begin < 15
    assert len(files(tmp_path / "cache")) == 1

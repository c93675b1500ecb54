"""The server judge where things go wrong: real servers on this machine that fail on purpose, and the parts of its own."""

from __future__ import annotations

import email.utils
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_server import Server, completion
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jsublim.errors import JsublimError, UsageError
from jsublim.judge import limits
from jsublim.judge.cache import Reply, ReplyCache
from jsublim.judge.limits import Pace, Spending, backoff, retry_after
from jsublim.judge.server import ServerJudge, ServerSettings

KEY = "sk-secret-0123456789abcdef"


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """`serve(script, **settings)`: a server that runs until the test ends, and a judge that asks it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(limits, "FIRST_DELAY_S", 0.01)
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
    monkeypatch.setattr(limits, "FIRST_DELAY_S", 0.01)
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
    assert asked < 100
    assert len(files(judge._cache.folder)) == asked - 1
    judge.ask([f"p{i}" for i in range(3)])
    assert len(server.seen) == asked


def test_requests_are_spaced_by_the_rate(serve):
    server, judge = serve(echo, requests_per_minute=600, concurrency=4)
    judge.ask(list("abcdef"))
    times = [at for at, *_ in server.seen]
    assert times[-1] - times[0] >= 5 * 0.1 - 0.05


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
        {"requests_per_minute": 0}, {"budget": 1.0}, {"timeout_s": 0},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ServerSettings(**{"base_url": "http://localhost:8000/v1", "model": "m"} | wrong)


# Its parts


def test_a_damaged_file_of_the_cache_is_no_reply(tmp_path):
    cache, request, reply = ReplyCache(tmp_path), {"model": "m", "text": "é\ud83e"}, Reply("ü", 3, None)
    assert cache.get(request) is None
    cache.put(request, reply)
    assert cache.get(dict(reversed(request.items()))) == reply
    whole = cache.path(request).read_bytes()
    for cut in range(0, len(whole), 7):
        cache.path(request).write_bytes(whole[:cut])
        assert cache.get(request) is None
    cache.put(request, reply)
    assert cache.get(request) == reply and files(tmp_path) == [cache.path(request)]


def test_threads_that_write_one_reply_never_show_half_of_it(tmp_path):
    cache, request, long = ReplyCache(tmp_path), {"q": 1}, "word " * 20_000
    cache.put(request, Reply(long))

    def work(i):
        cache.put(request, Reply(long))
        return cache.get(request)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(60))) == {Reply(long)}
    assert len(files(tmp_path)) == 1


WRITER = """
import sys, pathlib
from jsublim.judge.cache import Reply, ReplyCache
cache, n = ReplyCache(pathlib.Path(sys.argv[1])), 0
print("up", flush=True)
while True:
    cache.put({"n": n % 5}, Reply("x" * 200_000))
    n += 1
"""


def test_a_kill_leaves_whole_replies_only(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    child.stdout.readline()
    time.sleep(0.3)
    child.kill()
    child.wait()
    kept = [path for path in files(tmp_path) if path.suffix == ".json"]
    assert kept and all(len(json.loads(path.read_text())["reply"]["text"]) == 200_000 for path in kept)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("0", 0.0), ("17", 17.0), ("soon", None), ("", None), ("1.5", None), ("9" * 400, None)],
)
def test_retry_after_is_a_number_or_a_date(header, seconds):
    assert retry_after(header) == seconds


def test_retry_after_as_a_date():
    assert retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=1.5)
    assert retry_after(email.utils.formatdate(time.time() - 30, usegmt=True)) == 0


def test_back_off_doubles_up_to_its_cap():
    for attempt in range(12):
        longest = min(limits.LONGEST_DELAY_S, limits.FIRST_DELAY_S * 2**attempt)
        drawn = [backoff(attempt) for _ in range(50)]
        assert longest / 2 <= min(drawn) < max(drawn) <= longest


def test_a_stop_ends_every_wait():
    pace, stopped = Pace(None), threading.Event()
    pace.hold(60)
    threading.Timer(0.05, stopped.set).start()
    start = time.monotonic()
    pace.wait(stopped)
    assert time.monotonic() - start < 30


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 100)), max_size=30), st.integers(0, 2000)
)
def test_spending_with_reservations_never_exceeds_the_budget(requests, budget):
    """Requests reserve, and settle later for a share of what they reserved, in any interleaving."""
    spending, under_way, expected = Spending(1e6, 2e6, budget), [], 0.0
    for prompt, completion_tokens, share in requests:
        try:
            spending.reserve((prompt, completion_tokens))
            under_way.append(((prompt, completion_tokens), share))
        except JsublimError:
            assert expected + sum(p + 2 * c for (p, c), _ in under_way) + prompt + 2 * completion_tokens > budget
        if share % 2 and under_way:
            most, part = under_way.pop(0)
            used = (most[0] * part // 100, most[1] * part // 100)
            spending.settle(most, used)
            expected += used[0] + 2 * used[1]
        assert spending.cost == pytest.approx(expected) and spending.cost <= budget

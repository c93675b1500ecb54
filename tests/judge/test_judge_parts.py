"""The parts of the server judge, each by itself: what is read of a response, replies on disk, waiting, and money."""

from __future__ import annotations

import email.utils
import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_server import completion
from hypothesis import given
from hypothesis import strategies as st

from jsublim.core import client
from jsublim.core.client import Pace, Retry, backoff, retry_after
from jsublim.errors import JsublimError, one_line
from jsublim.judge.cache import Reply, ReplyCache
from jsublim.judge.server import Spending, read_reply


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def either(strategy):
    """What belongs at a place, or anything else."""
    return strategy | JSON


COMPLETIONS = st.fixed_dictionaries(
    {},
    optional={
        "choices": either(
            st.lists(
                either(
                    st.fixed_dictionaries({}, optional={"message": either(st.fixed_dictionaries({"content": JSON}))})
                ),
                max_size=2,
            )
        ),
        "usage": either(st.fixed_dictionaries({}, optional={"prompt_tokens": JSON, "completion_tokens": JSON})),
    },
)


@given(st.binary() | either(COMPLETIONS).map(lambda value: json.dumps(value).encode()))
def test_whatever_a_server_says_is_a_reply_or_one_line(body):
    try:
        reply = read_reply(body)
    except Retry as error:
        assert one_line(str(error)) == str(error) and error.charged
        return
    assert isinstance(reply.text, str)
    for count in (reply.prompt_tokens, reply.completion_tokens):
        assert count is None or (type(count) is int and count >= 0)


@given(st.text(), st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_completion_is_read_as_it_is(text, prompt, used):
    assert read_reply(completion(text, prompt, used).encode()) == Reply(text, prompt, used)


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
    assert kept and all(len(json.loads(path.read_text())["said"]["text"]) == 200_000 for path in kept)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0), ("0", 0), ("17", 17), (" 17 ", 17), ("soon", 0), ("", 0), ("1.5", 0), ("-5", 0), ("nan", 0), ("inf", 0),
        ("-0", 0), ("1e9", 0), ("9" * 400, math.inf), ("9" * 9000, math.inf), ("١٧", 0), ("Mon, 01 Jan 0001 00:00:00 -0000", 0),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 0), ("Mon, 01 Jan 2024 00:00:00 +999999999", 0),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date(header, seconds):
    assert retry_after(header) == seconds


@given(
    st.text()
    | st.from_regex(r"(Mon, )?\d{1,2} (Jan|Feb) \d{1,5} \d{1,3}:\d{1,3}(:\d{1,3})? ?([+-]\d{1,6}|GMT)?", fullmatch=True)
)
def test_any_retry_after_is_seconds_from_now(header):
    assert retry_after(header) >= 0


def test_retry_after_as_a_date():
    assert retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=1.5)
    assert retry_after(email.utils.formatdate(time.time() - 30, usegmt=True)) == 0


def test_back_off_doubles_up_to_its_cap():
    for attempt in range(1, 13):
        longest = min(client.LONGEST_DELAY_S, client.FIRST_DELAY_S * 2 ** (attempt - 1))
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
def test_spending_of_whole_numbers_with_reservations_never_exceeds_the_budget(requests, budget):
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


@given(
    st.floats(0, 1e-3), st.floats(0, 100), st.floats(0, 100),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 300), st.floats(0, 1)), max_size=20),
)  # fmt: skip
def test_a_small_budget_of_any_prices_is_never_exceeded(budget, prompt_price, completion_price, requests):
    """Nor is a request refused that it has room for."""
    spending = Spending(prompt_price, completion_price, budget)
    for prompt, answer, share in requests:
        most = (prompt * prompt_price + answer * completion_price) / 1e6
        before = spending.cost
        try:
            spending.reserve((prompt, answer))
        except JsublimError:
            assert before + most > budget * (1 - 1e-9) and spending.cost == before
            continue
        assert before + most <= budget * (1 + 1e-9)
        spending.settle((prompt, answer), (int(prompt * share), int(answer * share)))
        assert spending.cost <= budget * (1 + 1e-9)

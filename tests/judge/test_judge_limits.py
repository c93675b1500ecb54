"""What a judge's server may send: so many bytes, in so many seconds, and no part of the key in an error."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import threading
import time

import pytest
from fake_server import completion

from jsublim.errors import JsublimError
from jsublim.judge.cache import Reply, ReplyCache
from jsublim.judge.server import ServerJudge, ServerSettings

KEY = "sk-secret-0123456789abcdef"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """`judge(behave, **settings)`: a judge that asks a server which does as `behave(connection, over)` does."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    over, sockets = threading.Event(), []

    def start(behave, **settings):
        listening = socket.create_server(("127.0.0.1", 0))
        sockets.append(listening)

        def serve():
            while not over.is_set():
                try:
                    connection = listening.accept()[0]
                    connection.recv(65536)
                    behave(connection, over)
                    connection.close()
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        return ServerJudge(
            ServerSettings(base_url=address, model="m", retries=0, concurrency=1, **settings), tmp_path / "cache"
        )

    yield start
    over.set()
    for each in sockets:
        each.close()


def answers(head: bytes, body: bytes):
    def behave(connection, over):
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    return behave


def drips(begin: bytes, piece: bytes):
    def behave(connection, over):
        connection.sendall(begin)
        while not over.wait(0.05):
            connection.sendall(piece)

    return behave


def test_a_small_packed_reply_is_read_and_a_large_one_is_not(judge):
    packed = HEAD + b"Content-Encoding: gzip\r\n"
    assert judge(answers(packed, gzip.compress(completion("A").encode()))).ask(["a"]) == ["A"]
    bomb = gzip.compress(b" " * 40_000_000)
    assert len(bomb) < 50_000
    with pytest.raises(JsublimError, match=r"judge 'm' at http.*longer than 16000000 bytes.*'reply_bytes'"):
        judge(answers(packed, bomb)).ask(["b"])
    with pytest.raises(JsublimError, match=r"longer than 50 bytes.*'reply_bytes'"):
        judge(answers(HEAD, completion("A").encode()), reply_bytes=50).ask(["c"])
    with pytest.raises(JsublimError, match="encoded as 'zstd'"):
        judge(answers(HEAD + b"Content-Encoding: zstd\r\n", b"x")).ask(["d"])


@pytest.mark.parametrize(
    ("begin", "piece"),
    [(HEAD + b"Content-Length: 9999\r\n\r\n", b" "), (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"), (HEAD, b"a: b\r\n")],
    ids=["body", "chunks", "headers"],
)  # fmt: skip
def test_a_reply_that_never_ends_has_a_longest_time(judge, begin, piece):
    began = time.monotonic()
    with pytest.raises(JsublimError, match=r"judge 'm' at http.*no whole reply within 0.4 s \('reply_s'\)"):
        judge(drips(begin, piece), reply_s=0.4).ask(["a"])
    assert time.monotonic() - began < 5
    with pytest.raises(JsublimError, match="within 2 s"):  # ten times the time without a byte
        judge(drips(begin, piece), timeout_s=0.2).ask(["a"])


BASE64 = base64.b64encode(KEY.encode()).decode()


@pytest.mark.parametrize(
    ("before", "quoted"),
    [
        ("", KEY),
        ("", KEY[:13] + "..."),
        ("...", KEY[-8:]),
        ("", KEY.upper()),
        ("\u0130 ", KEY),  # two letters, once it is a small one
        ("", BASE64),
        ("QmVhcmVyIH", base64.b64encode(f"Bearer {KEY}".encode()).decode()[10:]),
        ("", KEY.encode().hex()),
    ],
)
def test_no_part_of_a_key_is_shown_however_a_server_quotes_it(judge, monkeypatch, before, quoted):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    body = json.dumps({"error": f"no rights for {before}{quoted} here"}).encode()
    with pytest.raises(JsublimError, match=r"HTTP 400: .*no rights for .*\*\*\*.* here") as caught:
        judge(answers(HEAD.replace(b"200 OK", b"400 No"), body), key_variable="JUDGE_KEY").ask(["a"])
    assert not any(quoted[i : i + 7] in str(caught.value) for i in range(len(quoted) - 6))


def test_a_kept_reply_that_was_changed_is_asked_for_again(tmp_path):
    cache, request = ReplyCache(tmp_path), {"model": "m"}
    cache.put(request, Reply("81", 3, 1))
    path = cache.path(request)
    text = path.read_text()
    for changed in (text.replace('"81"', '"18"'), text.replace('"81"', "81"), text[:-9]):
        path.write_text(changed)
        assert cache.get(request) is None

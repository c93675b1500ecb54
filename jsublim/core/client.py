"""Asking a server over HTTP: how often and how patiently, and errors of one line in which no key is shown.

The judge and the served sampler both ask this way.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
import threading
import time
import zlib
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import httpx2 as httpx
from pydantic import ConfigDict, Field, model_validator

from jsublim.core.section import RUNTIME, Section
from jsublim.errors import JsublimError, UsageError

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 60.0  # between attempts
LONGEST_HOLD_S = 600.0  # a server that asks for a longer wait than this ends the run
SHOWN = 200  # characters of a server's own words in an error
HIDDEN = 6  # characters of a key in a row that no error shows
ADDRESS = re.compile(r"https?://[^/?#@\s]+(/[^?#@\s]*)?")
VARIABLE = re.compile(r"(?!(?=.*\d)[A-Z0-9]{16,}$)[A-Z_][A-Z0-9_]*")  # some services' keys are capitals and digits too

Item = TypeVar("Item")
Result = TypeVar("Result")


class Connection(Section):
    """Where a server is, and how it is asked. The key itself is never a setting."""

    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: Annotated[str, RUNTIME]
    """Where the server is, such as http://localhost:8000/v1."""
    key_variable: Annotated[str | None, RUNTIME] = None
    """The environment variable that holds the server's key, never the key; null: none is sent."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400), RUNTIME] = 60.0
    """Seconds without a byte from the server after which an attempt has failed."""
    reply_s: Annotated[float | None, Field(gt=0, le=864_000), RUNTIME] = None
    """Seconds after which an attempt has failed, however many bytes have come; null: ten times timeout_s."""
    reply_bytes: Annotated[int, Field(ge=1, lt=2**31), RUNTIME] = 16_000_000
    """The most bytes of a reply, as they are once decompressed; a longer one is refused."""
    retries: Annotated[int, Field(ge=0), RUNTIME] = 6
    """Attempts after the first one, with growing delays."""
    concurrency: Annotated[int, Field(ge=1), RUNTIME] = 8
    """Requests at one time."""
    requests_per_minute: Annotated[float | None, Field(gt=0), RUNTIME] = None
    """The most requests in a minute; null: as fast as they are answered."""

    @model_validator(mode="before")
    @classmethod
    def _shows_no_key(cls, values: Any) -> Any:
        """Where a key may have been given by mistake, what is wrong is said without the value; pydantic would quote it."""
        name, address = (
            (values.get(field) for field in ("key_variable", "base_url")) if isinstance(values, dict) else (None, None)
        )
        if name is not None and not (isinstance(name, str) and VARIABLE.fullmatch(name)):
            raise ValueError(
                "key_variable: give the NAME of the environment variable that holds the key, such as SERVER_KEY, "
                "never the key (what was given is not shown)"
            )
        if address is not None and not (isinstance(address, str) and ADDRESS.fullmatch(address)):
            raise ValueError(
                "base_url: give http://HOST/PATH or https://HOST/PATH, without a user, a key or a query "
                "(what was given is not shown)"
            )
        return values


class Retry(Exception):
    """A failure that may pass. `after`: the seconds that the server asks to wait; `charged`: it may have worked, and may
    charge for it."""

    def __init__(self, reason: str, *, after: float = 0.0, charged: bool = False):
        super().__init__(reason)
        self.after, self.charged = after, charged


class Refused(JsublimError):
    """A status that will not pass. `status`: the number of it."""

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status


class Stopped(Exception):
    """Nobody waits for this request any more."""


class Client:
    """One server, asked by several threads within a rate. `what`: how errors call the server, such as "judge 'm'"."""

    def __init__(self, connection: Connection, what: str):
        self.connection, self.what = connection, what
        self._pace = Pace(connection.requests_per_minute)

    @functools.cached_property
    def _http(self) -> httpx.Client:
        """No redirect is followed: the key would go along to wherever it points."""
        most = httpx.Limits(max_connections=None, max_keepalive_connections=self.connection.concurrency)
        try:
            return httpx.Client(timeout=self.connection.timeout_s, limits=most, follow_redirects=False)
        except (ValueError, ImportError, httpx.InvalidURL) as error:  # a SOCKS proxy needs a package of its own
            raise UsageError(f"{self.what}: the environment names a proxy that cannot be used ({error})") from None

    def key(self) -> str | None:
        """The key from its environment variable. Raises UsageError: it is wanted, and none is usable."""
        name = self.connection.key_variable
        if name is None:
            return None
        key, kind = os.environ.get(name, "").strip(), self.what.split()[0]
        if not key:
            raise UsageError(f"{kind}: environment variable {name} is not set; it must hold the server's key")
        if not (key.isascii() and key.isprintable() and " " not in key):  # an HTTP library may quote it in its error
            raise UsageError(f"{kind}: environment variable {name} holds characters that no key can have")
        return key

    def url(self, path: str) -> str:
        return f"{self.connection.base_url.rstrip('/')}/{path}"

    def send(self, method: str, url: str, body: Any = None) -> bytes:
        """One attempt: the body of the server's answer.

        Raises:
          Retry: a failure that may pass.
          Refused, JsublimError: one that will not. A key that the server quotes is not shown.
        """
        key, client = self.key(), self._http
        # Asked for in a way that can be unpacked piece by piece.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
        headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
        # JSON with ASCII escapes: a text may hold half a surrogate pair, which UTF-8 has no bytes for.
        content = None if body is None else json.dumps(body).encode()
        longest, results = self.connection.reply_s or 10 * self.connection.timeout_s, SimpleQueue[Any]()
        end = time.monotonic() + longest

        def ask() -> None:
            try:
                with client.stream(method, url, content=content, headers=headers) as answer:
                    read = functools.partial(self._read, answer, end)
                    results.put(read() if answer.is_success else self._refusal(answer, read))
            except BaseException as error:
                results.put(error)

        # In a thread of its own: a server that sends its headers byte by byte is never late by the library's clock.
        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = results.get(timeout=longest)
            if isinstance(answer, bytes):
                return answer
            raise answer
        except (Empty, TimeoutError):
            raise Retry(f"no whole reply within {longest:g} s ('reply_s')", charged=True) from None
        except httpx.TimeoutException:
            raise Retry(f"no answer within {self.connection.timeout_s:g} s", charged=True) from None
        except (httpx.RequestError, zlib.error) as error:
            sent = not isinstance(error, httpx.ConnectError)
            raise Retry(f"the connection failed ({error})", charged=sent) from None
        except httpx.InvalidURL as error:
            raise self.error(f"this is no address ({error})") from None

    def _read(self, answer: httpx.Response, end: float) -> bytes:
        """The body, unpacked; no more of it than the limit is ever in memory.

        Raises:
          TimeoutError: it is not whole at `end`, by the monotonic clock.
          JsublimError: it is too long, or packed in a way that nobody asked for.
        """
        most, coding = self.connection.reply_bytes, answer.headers.get("Content-Encoding", "identity").lower()
        if coding not in ("identity", "gzip"):
            raise self.error(f"its reply is encoded as {coding[:SHOWN]!r}; gzip was asked for")
        packed, body = zlib.decompressobj(wbits=31) if coding == "gzip" else None, bytearray()
        for piece in answer.iter_raw():
            body += piece if packed is None else packed.decompress(piece, most + 1 - len(body))
            if len(body) > most:
                raise self.error(f"its reply is longer than {most} bytes; raise 'reply_bytes' if that is right")
            if time.monotonic() > end:
                raise TimeoutError
        return bytes(body)

    def _refusal(self, answer: httpx.Response, read: Callable[[], bytes]) -> Exception:
        """What a status other than success means."""
        status = f"HTTP {answer.status_code}"
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            return Retry(status, after=retry_after(answer.headers.get("Retry-After")))
        if answer.status_code in (401, 403):
            variable = self.connection.key_variable
            fix = f"set the right key in {variable}" if variable else "name the key's variable in 'key_variable'"
            words = f"it does not let us in; {fix}"
        else:
            words = " ".join(self._without_key(read()[: 10 * SHOWN].decode("utf-8", "replace")).split())[:SHOWN]
        return Refused(str(self.error(f"{status}: {words}")), answer.status_code)

    def patiently(self, work: Callable[[], Result], stopped: threading.Event) -> Result:
        """What `work` returns; after a failure that may pass, it is called again.

        Raises:
          JsublimError: it keeps failing, or the server asks for too long a wait.
          Stopped: `stopped` was set while it waited.
        """

        for attempt in itertools.count(1):
            self._pace.wait(stopped)
            if stopped.is_set():
                break
            try:
                return work()
            except Retry as failure:
                if attempt > self.connection.retries:
                    raise self.error(f"{failure} ({attempt} attempts; run again to go on)") from None
                if failure.after > LONGEST_HOLD_S:
                    raise self.error(f"{failure}, and it asks to wait for {failure.after:.0f} s") from None
                self._pace.hold(failure.after)
                stopped.wait(0.0 if failure.after else backoff(attempt))
        raise Stopped

    def each(
        self, items: Iterable[Item], work: Callable[[Item, threading.Event], Result]
    ) -> Iterator[tuple[Item, Result]]:
        """Items with what `work` makes of each, as they are finished by `concurrency` threads.

        An error waits for the requests under way, whose results come first; Ctrl-C does not.
        """
        todo = list(items)
        left, stopped, results = iter(todo), threading.Event(), SimpleQueue[Any]()

        def thread() -> None:
            for item in left:  # the threads share it: each item is taken once
                if stopped.is_set():
                    break
                try:
                    results.put((item, work(item, stopped), None))
                except Stopped:
                    break
                except BaseException as error:
                    stopped.set()
                    results.put((item, None, error))
            results.put(None)

        # The threads of a `ThreadPoolExecutor` would be waited for at the end of the process, whatever ended it.
        running, failed = min(self.connection.concurrency, len(todo)), None
        for _ in range(running):
            threading.Thread(target=thread, daemon=True).start()
        try:
            while running:
                one = results.get()
                if one is None:
                    running -= 1
                elif one[2] is None:
                    yield one[0], one[1]
                else:
                    failed = failed or one[2]
            if failed is not None:
                raise failed
        finally:
            stopped.set()

    def error(self, reason: str) -> JsublimError:
        return JsublimError(f"{self.what} at {self.connection.base_url}: {self._without_key(reason)}")

    def _without_key(self, text: str) -> str:
        """A server's words without the key, or a part of it, that they may quote."""
        name = self.connection.key_variable
        return without(text, os.environ.get(name, "").strip() if name else "")


def without(text: str, key: str) -> str:
    """A text in which no `HIDDEN` characters of a key follow one another, as they are or encoded."""
    if not key:
        return text
    forms, size = [key], min(HIDDEN, len(key))
    if len(key) >= HIDDEN:
        shifted = [b"\0" * n + key.encode() for n in range(3)]  # in base64, characters depend on what is before them
        forms += [quote(key, safe=""), key.encode().hex(), json.dumps(key)[1:-1]]
        forms += [encode(each).decode() for encode in (b64encode, urlsafe_b64encode) for each in shifted]
    parts = {form[i : i + size].lower() for form in forms for i in range(len(form) - size + 1)}
    lower, shown, end = "".join(c.lower() if len(c.lower()) == 1 else c for c in text), list[str](), 0
    for i, character in enumerate(text):
        if lower[i : i + size] in parts:
            shown += ["***"] if i >= end else []
            end = i + size
        elif i >= end:
            shown.append(character)
    return "".join(shown)


def backoff(attempt: int) -> float:
    """Seconds to wait after an attempt, counted from 1: a delay that doubles each time, drawn from its upper half."""
    longest = min(FIRST_DELAY_S * 2.0 ** min(attempt - 1, 30), LONGEST_DELAY_S)
    return random.uniform(longest / 2, longest)


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 where it is past or cannot be read."""
    text = (header or "").strip()
    if text.isascii() and text.isdecimal():
        return float(text)  # of hundreds of digits, infinity
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return 0.0


class Pace:
    """Lets requests through evenly spaced, whichever thread they come from."""

    def __init__(self, per_minute: float | None):
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self, stopped: threading.Event) -> None:
        """Return when the next request may go, or when `stopped` is set."""
        while not stopped.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._gap
                    return
                left = self._next - now
            stopped.wait(min(left, LONGEST_DELAY_S))  # a system has a longest time that it can wait

    def hold(self, seconds: float) -> None:
        """Let nothing through for that long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)
